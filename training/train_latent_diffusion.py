"""Trains a transformer that denoises SVQVAE latents, and saves a `DiTPipeline`.

accelerate launch training/train_latent_diffusion.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --train_data_dir PHOTOS --output_dir OUT
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from svqvae_hf import SVQVAE
from svqvae_hf.hub.model_cards import quote
from svqvae_hf.trainer.checkpoints import Checkpoints, find_checkpoint
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.data.crop_batches import CropBatch
from svqvae_hf.trainer.data.held_out import check_held_out
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.data.sample_order import batch_generator
from svqvae_hf.trainer.log import Log
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import POSITIVE, ImageOptions, PipelineOptions, option, wrong
from svqvae_hf.trainer.pipeline_run import generator_card, load_frozen_vqvae, log_samples
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import run_script
from svqvae_hf.trainer.weights import Weights

SCRIPT = "training/train_latent_diffusion.py"
PIXEL_RANGE = (-1.0, 1.0)  # of DiTPipeline
MEASURED_BATCHES = 16  # for the scale of the latents
NUM_CLASSES = 1000  # the label after these means no class in DiTPipeline, for any transformer


@dataclass
class DiffusionOptions(PipelineOptions, ImageOptions):
    """Options of training a denoiser."""

    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    num_inference_steps: int = option(50, "Denoising steps of the images of a validation.")
    validation_data_dir: str | None = option(None, "Folder of held-out images, whose loss is logged.")

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the options of denoisers as well."""
        yield from super().faults()
        yield from wrong(self, POSITIVE, "num_inference_steps")


def train(options: DiffusionOptions, accelerator: Accelerator) -> None:
    """Trains a denoiser, from the start or from a checkpoint, and saves its pipeline with a card."""
    checkpoint = find_checkpoint(options.output_dir, options.resume_from_checkpoint, options.max_steps)

    # Model and images
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    images = ImageSource(options, accelerator, PIXEL_RANGE, options.label_column)
    if vqvae.config["scaling_factor"] == 1:
        set_scaling_factor(vqvae, images)
    denoiser = make_denoiser(options, vqvae).to(accelerator.device)
    noise_schedule = make_noise_schedule()
    num_timesteps = noise_schedule.config["num_train_timesteps"]
    names = {str(label): name for label, name in enumerate(read_label_names(images.label_feature))}
    pipeline = DiTPipeline(transformer=denoiser, vae=vqvae, scheduler=noise_schedule, id2label=names)
    pipeline.register_to_config(id2label=names)
    batches_per_step = options.gradient_accumulation_steps
    loader = images.loader([options.resolution], options.max_steps, options.seed, batches_per_step=batches_per_step)
    held_out = open_held_out(options, images)

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(denoiser, options, options.learning_rate, options.max_steps)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    weights = Weights(options, accelerator, denoiser, model, optimizer, lr_scheduler, options.use_ema)
    checkpoints = Checkpoints(options, accelerator, checkpoint, {"weights": weights, "loader": loader})
    result = Result.of(options, accelerator)
    log = Log(options, accelerator, denoiser, loader.contents, checkpoints.first_step)
    batches = iter(loader)

    def predict(
        batch: CropBatch, generator: torch.Generator, condition_dropout: float, numbers: range, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch at random timesteps, and the deviation of its latents.

        All processes draw numbers for the `count` samples of a step, and use those with the `numbers` of the batch.
        """
        sample = images.to_device(batch)
        with torch.no_grad(), accelerator.autocast():
            latents = vqvae.encode(sample).latents.float() * vqvae.config["scaling_factor"]
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)[numbers].to(latents.device)
        timesteps = torch.randint(num_timesteps, (count,), generator=generator)[numbers].to(latents.device)
        noisy = noise_schedule.add_noise(latents, noise, timesteps)
        classes = None if options.label_column is None else batch.labels
        dropped = torch.rand(count, generator=generator)[numbers] < condition_dropout
        labels = drop_labels(classes, dropped).to(latents.device)

        # The denoiser predicts the velocity (Salimans and Ho, arXiv 2202.00512)
        velocity = noise_schedule.get_velocity(latents, noise, timesteps)
        return F.mse_loss(model(noisy, timesteps, class_labels=labels).sample.float(), velocity), latents.std()

    def validate(steps_done: int) -> None:
        if held_out is not None:
            batches = -(-held_out.images.max_parts // options.per_device_train_batch_size // accelerator.num_processes)
            with weights.evaluating():  # the same crops, noise and timesteps at each validation
                losses = [
                    predict(batch, batch_generator(number), 0.0, range(len(batch.labels)), len(batch.labels))[0]
                    for number, batch in enumerate(held_out.loader([options.resolution], batches, seed=0))
                ]
            loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            log.write(steps_done, {"validation/loss": loss})
        log_samples(log, weights, pipeline, sample_call(options, pipeline), steps_done)

    if checkpoint is None:
        validate(0)
    for step in checkpoints.steps():
        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                numbers_in_step = loader.share.numbers(loader.batch - 1)
                generator = batch_generator(options.seed, step)
                loss, latent_std = predict(
                    batch, generator, options.condition_dropout, numbers_in_step, loader.share.step_size
                )
                accelerator.backward(loss)
                numbers = {"loss": loss, "latent_std": latent_std}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= weights.update()
                log.add(numbers, images=len(batch.sample), megapixels=batch.sample[:, 0].numel() / 1e6)

        if options.logs_after(step):
            log.write_training(step + 1, {"lr": weights.lr})
        if options.validates_after(step):
            validate(step + 1)

    validate(options.max_steps)
    denoiser.load_state_dict(weights.final())
    if accelerator.is_main_process:
        origin = provenance(SCRIPT, options.max_steps, loader.share.step_size, "images") | log.card_rows
        result.publish(pipeline.save_pretrained, make_card(options, result, pipeline, origin))


@torch.no_grad()
def set_scaling_factor(vqvae: SVQVAE, images: ImageSource) -> None:
    """Sets the factor with which latents of the training images have the standard deviation of the noise, 1."""
    batches = MEASURED_BATCHES * images.options.gradient_accumulation_steps  # as many crops for any processes
    crops = images.fresh_crops([images.options.resolution], batches)
    latents = torch.cat([vqvae.encode(sample).latents for sample in crops])
    deviation = images.accelerator.reduce(latents.std(), "mean").item()
    if not deviation > 0:
        raise ValueError("Latents must differ, but all are equal. Use other images, or a trained SVQVAE.")
    vqvae.register_to_config(scaling_factor=1 / deviation)


def open_held_out(options: DiffusionOptions, images: ImageSource) -> ImageSource | None:
    """Opens the held-out images, cropped to their centres; None without `--validation_data_dir`."""
    if options.validation_data_dir is None:
        return None
    centres = replace(options, center_crop=True, random_flip=False, resize_range=[1.0, 1.0], streaming=False)
    centres.train_data_dir, centres.dataset_name = options.validation_data_dir, None
    centres.dataset_config_name, centres.data_files, centres.mix_data_dir = None, [], None
    centres.split = "train"
    held_out = ImageSource(centres, images.accelerator, PIXEL_RANGE, options.label_column)
    for trained in (images.images, images.mixed):
        check_held_out(held_out.images, trained)
    if held_out.label_feature != images.label_feature:
        raise ValueError(
            f"`--validation_data_dir` must have the classes of the training images, {images.label_feature}, but has "
            f"{held_out.label_feature}."
        )
    return held_out


def make_denoiser(options: DiffusionOptions, vqvae: SVQVAE) -> DiTTransformer2DModel:
    """Denoiser of the config for latents of this size, without its own dropout of labels."""
    source = options.model_config_name_or_path
    description = load_network_config(source, DiTTransformer2DModel)
    side, channels = options.resolution // vqvae.f, vqvae.config["codebook_embed_dim"]
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
    denoiser = DiTTransformer2DModel.from_config({**description, **sizes, "num_embeds_ada_norm": NUM_CLASSES})
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
    if isinstance(feature, datasets.ClassLabel) and feature.num_classes <= NUM_CLASSES:
        return feature.names
    if feature is None or (isinstance(feature, datasets.Value) and "int" in feature.dtype):
        return []
    raise ValueError(f"`--label_column` must hold integers, or at most {NUM_CLASSES} classes, but it holds {feature}.")


def drop_labels(labels: list[int] | None, dropped: torch.Tensor) -> torch.Tensor:
    """Labels of a batch, replaced by the label of no class where they are dropped; all of them without labels."""
    if labels is None:
        return torch.full((len(dropped),), NUM_CLASSES)
    for label in labels:
        if not 0 <= label < NUM_CLASSES:
            raise ValueError(f"Labels must be integers in [0, {NUM_CLASSES}), but one is {label}.")
    return torch.tensor(labels).masked_fill(dropped, NUM_CLASSES)


def sample_call(options: DiffusionOptions, pipeline: DiTPipeline) -> dict[str, Any]:
    """Arguments of the pipeline's call for the images of a validation: each class in turn."""
    count, call = options.num_validation_images, {"num_inference_steps": options.num_inference_steps}
    if options.label_column is None:
        return call | {"class_labels": [NUM_CLASSES] * count, "guidance_scale": 1.0}
    return call | {"class_labels": [index % (len(pipeline.config.id2label) or count) for index in range(count)]}


def make_card(options: DiffusionOptions, result: Result, pipeline: DiTPipeline, numbers: Mapping[str, str]) -> str:
    """Card of the pipeline."""
    side, steps = options.resolution, options.num_inference_steps
    names = list(pipeline.config.id2label.values())
    if options.label_column is None:
        labels = f"[{NUM_CLASSES}], guidance_scale=1.0"
    else:
        labels = f"pipeline.get_label_ids([{quote(names[0].split(',')[0].strip())}])" if names else "[0]"
    summary = f"Images of {side} x {side} pixels by diffusion in the latents of an SVQVAE."
    call = f"class_labels={labels}, num_inference_steps={steps}"
    return generator_card(options, result, pipeline, numbers, summary, call)


if __name__ == "__main__":
    run_script(train, DiffusionOptions)
