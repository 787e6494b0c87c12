"""Trains a transformer that denoises SVQVAE latents, and saves a `DiTPipeline`.

python training/train_latent_diffusion.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --train_data_dir PHOTOS --output_dir OUT

With several GPUs, `accelerate launch` in place of `python`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_parts import IndexedRows
from svqvae_hf.data.image_rows import read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.hub.model_cards import quote
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.held_out import check_held_out
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.data.sample_order import batch_generator
from svqvae_hf.trainer.identity import image_set_digests
from svqvae_hf.trainer.options import POSITIVE, ImageOptions, PipelineOptions, about_split, option, range_faults
from svqvae_hf.trainer.pipeline_run import generator_card, load_frozen_vqvae, log_samples
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import Run, run_script

SCRIPT = "training/train_latent_diffusion.py"
PIXEL_RANGE = (-1.0, 1.0)  # of DiTPipeline
MEASURED_BATCHES = 16  # for the scale of the latents
NUM_CLASSES = 1000  # the label after these means no class in DiTPipeline, for any transformer


@dataclass
class DiffusionOptions(PipelineOptions, ImageOptions):
    """Options of training a denoiser."""

    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    num_inference_steps: int = option(50, "Denoising steps of the images of a validation.")
    validation_data_dir: str | None = option(None, "Folder of held-out images, whose mean loss is logged.")
    validation_split: str | None = option(None, "Split of --validation_data_dir, if it has several.")

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of denoisers."""
        yield from super().faults()
        yield from range_faults(self, POSITIVE, "num_inference_steps")
        if self.validation_split is not None and self.validation_data_dir is None:
            yield "`--validation_split` belongs to `--validation_data_dir`. Give both or neither."


def train(run: Run[DiffusionOptions]) -> None:
    """Trains a denoiser, from the start or from a checkpoint, and saves its pipeline with a card."""
    options = run.options
    accelerator = run.accelerator

    # Model and images
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    images = ImageSource(options, accelerator, PIXEL_RANGE, options.label_column)
    held_out = open_held_out(options, images)
    run.identify(digests_of(images, held_out))
    if vqvae.config["scaling_factor"] == 1:
        set_scaling_factor(vqvae, images)
    denoiser = make_denoiser(options, vqvae).to(accelerator.device)
    pipeline = make_pipeline(vqvae, denoiser, read_label_names(images.label_feature))
    batches_per_step = options.gradient_accumulation_steps
    loader = images.loader([options.resolution], options.max_steps, options.seed, batches_per_step=batches_per_step)

    # Optimizer
    weights = run.train(denoiser, options.learning_rate)
    model = weights.model
    checkpoints = run.begin(denoiser, {"weights": weights, "loader": loader}, loader.contents)
    denoise = Denoising(accelerator, vqvae, model, pipeline.scheduler, options.resolution)
    batches = iter(loader)

    def validate(steps_done: int) -> None:
        if held_out is not None:
            with weights.evaluating():
                loss = measure(run, denoise, held_out)
            run.log.write(steps_done, {"validation/loss": loss})
        labels = sample_labels(options, pipeline)
        log_samples(run.log, weights, pipeline, sample_call(options, pipeline), labels, steps_done)

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
                is_dropped = noise.draws < options.condition_dropout
                classes = None if options.label_column is None else batch.labels
                labels = drop_labels(classes, is_dropped)
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
        draws (`torch.Tensor` of shape `(n,)`): Numbers in [0, 1] that decide whether a label is dropped.
    """

    values: torch.Tensor
    timesteps: torch.Tensor
    draws: torch.Tensor

    def rows(self, numbers: range) -> "Noise":
        """Noise for the samples with these numbers."""
        chosen = list(numbers)
        return Noise(self.values[chosen], self.timesteps[chosen], self.draws[chosen])


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
        side = self.resolution // self.vqvae.f
        values = torch.randn((count, channels, side, side), generator=generator)
        num_timesteps = self.noise_schedule.config["num_train_timesteps"]
        timesteps = torch.randint(num_timesteps, (count,), generator=generator)
        draws = torch.rand(count, generator=generator)
        return Noise(values, timesteps, draws)

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


def drop_labels(labels: list[int] | None, is_dropped: torch.Tensor) -> torch.Tensor:
    """Labels `(B,)` for the denoiser. Dropped and absent labels are `NUM_CLASSES`, which means no class."""
    if labels is None:
        return torch.full((len(is_dropped),), NUM_CLASSES)
    for label in labels:
        if not 0 <= label < NUM_CLASSES:
            raise ValueError(f"Labels must be integers in [0, {NUM_CLASSES}), but one is {label}.")
    return torch.tensor(labels).masked_fill(is_dropped, NUM_CLASSES)


# Validation


@dataclass
class HeldOut:
    """Images of `--validation_data_dir`.

    Args:
        rows ([`~svqvae_hf.data.image_parts.IndexedRows`]): The images.
        digest (`str`): Digest of the set.
    """

    rows: IndexedRows
    digest: str


def open_held_out(options: DiffusionOptions, images: ImageSource) -> HeldOut | None:
    """Opens the held-out images; None without `--validation_data_dir`.

    Raises:
        ValueError: If an image is trained on, or the set has other classes.
    """
    if options.validation_data_dir is None:
        return None
    columns = [] if options.label_column is None else [options.label_column]
    with about_split("validation_split"):
        held_out = open_images(
            [options.validation_data_dir],
            split=options.validation_split,
            columns=columns,
            keep_labels=False,
            copy=True,
            results=options.output_dir,
        )
    for training_set in (images.images, images.mixed):
        check_held_out(held_out, training_set)
    if options.label_column is not None:
        label_feature = held_out.features[options.label_column]
        if label_feature != images.label_feature:
            raise ValueError(
                f"`--validation_data_dir` must have the classes of the training images, {images.label_feature}, but "
                f"has {label_feature}."
            )
    rows = cast(IndexedRows, held_out.rows)  # a copy has random access
    return HeldOut(rows, held_out.fingerprint)


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
    options = run.options
    accelerator = run.accelerator
    totals = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of images
    for numbers in share_of_process(held_out, accelerator, options.per_device_train_batch_size):
        batch = read_held_out(options, held_out, numbers)
        if not batch.numbers:
            continue
        noise = join_noise([denoise.draw_noise(batch_generator(number), 1) for number in batch.numbers])
        is_dropped = torch.zeros(len(batch.numbers), dtype=torch.bool)
        labels = drop_labels(batch.labels, is_dropped)
        velocities = denoise(batch.sample.to(accelerator.device), labels, noise)
        errors = F.mse_loss(velocities.predicted, velocities.expected, reduction="none")  # (B, C, h, w)
        losses = errors.mean((1, 2, 3))  # (B,)
        totals += torch.tensor([losses.double().sum().item(), len(losses)], dtype=torch.float64)
    total, count = accelerator.reduce(totals.to(accelerator.device, torch.float32), "sum").tolist()
    if count == 0:
        raise ValueError("`--validation_data_dir` must hold at least one readable image, but holds none.")
    return total / count


@dataclass
class HeldOutBatch:
    """Centre crops of some held-out images.

    Args:
        numbers (`list[int]`): Numbers of the images in the set.
        sample (`torch.Tensor` of shape `(B, 3, side, side)`): Crops in `PIXEL_RANGE`.
        labels (`list[int]`, *optional*): Labels of the images.
    """

    numbers: list[int]
    sample: torch.Tensor
    labels: list[int] | None


def share_of_process(held_out: HeldOut, accelerator: Accelerator, batch_size: int) -> Iterator[range]:
    """Yields the numbers of the images of this process, in batches."""
    numbers = range(accelerator.process_index, len(held_out.rows), accelerator.num_processes)
    for start in range(0, len(numbers), batch_size):
        yield numbers[start : start + batch_size]


def read_held_out(options: DiffusionOptions, held_out: HeldOut, numbers: range) -> HeldOutBatch:
    """Reads held-out images, and cuts their centres. Unreadable ones, and those without a label, are left out."""
    policy = CropPolicy([options.resolution], center_crop=True, random_flip=False, resize_range=[1.0, 1.0])
    has_labels = options.label_column is not None
    numbers_of_crops = []
    crops: list[Any] = []
    labels: list[Any] = []
    for number in numbers:
        row = held_out.rows[number]
        label = None
        if options.label_column is not None:
            label = row.values[options.label_column]
        try:
            image = read_image(row)
        except (OSError, ValueError):
            continue
        if has_labels and label is None:
            continue
        numbers_of_crops.append(number)
        crops.append(policy.cut(image, options.resolution, seed=[number]))
        labels.append(label)
    if not crops:
        return HeldOutBatch([], torch.empty(0), None)
    processor = SVQVAEImageProcessor(pixel_range=PIXEL_RANGE)
    sample = processor.preprocess(crops)["pixel_values"]  # (B, 3, side, side)
    return HeldOutBatch(numbers_of_crops, sample, labels if has_labels else None)


def join_noise(parts: Sequence[Noise]) -> Noise:
    """Noise of several samples, one after the other."""
    values = torch.cat([part.values for part in parts])
    timesteps = torch.cat([part.timesteps for part in parts])
    draws = torch.cat([part.draws for part in parts])
    return Noise(values, timesteps, draws)


# Models


@torch.no_grad()
def set_scaling_factor(vqvae: SVQVAE, images: ImageSource) -> None:
    """Sets the factor that gives latents of the training images a standard deviation of 1, as the noise has."""
    num_batches = MEASURED_BATCHES * images.options.gradient_accumulation_steps  # as many crops for any processes
    crops = images.fresh_crops([images.options.resolution], num_batches)
    latents = torch.cat([vqvae.encode(sample).latents for sample in crops])  # (n, C, h, w)
    std = images.accelerator.reduce(latents.std(), "mean").item()
    has_spread = std > 0  # false for NaN, too
    if not has_spread:
        raise ValueError("Latents must differ, but all are equal. Use other images, or a trained SVQVAE.")
    vqvae.register_to_config(scaling_factor=1 / std)


def make_pipeline(vqvae: SVQVAE, denoiser: DiTTransformer2DModel, label_names: Sequence[str]) -> DiTPipeline:
    """Pipeline of the denoiser, with the names of its classes."""
    check_label_names(label_names)
    names = {str(label): name for label, name in enumerate(label_names)}
    pipeline = DiTPipeline(transformer=denoiser, vae=vqvae, scheduler=make_noise_schedule(), id2label=names)
    pipeline.register_to_config(id2label=names)
    return pipeline


def check_label_names(names: Sequence[str]) -> None:
    """Raises unless `DiTPipeline.get_label_ids` finds each class by its name.

    It splits names at commas, and would take the last of several classes with an equal part.

    Raises:
        ValueError: If two classes share a part.
    """
    class_of_part: dict[str, str] = {}
    for name in names:
        for part in name.split(","):
            part = part.strip()
            first_class = class_of_part.setdefault(part, name)
            if first_class != name:
                raise ValueError(
                    "Names of classes must differ in each part between commas, because `DiTPipeline` finds a class by "
                    f"any part, but `{first_class}` and `{name}` share `{part}`. Rename one."
                )


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
    if isinstance(feature, datasets.ClassLabel) and feature.num_classes <= NUM_CLASSES:
        return feature.names
    has_labels = feature is not None
    has_integers = isinstance(feature, datasets.Value) and "int" in feature.dtype
    if not has_labels or has_integers:
        return []
    raise ValueError(f"`--label_column` must hold integers, or at most {NUM_CLASSES} classes, but it holds {feature}.")


def sample_call(options: DiffusionOptions, pipeline: DiTPipeline) -> dict[str, Any]:
    """Arguments of the pipeline's call for the images of a validation: each class in turn."""
    count = options.num_validation_images
    steps = options.num_inference_steps
    if options.label_column is None:
        return {"class_labels": [NUM_CLASSES] * count, "guidance_scale": 1.0, "num_inference_steps": steps}
    num_names = len(pipeline.config.id2label)
    class_labels = list(range(count))
    if num_names:
        class_labels = [index % num_names for index in range(count)]
    return {"class_labels": class_labels, "num_inference_steps": steps}


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
    names = list(pipeline.config.id2label.values())
    if options.label_column is None:
        labels = f"[{NUM_CLASSES}], guidance_scale=1.0"
    elif names:
        first_name = names[0].partition(",")[0].strip()
        labels = f"pipeline.get_label_ids([{quote(first_name)}])"
    else:
        labels = "[0]"
    call = f"class_labels={labels}, num_inference_steps={options.num_inference_steps}"
    return generator_card(options, result, pipeline, rows, summary, call)


if __name__ == "__main__":
    run_script(train, DiffusionOptions)
