"""Trains a transformer that denoises SVQVAE latents, and saves a `DiTPipeline`.

python training/train_latent_diffusion.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --train_data_dir PHOTOS --output_dir OUT

With several GPUs, `accelerate launch` in place of `python`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from denoiser import (
    NO_CLASS,
    NUM_CLASSES,
    PIXEL_RANGE,
    ScaleOfLatents,
    make_denoiser,
    make_pipeline,
    read_label_names,
    set_scaling_factor,
)
from diffusers import DDIMScheduler, DiTPipeline
from diffusion_options import DiffusionOptions
from held_out_images import HeldOut, HeldOutBatch, load_held_out, open_held_out
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from svqvae_hf import SVQVAE
from svqvae_hf.hub.model_cards import quote
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.data.sample_order import batch_generator
from svqvae_hf.trainer.identity import image_set_digests
from svqvae_hf.trainer.pipeline_run import generator_card, load_frozen_vqvae, log_samples
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import Run, run_script

SCRIPT = "training/train_latent_diffusion.py"


def train(run: Run[DiffusionOptions]) -> None:
    """Trains a denoiser, from the start or from a checkpoint, and saves its pipeline with a card."""
    options = run.options
    accelerator = run.accelerator

    # Model and images
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    images = ImageSource(options, accelerator, PIXEL_RANGE, options.label_column)
    held_out = open_held_out(options, images)
    run.identify(digests_of(images, held_out))
    if run.is_new and vqvae.config["scaling_factor"] == 1:
        set_scaling_factor(vqvae, images)
    denoiser = make_denoiser(options, vqvae).to(accelerator.device)
    pipeline = make_pipeline(vqvae, denoiser, read_label_names(images.label_feature))
    batches_per_step = options.gradient_accumulation_steps
    loader = images.loader([options.resolution], options.max_steps, options.seed, batches_per_step=batches_per_step)

    # Optimizer
    weights = run.train(denoiser, options.learning_rate)
    model = weights.model
    states: dict[str, Stateful] = {"weights": weights, "loader": loader, "scale_of_latents": ScaleOfLatents(vqvae)}
    checkpoints = run.begin(denoiser, states, loader.contents)
    denoise = Denoising(accelerator, vqvae, model, pipeline.scheduler, options.resolution)
    batches = iter(loader)

    def validate(steps_done: int) -> None:
        if held_out is not None:
            with weights.evaluating():
                loss = measure(run, denoise, held_out)
            run.log.write(steps_done, {"validation/loss": loss})
        arguments = sampling_arguments(options, pipeline)
        labels = sample_labels(options, pipeline)
        log_samples(run.log, weights, pipeline, arguments, labels, steps_done)

    if run.is_new:
        validate(0)
    for step in checkpoints.steps():
        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                sample = images.to_device(batch)  # (B, 3, side, side)
                # All processes draw the noise of the whole step, and use the rows of their own samples.
                noise_of_step = denoise.draw_noise(batch_generator(options.seed, step), loader.share.step_size)
                numbers_of_batch = loader.share.numbers(loader.batch - 1)  # its samples within the step
                noise = noise_of_step.rows(numbers_of_batch)
                is_dropped = noise.dropout_draws < options.condition_dropout
                if options.label_column is None:
                    labels = no_labels(len(sample))
                else:
                    labels = drop_labels(batch.labels, is_dropped)
                velocities = denoise(sample, labels, noise)
                loss = F.mse_loss(velocities.predicted, velocities.expected)
                accelerator.backward(loss)
                numbers = {"loss": loss, "latent_std": velocities.latent_std}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= weights.update()
                run.log.add(numbers, images=len(sample), megapixels=sample[:, 0].numel() / 1e6)

        if options.logs_after(step):
            run.log.write_training(step + 1, {"lr": weights.lr})
        if options.validates_after(step):
            validate(step + 1)
        checkpoints.after(step)

    validate(options.max_steps)
    denoiser.load_state_dict(weights.final())
    if accelerator.is_main_process:
        rows = provenance(SCRIPT, options.max_steps, loader.share.step_size, "images") | run.log.card_rows
        run.result.publish(pipeline.save_pretrained, make_card(options, run.result, pipeline, rows))


# The forward pass


@dataclass
class Noise:
    """Random numbers for some samples.

    Args:
        values (`torch.Tensor` of shape `(n, channels, h, w)`): Normal noise.
        timesteps (`torch.Tensor` of shape `(n,)`): Timesteps, int64.
        dropout_draws (`torch.Tensor` of shape `(n,)`): Numbers in [0, 1). The label of a sample is dropped if its
            number is below `--condition_dropout`.
    """

    values: torch.Tensor
    timesteps: torch.Tensor
    dropout_draws: torch.Tensor

    def rows(self, numbers: range) -> "Noise":
        """Noise for the samples with these numbers."""
        chosen = list(numbers)
        return Noise(self.values[chosen], self.timesteps[chosen], self.dropout_draws[chosen])


@dataclass
class Velocities:
    """Velocities (Salimans and Ho, arXiv 2202.00512) of a batch, `(B, channels, h, w)`.

    Args:
        predicted (`torch.Tensor`): What the denoiser predicts, float32.
        expected (`torch.Tensor`): What it should predict.
        latent_std (`torch.Tensor`): Standard deviation of the latents, a scalar.
    """

    predicted: torch.Tensor
    expected: torch.Tensor
    latent_std: torch.Tensor


@dataclass
class Denoising:
    """Adds noise to the latents of images, and lets the denoiser predict the velocity.

    Args:
        accelerator (`Accelerator`): Accelerator of the run.
        vqvae ([`SVQVAE`]): Model of the latents.
        model (`nn.Module`): The denoiser as the run has prepared it.
        noise_schedule (`DDIMScheduler`): Schedule of the noise.
        resolution (`int`): Side of the images in pixels.
    """

    accelerator: Accelerator
    vqvae: SVQVAE
    model: nn.Module
    noise_schedule: DDIMScheduler
    resolution: int

    def draw_noise(self, generator: torch.Generator, count: int) -> Noise:
        """Draws noise for `count` samples."""
        channels = self.vqvae.config["codebook_embed_dim"]
        pixels_per_latent = self.vqvae.f  # along each side
        side = self.resolution // pixels_per_latent
        values = torch.randn((count, channels, side, side), generator=generator)
        num_timesteps = self.noise_schedule.config["num_train_timesteps"]
        timesteps = torch.randint(num_timesteps, (count,), generator=generator)
        dropout_draws = torch.rand(count, generator=generator)
        return Noise(values, timesteps, dropout_draws)

    def __call__(self, sample: torch.Tensor, labels: torch.Tensor, noise: Noise) -> Velocities:
        """Predicts the velocities of images `(B, 3, side, side)` with labels `(B,)`."""
        device = sample.device
        with torch.no_grad(), self.accelerator.autocast():
            unscaled = self.vqvae.encode(sample).latents.float()  # (B, C, h, w)
        latents = unscaled * self.vqvae.config["scaling_factor"]
        values = noise.values.to(device)
        timesteps = noise.timesteps.to(device)
        noisy = self.noise_schedule.add_noise(latents, values, timesteps)
        predicted = self.model(noisy, timesteps, class_labels=labels.to(device)).sample.float()
        expected = self.noise_schedule.get_velocity(latents, values, timesteps)
        return Velocities(predicted, expected, latents.std())


def join_noise(parts: Sequence[Noise]) -> Noise:
    """Noise of several samples, one after the other."""
    values = torch.cat([part.values for part in parts])
    timesteps = torch.cat([part.timesteps for part in parts])
    dropout_draws = torch.cat([part.dropout_draws for part in parts])
    return Noise(values, timesteps, dropout_draws)


def no_labels(count: int) -> torch.Tensor:
    """Labels `(B,)` that mean no class."""
    return torch.full((count,), NO_CLASS)


def label_tensor(labels: Sequence[int]) -> torch.Tensor:
    """Labels `(B,)` for the denoiser. Raises ValueError for one that it cannot have."""
    for label in labels:
        if not 0 <= label < NUM_CLASSES:
            raise ValueError(f"Labels must be integers in [0, {NUM_CLASSES}), but one is {label}.")
    return torch.tensor(labels)


def drop_labels(labels: Sequence[int], is_dropped: torch.Tensor) -> torch.Tensor:
    """Labels `(B,)` for the denoiser, `NO_CLASS` in place of dropped ones."""
    return label_tensor(labels).masked_fill(is_dropped, NO_CLASS)


# Validation and result


def digests_of(images: ImageSource, held_out: HeldOut | None) -> dict[str, str]:
    """Digests of all sets of a run, by the option that names each."""
    digests = image_set_digests(images)
    if held_out is not None:
        digests["validation_data_dir"] = held_out.digest
    return digests


def measure(run: Run[DiffusionOptions], denoise: Denoising, held_out: HeldOut) -> float:
    """Mean loss over the held-out images, each with its own timestep and noise, which are always the same.

    The processes share the images. So the loss depends neither on their number nor on the size of a batch.
    """
    accelerator = run.accelerator
    sum_of_losses = 0.0  # of the images of this process
    num_images = 0
    for batch in load_held_out(run.options, held_out, accelerator):
        held_out.log_skipped(batch)
        has_images = len(batch.numbers) > 0  # unreadable images are left out of a batch, perhaps all of them
        if has_images:
            losses = losses_of_images(denoise, batch, accelerator.device)  # (B,)
            sum_of_losses += losses.double().sum().item()
            num_images += len(losses)
    # Sums over all processes. The processes may have different numbers of images, so their means cannot be averaged.
    sums = torch.tensor([sum_of_losses, num_images], device=accelerator.device)
    total_loss, total_images = accelerator.reduce(sums, "sum").tolist()
    if total_images == 0:
        raise ValueError("`--validation_data_dir` must hold at least one readable image, but holds none.")
    return total_loss / total_images


def losses_of_images(denoise: Denoising, batch: HeldOutBatch, device: torch.device) -> torch.Tensor:
    """Loss of each held-out image of a batch, `(B,)`."""
    if batch.labels is None:
        labels = no_labels(len(batch.numbers))
    else:
        labels = label_tensor(batch.labels)
    noise = noise_of_images(denoise, batch.numbers)
    velocities = denoise(batch.sample.to(device), labels, noise)
    errors = F.mse_loss(velocities.predicted, velocities.expected, reduction="none")  # (B, C, h, w)
    return errors.mean((1, 2, 3))  # (B,)


def noise_of_images(denoise: Denoising, numbers: Sequence[int]) -> Noise:
    """Noise of held-out images, which depends only on their numbers."""
    noise_of_each = []
    for number in numbers:
        generator_of_image = batch_generator(number)
        noise_of_each.append(denoise.draw_noise(generator_of_image, count=1))
    return join_noise(noise_of_each)


def sampling_arguments(options: DiffusionOptions, pipeline: DiTPipeline) -> dict[str, Any]:
    """Arguments of the pipeline that samples images for a validation: each class in turn."""
    count = options.num_validation_images
    steps = options.num_inference_steps
    if options.label_column is None:
        # Guidance needs a class, so a scale of 1 turns it off.
        return {"class_labels": [NO_CLASS] * count, "guidance_scale": 1.0, "num_inference_steps": steps}
    num_named_classes = len(pipeline.config.id2label)
    labels = list(range(count))
    if num_named_classes > 0:  # otherwise the number of classes is not known
        labels = [label % num_named_classes for label in labels]
    return {"class_labels": labels, "num_inference_steps": steps}


def sample_labels(options: DiffusionOptions, pipeline: DiTPipeline) -> list[str]:
    """Labels of the images of a validation: names or numbers of classes, or numbers of images."""
    names = list(pipeline.config.id2label.values())
    labels = []
    for index in range(options.num_validation_images):
        if options.label_column is None:
            labels.append(f"sample {index}")
        elif names:
            labels.append(names[index % len(names)])
        else:
            labels.append(f"class {index}")
    return labels


def make_card(options: DiffusionOptions, result: Result, pipeline: DiTPipeline, rows: Mapping[str, str]) -> str:
    """Card of the pipeline."""
    side = options.resolution
    summary = f"Images of {side} x {side} pixels by diffusion in the latents of an SVQVAE."
    call = f"{class_arguments(options, pipeline)}, num_inference_steps={options.num_inference_steps}"
    return generator_card(options, result, pipeline, rows, summary, call)


def class_arguments(options: DiffusionOptions, pipeline: DiTPipeline) -> str:
    """Arguments of the pipeline's call for one image of the first class, as code for the card."""
    if options.label_column is None:
        return f"class_labels=[{NO_CLASS}], guidance_scale=1.0"
    names = list(pipeline.config.id2label.values())
    if not names:  # the classes have numbers alone
        return "class_labels=[0]"
    # The name of a class may list synonyms, such as "crane, bird". The pipeline finds the class by any of them.
    first_name = names[0].partition(",")[0].strip()
    return f"class_labels=pipeline.get_label_ids([{quote(first_name)}])"


if __name__ == "__main__":
    run_script(train, DiffusionOptions)
