"""Trains a denoiser of SVQVAE latents, and leaves an `LDMPipeline` or a `DiTPipeline`.

accelerate launch training/train_latent_diffusion.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --train_data_dir PHOTOS --output_dir OUT
"""

from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, LDMPipeline, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding

from svqvae_hf.trainer.data.crops import CropBatch
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.options import ImageOptions, PipelineOptions, option
from svqvae_hf.trainer.pipeline_run import PipelineSession
from svqvae_hf.trainer.run import run_script

PIXEL_RANGE = (-1.0, 1.0)  # of both pipelines
DENOISERS = {each.__name__: each for each in (UNet2DModel, DiTTransformer2DModel)}
NUM_CLASSES = 1000  # DiTPipeline guides with the label after these, whatever the transformer


@dataclass
class DiffusionConfig(PipelineOptions, ImageOptions):
    """Options of training a denoiser."""

    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    num_inference_steps: int = option(50, "Denoising steps of the images of a validation.")

    def __post_init__(self) -> None:
        """As in the base classes."""
        super().__post_init__()
        self.check_positive("num_inference_steps")


class DiffusionTrainer(PipelineSession):
    """Training of a denoiser: what it holds, and its steps.

    The denoiser predicts the velocity (Salimans and Ho, arXiv 2202.00512) on a schedule that ends in pure noise, from
    which sampling starts (Lin et al., arXiv 2305.08891).

    Args:
        config ([`DiffusionConfig`]): Options.

    Raises:
        ValueError: If model, labels and images do not fit each other.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__(config, PIXEL_RANGE)
        accelerator = self.accelerator
        network = self.new_network().to(accelerator.device)
        self.has_labels = isinstance(network, DiTTransformer2DModel)
        if self.has_labels != (config.label_column is not None):
            raise ValueError(
                f"`--label_column` belongs to a DiTTransformer2DModel, and it needs one, but the model is a "
                f"{type(network).__name__}, and the column {config.label_column!r}."
            )
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        self.source = ImageSource(config, accelerator, PIXEL_RANGE, config.label_column)
        self.label_names = self._label_names() if self.has_labels else []
        self.loader = self.source.loader(
            [config.resolution], config.max_train_steps * config.gradient_accumulation_steps, config.seed
        )
        self.prepare(network, network)
        self.summary = (
            f"Images of {config.resolution} x {config.resolution} pixels by diffusion in the latents of an SVQVAE."
        )
        self.call = f"class_labels=[0], num_inference_steps={config.num_inference_steps}" if self.has_labels else ""

    def new_network(self) -> UNet2DModel | DiTTransformer2DModel:
        """The denoiser that the config describes, of the size of the latents; without dropout of labels of its own."""
        source = self.config.model_config_name_or_path
        description = UNet2DModel.load_config(source)
        if description.get("_class_name") not in DENOISERS:
            raise ValueError(
                f"The `_class_name` of `{source}` must be one of {', '.join(DENOISERS)}, but is "
                f"{description.get('_class_name')}."
            )
        side, channels = self.latent_side, self.vqvae.config["codebook_embed_dim"]
        derived = {"sample_size": side, "in_channels": channels, "out_channels": channels}
        network_class = DENOISERS[description["_class_name"]]
        if network_class is DiTTransformer2DModel:
            derived["num_embeds_ada_norm"] = NUM_CLASSES
        network = network_class.from_config({**description, **derived})
        divisor = network.config.get("patch_size") or 2 ** (len(network.config["block_out_channels"]) - 1)
        if side % divisor:
            raise ValueError(
                f"`--resolution` must give latents whose side is a multiple of {divisor}, by `{source}`, but "
                f"{self.config.resolution} gives {side}."
            )
        for module in network.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # each block would drop the label or keep it for itself
        return network

    def _label_names(self) -> list[str]:
        """Names of the classes, empty if the set has none."""
        feature = self.source.images.features[self.config.label_column]
        if isinstance(feature, datasets.ClassLabel) and feature.num_classes <= NUM_CLASSES:
            return feature.names
        if isinstance(feature, datasets.Value) and "int" in feature.dtype:
            return []
        raise ValueError(
            f"`--label_column` must hold integers, or at most {NUM_CLASSES} classes, but "
            f"{self.config.label_column!r} holds {feature}."
        )

    def _labels(self, batch: CropBatch, generator: torch.Generator) -> torch.Tensor | None:
        """Labels of a batch, some of them replaced by that of no class."""
        if not self.has_labels:
            return None
        for label in batch.labels:
            if label is None or not 0 <= label < NUM_CLASSES:
                raise ValueError(f"Labels must be integers in [0, {NUM_CLASSES}), but one is {label}.")
        labels = torch.tensor(batch.labels)
        dropped = torch.rand(labels.shape, generator=generator) < self.config.label_dropout
        return labels.masked_fill(dropped, NUM_CLASSES).to(self.accelerator.device)

    def train_on(self, batch: CropBatch, step: int) -> dict[str, torch.Tensor]:
        """Adds noise to the latents of the crops, and trains the denoiser to find it."""
        sample, generator = self.source.receive(batch), self.batch_generator()
        with torch.no_grad(), self.accelerator.autocast():
            latents = self.vqvae.encode(sample).latents.float() * self.vqvae.config["scaling_factor"]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        steps = self.scheduler.config["num_train_timesteps"]
        timesteps = torch.randint(steps, (len(latents),), generator=generator).to(latents.device)
        labels = self._labels(batch, generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(self.model(noisy, timesteps, class_labels=labels).sample.float(), velocity)
        self.throughput.add(images=len(sample), megapixels=sample[:, 0].numel() / 1e6)
        return self.descend(loss) | {"latent_std": latents.std()}

    def make_pipeline(self, network: UNet2DModel | DiTTransformer2DModel) -> DiffusionPipeline:
        """`LDMPipeline` of a UNet, `DiTPipeline` of a transformer, which knows the names of its classes."""
        if not self.has_labels:
            return LDMPipeline(vqvae=self.vqvae, unet=network, scheduler=self.scheduler)
        names = {str(label): name for label, name in enumerate(self.label_names)}
        pipeline = DiTPipeline(transformer=network, vae=self.vqvae, scheduler=self.scheduler, id2label=names)
        pipeline.register_to_config(id2label=names)
        return pipeline

    def sample(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> np.ndarray:
        """Images of noise; one of each class in turn."""
        count = self.config.num_validation_images
        call = {"generator": generator, "num_inference_steps": self.config.num_inference_steps, "output_type": "np"}
        if not self.has_labels:
            return pipeline(batch_size=count, **call).images
        num_classes = len(self.label_names) or count
        return pipeline(class_labels=[index % num_classes for index in range(count)], **call).images


if __name__ == "__main__":
    run_script(DiffusionTrainer, DiffusionConfig)
