"""Makes a denoiser of SVQVAE latents and its `DiTPipeline`."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusion_options import DiffusionOptions

from svqvae_hf import SVQVAE
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.data.image_source import ImageSource

PIXEL_RANGE = (-1.0, 1.0)  # of DiTPipeline
NUM_CLASSES = 1000  # of DiTPipeline, for any transformer
NO_CLASS = NUM_CLASSES  # label of an image without a class in DiTPipeline
MEASURED_BATCHES = 16  # for the scale of the latents


@torch.no_grad()
def set_scaling_factor(vqvae: SVQVAE, images: ImageSource) -> None:
    """Sets the factor that gives latents of the training images a standard deviation of 1, as the noise has."""
    # A run keeps `processes * gradient_accumulation_steps` when it moves to fewer GPUs. So all processes together
    # measure the same number of crops there.
    num_batches = MEASURED_BATCHES * images.options.gradient_accumulation_steps  # of each process
    crops = images.fresh_crops([images.options.resolution], num_batches)
    latents = torch.cat([vqvae.encode(sample).latents for sample in crops])  # (n, C, h, w)
    std = images.accelerator.reduce(latents.std(), "mean").item()
    are_equal = not std > 0  # true for NaN, too
    if are_equal:
        raise ValueError("Latents must differ, but all are equal. Use other images, or a trained SVQVAE.")
    vqvae.register_to_config(scaling_factor=1 / std)


class ScaleOfLatents:
    """The factor by which a run scales latents, as its checkpoints keep it.

    A resumed run needs the factor that its denoiser was trained with, and would measure another one with other crops.

    Args:
        vqvae ([`SVQVAE`]): Model whose config holds the factor.
    """

    def __init__(self, vqvae: SVQVAE):
        self.vqvae = vqvae

    def state_dict(self) -> dict[str, float]:
        """The factor."""
        return {"scaling_factor": self.vqvae.config["scaling_factor"]}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Sets the factor."""
        self.vqvae.register_to_config(scaling_factor=state["scaling_factor"])


def make_pipeline(vqvae: SVQVAE, denoiser: DiTTransformer2DModel, label_names: Sequence[str]) -> DiTPipeline:
    """Pipeline of the denoiser, with the names of its classes."""
    check_label_names(label_names)
    names = {str(label): name for label, name in enumerate(label_names)}
    pipeline = DiTPipeline(transformer=denoiser, vae=vqvae, scheduler=make_noise_schedule(), id2label=names)
    pipeline.register_to_config(id2label=names)
    return pipeline


def check_label_names(names: Sequence[str]) -> None:
    """Raises unless `DiTPipeline.get_label_ids` finds each class by its name.

    It splits names at commas. With the classes "crane, bird" and "crane, machine", it would find only the last one as
    "crane".

    Raises:
        ValueError: If two classes share a part.
    """
    class_of_part: dict[str, str] = {}
    for name in names:
        for part in name.split(","):
            part = part.strip()
            other_class = class_of_part.get(part, name)
            if other_class != name:
                raise ValueError(
                    "Names of classes must differ in each part between commas, because `DiTPipeline` finds a class by "
                    f"any part, but `{other_class}` and `{name}` share `{part}`. Rename one."
                )
            class_of_part[part] = name


def make_denoiser(options: DiffusionOptions, vqvae: SVQVAE) -> DiTTransformer2DModel:
    """Denoiser of the config for latents of this size, without its own dropout of labels."""
    source = options.model_config_name_or_path
    config = load_network_config(source, DiTTransformer2DModel)
    channels = vqvae.config["codebook_embed_dim"]
    sizes = {
        "sample_size": options.resolution // vqvae.f,
        "in_channels": channels,
        "out_channels": channels,
        "num_embeds_ada_norm": NUM_CLASSES,
    }
    denoiser = DiTTransformer2DModel.from_config(config | sizes)
    divisor = vqvae.f * denoiser.config["patch_size"]
    if options.resolution % divisor:
        raise ValueError(
            f"`--resolution` must be a multiple of {divisor}, f of the SVQVAE times the `patch_size` of `{source}`, "
            f"but is {options.resolution}."
        )
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block would drop the label or keep it on its own
    if options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser.train()


def make_noise_schedule() -> DDIMScheduler:
    """Schedule that ends in pure noise, from which sampling starts (Lin et al., arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def read_label_names(feature: Any) -> list[str]:
    """Names of the classes; empty if the feature has none, or there are no labels."""
    if feature is None:  # no labels
        return []
    if isinstance(feature, datasets.ClassLabel) and feature.num_classes <= NUM_CLASSES:
        return feature.names
    has_integers = isinstance(feature, datasets.Value) and "int" in feature.dtype
    if has_integers:
        return []
    raise ValueError(f"`--label_column` must hold integers, or at most {NUM_CLASSES} classes, but it holds {feature}.")
