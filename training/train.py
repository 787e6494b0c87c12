"""Trains an SVQVAE: `python training/train.py --train_data_dir PHOTOS --output_dir OUT ...`.

With several GPUs: `accelerate launch training/train.py ...`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from svqvae_files.identity import value_digest
from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.metrics import count_codes
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.repositories import is_hub_id
from svqvae_hf.models.modeling_svqvae import SVQVAEOutput
from svqvae_hf.models.quantizer import flatten_latents
from svqvae_hf.trainer.codebook import CodebookAverage, DeadCodeReset, forget_codes, initialise_codebook
from svqvae_hf.trainer.data.crops import centre_crops
from svqvae_hf.trainer.data.held_out import check_held_out
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.identity import image_set_digests
from svqvae_hf.trainer.linear_start import start_linear
from svqvae_hf.trainer.losses.objective import Objective, Pair
from svqvae_hf.trainer.model import load_model, save_model, step_scales
from svqvae_hf.trainer.optimization import loss_scale, rescale_gradients
from svqvae_hf.trainer.options import about_split
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import Run, run_script
from svqvae_hf.trainer.tracking import ScaleStatistics, log_images, progress, rows_of_images
from svqvae_hf.trainer.train_options import TrainOptions
from svqvae_hf.trainer.validations import Validations
from svqvae_hf.trainer.weights import Weights

SCRIPT = "training/train.py"
SHOWN_IMAGES = 4
START_BATCHES = 16
RESET_BATCHES = 16  # batches of fresh crops whose latents replace dead codes; one step has too few different crops
KERNEL_NDIM = 4  # only weights of convolutions decay, so no code does
DISCRIMINATOR_LEARNING_RATE = 1e-4

logger = get_logger(__name__, log_level="INFO")


def train(run: Run[TrainOptions]) -> None:
    """Trains an SVQVAE, from the start or from a checkpoint, and saves it with its card in the output folder."""
    options = run.options
    accelerator = run.accelerator

    # Model and images
    vqvae = load_model(options).to(accelerator.device)
    pixel_range = vqvae.config["pixel_range"]
    images = ImageSource(options, accelerator, pixel_range, synthetic_fraction=options.synthetic_fraction)
    sides = [options.resolution, *options.crop_sizes]
    loader = images.loader(sides, options.max_steps, options.seed, options.gradient_accumulation_steps)
    validation_sets = open_validation_sets(options, images)
    run.identify(digests_of(images, validation_sets))
    objective = Objective(options, vqvae, mean=partial(accelerator.reduce, reduction="mean"))
    statistics = ScaleStatistics(vqvae.config["codebook_size"], by_octave=not options.scales)

    # Optimizers
    is_new_model = options.model_config_name_or_path is not None
    if run.is_new and is_new_model and options.start == "linear":
        start_new_model(options, vqvae, images)
    weights = run.train(vqvae, options.learning_rate, decayed_ndim=KERNEL_NDIM)
    model = weights.model
    accumulated_models = [model]
    codes = Codes(options, vqvae, images, weights)
    validations = remember_validations(options, vqvae, validation_sets)
    states: dict[str, Stateful] = {
        "weights": weights,
        "codebook_average": codes.codebook_average,
        "dead_codes": codes.dead_code_reset,
        "validations": validations,
        "loader": loader,
    }
    adversary: Adversary | None = None
    if objective.discriminator is not None:
        adversary = Adversary(run, objective, objective.discriminator)
        accumulated_models.append(adversary.weights.model)
        states["discriminator"] = adversary.weights
    checkpoints = run.begin(vqvae, states, loader.contents)
    batches = iter(loader)

    def validate_after(steps_done: int) -> None:
        if validation_sets:
            validate(run, weights, objective, validation_sets, validations, steps_done)

    if run.is_new:
        validate_after(0)
    for step in checkpoints.steps():
        quantize = step >= options.quantize_from
        active_adversary = adversary if objective.is_adversarial(step) else None
        if step in options.kmeans_steps:
            codes.set_by_kmeans(step)

        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(*accumulated_models):
                # Forward pass and gradients
                sample = images.to_device(batch)  # (B, 3, side, side)
                latent_side = sample.shape[-1] // vqvae.f
                scales = step_scales(options, latent_side, step)
                output = model(sample, scales, scale_from="latents", force_not_quantize=not quantize)
                pairs = objective.pairs(sample, output)
                with accelerator.autocast():
                    loss, numbers = objective(pairs, output, step)
                accelerator.backward(loss)
                if active_adversary is not None:
                    numbers |= active_adversary.backward(pairs)

                # Updates, after the last batch of a step
                if accelerator.sync_gradients:
                    old_loss_scale = loss_scale(accelerator)
                    numbers |= weights.update()
                    if active_adversary is not None:
                        numbers |= active_adversary.update(old_loss_scale)

                # Codes, outside gradient descent
                if quantize:
                    codes.follow_average(output)
                    numbers |= codes.replace_dead(output, step)
                megapixels = sample[:, 0].numel() / 1e6
                run.log.add({"loss": loss} | numbers, images=len(sample), megapixels=megapixels)
                statistics.add(scales, pairs, output.ids or [])

        if options.logs_after(step):
            summary = statistics.summary(accelerator.reduce)
            run.log.write_training(step + 1, summary | {"lr": weights.lr})
        if options.validates_after(step):
            validate_after(step + 1)
        checkpoints.after(step)

    validate_after(options.max_steps)

    # Result
    vqvae.load_state_dict(validations.weights or weights.final())
    if accelerator.is_main_process:
        rows = provenance(SCRIPT, options.max_steps, loader.share.step_size, f"crops of {options.resolution}² pixels")
        for validation_set in validation_sets:
            rows[validation_set.name] = describe_validations(validation_set, validations)
        card = make_card(options, run.result, vqvae, rows)
        run.result.publish(partial(save_model, options, vqvae), card)
    if validations.start_was_best:
        logger.info(
            "The validation before the first step was the best, so nothing has changed: the saved weights are the "
            "ones that the run started from. Train for longer, or at another `--learning_rate`."
        )


def start_new_model(options: TrainOptions, vqvae: SVQVAE, images: ImageSource) -> None:
    """Makes a new model a linear autoencoder of some crops, the same on all processes."""
    device = vqvae.device
    crops = torch.cat(list(images.fresh_crops([options.resolution], START_BATCHES)))
    start_linear(vqvae.cpu(), crops.cpu())  # in float64, which Apple's GPUs do not have
    vqvae.to(device)
    for parameter in vqvae.parameters():
        broadcast(parameter.data)  # processes have different crops


class Adversary:
    """Trains the discriminator of a run.

    Args:
        run ([`Run`]): The run.
        objective ([`Objective`]): Losses of the run.
        discriminator (`nn.Module`): Network that tells reconstructions from images.

    Attributes:
        weights ([`Weights`]): Its weights and their optimizer, whose schedule has only the steps that train it.
    """

    def __init__(self, run: Run[TrainOptions], objective: Objective, discriminator: nn.Module):
        self.accelerator = run.accelerator
        self.objective = objective
        self.discriminator = discriminator
        num_steps = run.options.max_steps - run.options.adversarial_start
        self.weights = run.train(
            discriminator, DISCRIMINATOR_LEARNING_RATE, num_steps=num_steps, decayed_ndim=KERNEL_NDIM, use_ema=False
        )
        discriminator.requires_grad_(False)  # the loss of the model needs no gradients of these weights

    def backward(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Computes the gradients of the discriminator's own loss for a batch, and returns numbers for the log."""
        self.discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            loss, numbers = self.objective.discriminator_loss(pairs, self.weights.model)
        self.accelerator.backward(loss)
        self.discriminator.requires_grad_(False)
        return numbers

    def update(self, old_loss_scale: float) -> dict[str, torch.Tensor]:
        """Updates the discriminator after the model, and returns the norm of its gradients for the log.

        Args:
            old_loss_scale (`float`): Scale of the loss before the update of the model, which may have changed it.
        """
        rescale_gradients(self.discriminator, loss_scale(self.accelerator) / old_loss_scale)
        update = self.weights.update()
        return {"discriminator_grad_norm": update["grad_norm"]}


class Codes:
    """Updates the codes of a run without gradients: by k-means, by averages of latents, and by replacing dead codes.

    Args:
        options ([`TrainOptions`]): Options.
        vqvae ([`SVQVAE`]): Model that holds the codes.
        images ([`ImageSource`]): Images whose latents become codes.
        weights ([`Weights`]): Weights of the model.
    """

    def __init__(self, options: TrainOptions, vqvae: SVQVAE, images: ImageSource, weights: Weights):
        self.options = options
        self.vqvae = vqvae
        self.quantizer = vqvae.quantize
        self.images = images
        self.weights = weights
        self.accelerator = images.accelerator
        decay_per_batch = options.codebook_decay ** (1 / options.gradient_accumulation_steps)
        self.codebook_average = CodebookAverage(vqvae.quantize, decay_per_batch).to(vqvae.device)
        self.dead_code_reset = DeadCodeReset(vqvae.quantize.size).to(vqvae.device)

    def set_by_kmeans(self, step: int) -> None:
        """Sets all codes by k-means of the latents of fresh crops, from all processes."""
        num_batches = self.options.kmeans_batches
        logger.info(f"Setting {self.quantizer.size:,} codes by k-means of {num_batches} batches of latents")
        crops = progress(self._fresh_crops(num_batches, step), "k-means: latents", num_batches)
        initialise_codebook(self.quantizer, self._latents(crops), self.options.seed)
        codebook = self.quantizer.embedding.weight
        broadcast(codebook.data)  # sums of floats may differ in their last bits between processes
        all_ids = torch.arange(len(codebook), device=codebook.device)
        self._restart_state(all_ids)

    def follow_average(self, output: SVQVAEOutput) -> None:
        """Moves each code to the moving average of its latents, with `--codebook_decay`."""
        moves_codes = 0 < self.options.codebook_decay < 1
        if not moves_codes:
            return
        ids = ids_of_all_scales(output)  # (n,)
        latents = [flatten_latents(scale_latents.detach()) for scale_latents in output.latents or []]
        mean_over_processes = partial(self.accelerator.reduce, reduction="mean")
        self.codebook_average.update(self.quantizer, torch.cat(latents), ids, mean_over_processes)  # (n, dim), (n,)

    def replace_dead(self, output: SVQVAEOutput, step: int) -> dict[str, torch.Tensor]:
        """Counts the codes of a batch. In some steps, replaces the codes that no batch has used since the last time.

        At most as many codes are replaced as one batch has latents.

        Returns:
            `dict[str, torch.Tensor]`: The number of replaced codes for the log, in steps that replace some.
        """
        options = self.options
        if not options.dead_code_reset_steps:
            return {}
        uses_of_codes = count_codes(ids_of_all_scales(output), self.quantizer.size)  # (codes,)
        self.dead_code_reset.counts += self.accelerator.reduce(uses_of_codes, "sum")
        is_last_batch_of_step = self.accelerator.sync_gradients
        is_due = (step + 1) % options.dead_code_reset_steps == 0
        if not is_last_batch_of_step or not is_due:
            return {}
        fresh_latents = self._latents(self._fresh_crops(RESET_BATCHES, step))  # (n, codebook_embed_dim)
        latents_per_batch = len(fresh_latents) // RESET_BATCHES
        replaced_ids = self.dead_code_reset.reset(self.quantizer, fresh_latents, latents_per_batch, options.seed, step)
        self._restart_state(replaced_ids)
        num_replaced = torch.tensor(float(len(replaced_ids)), device=self.accelerator.device)
        return {"reset_codes": num_replaced}

    def _fresh_crops(self, num_batches: int, step: int) -> Iterator[torch.Tensor]:
        """Crops that the run does not train on."""
        sides = [self.options.resolution, *self.options.crop_sizes]
        return self.images.fresh_crops(sides, num_batches, step)

    def _latents(self, crops: Iterable[torch.Tensor]) -> torch.Tensor:
        """Latents of crops of all processes, `(n, codebook_embed_dim)`, in the order that one process would have."""
        num_processes = self.accelerator.num_processes
        all_latents = []
        self.vqvae.eval()  # without dropout
        for sample in crops:
            with torch.no_grad(), self.accelerator.autocast():
                latents = self.vqvae.encode(sample).latents.float()  # (B, C, h, w)
                gathered = self.accelerator.gather(latents)  # (processes * B, C, h, w)
            by_process = gathered.unflatten(0, (num_processes, -1))  # (processes, B, C, h, w)
            in_order = by_process.transpose(0, 1).flatten(0, 1)  # (B * processes, C, h, w)
            all_latents.append(flatten_latents(in_order))
        self.vqvae.train()
        return torch.cat(all_latents)

    def _restart_state(self, replaced_ids: torch.Tensor) -> None:
        """Starts the averages and the optimizer's moments of replaced codes anew."""
        self.codebook_average.restart(self.quantizer, replaced_ids)
        codebook = self.quantizer.embedding.weight
        forget_codes(self.vqvae, codebook, replaced_ids, self.weights.optimizer, self.weights.ema)


def ids_of_all_scales(output: SVQVAEOutput) -> torch.Tensor:
    """Ids `(n,)` of all scales of a batch."""
    ids = [scale_ids.flatten() for scale_ids in output.ids or []]
    return torch.cat(ids)


# Validation


@dataclass
class ValidationSet:
    """Images of one `--validation_data_dir`.

    Args:
        name (`str`): Name in the log: `validation`, `validation_2`, ...
        batches (`Sequence[torch.Tensor]`): Centre crops `(B, 3, side, side)` of its first images.
        digest (`str`): Digest of the whole set.
    """

    name: str
    batches: Sequence[torch.Tensor]
    digest: str

    @property
    def num_images(self) -> int:
        """Number of crops."""
        return sum(len(batch) for batch in self.batches)


def open_validation_sets(options: TrainOptions, images: ImageSource) -> list[ValidationSet]:
    """Opens the set of each `--validation_data_dir`.

    Raises:
        ValueError: If an image of a set is trained on.
    """
    sets = []
    for number, folder in enumerate(options.validation_data_dir, 1):
        with about_split("validation_split"):
            held_out = open_images([folder], split=options.validation_split, keep_labels=False)
        for training_set in (images.images, images.mixed):
            check_held_out(held_out, training_set)
        crops = centre_crops(held_out, options.num_validation_images, options.resolution, images.pixel_range)
        name = "validation"
        if number > 1:
            name = f"validation_{number}"
        batches = crops.split(options.per_device_train_batch_size)
        sets.append(ValidationSet(name, batches, held_out.fingerprint))
    return sets


def digests_of(images: ImageSource, validation_sets: Sequence[ValidationSet]) -> dict[str, str]:
    """Digests of all sets of a run, by the option that names each."""
    digests = image_set_digests(images)
    if validation_sets:
        validation_digests = [validation_set.digest for validation_set in validation_sets]
        digests["validation_data_dir"] = value_digest(validation_digests)
    return digests


def remember_validations(
    options: TrainOptions, vqvae: SVQVAE, validation_sets: Sequence[ValidationSet]
) -> Validations:
    """Memory of a run's validations. A resumed run must measure the same sets at the same scales."""
    measured: list[Any] = []
    for validation_set in validation_sets:
        measured.append((validation_set.name, validation_set.num_images, validation_set.digest))
    measured.append(options.validation_scales)
    return Validations(vqvae, options.load_best_model_at_end, measured)


def validate(
    run: Run[TrainOptions],
    weights: Weights,
    objective: Objective,
    sets: Sequence[ValidationSet],
    validations: Validations,
    steps_done: int,
) -> None:
    """Measures each set, remembers and logs the numbers, and logs a picture of the first set's first images."""
    measured = {}  # by the names of the sets
    with weights.evaluating():
        for validation_set in sets:
            measured[validation_set.name] = measure(run, weights, objective, validation_set, steps_done)
        numbers = {name: measurement.numbers for name, measurement in measured.items()}
        ids = {name: measurement.ids for name, measurement in measured.items()}
        validations.add(steps_done, numbers, ids)
    for set_name, measurement in measured.items():
        logged = {f"{set_name}/{number_name}": value for number_name, value in measurement.numbers.items()}
        run.log.write(steps_done, logged)
    if run.accelerator.is_main_process:
        first_set = sets[0]
        log_reconstructions(run, measured[first_set.name].shown, steps_done)


def log_reconstructions(run: Run[TrainOptions], shown: list[Pair], steps_done: int) -> None:
    """Logs a picture with a row per image: the image, and its reconstruction at each scale.

    Args:
        run ([`Run`]): The run.
        shown (`list[Pair]`): Images and their reconstructions, at each scale.
        steps_done (`int`): Steps before the validation.
    """
    columns = ["image"]
    for scale in run.options.validation_scales:
        columns.append(f"x{scale:g}")
    num_rows = len(shown[0].target)
    folder = Path(run.options.output_dir, "samples")
    log_images(run.accelerator, rows_of_images(shown), columns * num_rows, len(columns), folder, steps_done)


@dataclass
class Measured:
    """Measurement of one validation set.

    Args:
        numbers (`dict[str, float]`): Statistics of each scale, by name.
        ids (`torch.Tensor` of shape `(n,)`): All ids, scale by scale, so that their order does not depend on batches.
        shown (`list[Pair]`): The first images at each scale.
    """

    numbers: dict[str, float]
    ids: torch.Tensor
    shown: list[Pair]


def measure(
    run: Run[TrainOptions], weights: Weights, objective: Objective, validation_set: ValidationSet, steps_done: int
) -> Measured:
    """Reconstructs the images of a validation set at each scale, and compares them."""
    scales = run.options.validation_scales
    first_quantised_step = run.options.quantize_from
    quantize = first_quantised_step == 0 or steps_done > first_quantised_step
    statistics = ScaleStatistics(objective.codebook.weight.shape[0], by_octave=False)
    ids_by_scale: list[list[torch.Tensor]] = [[] for _ in scales]  # for each scale, the flat ids of each batch
    shown: list[Pair] = []
    for batch in validation_set.batches:
        sample = batch.to(run.accelerator.device)  # (B, 3, side, side)
        output = weights.model(sample, scales, scale_from="latents", force_not_quantize=not quantize)
        pairs = [clamp(pair) for pair in objective.pairs(sample, output)]
        statistics.add(scales, pairs, output.ids or [])
        if output.ids:  # empty if the batch was not quantised
            for ids_of_scale, batch_ids in zip(ids_by_scale, output.ids, strict=True):
                ids_of_scale.append(batch_ids.flatten().cpu())
        if not shown:
            shown = [pair.first(SHOWN_IMAGES) for pair in pairs]
    numbers = statistics.summary(run.accelerator.reduce)
    return Measured(numbers, _flatten(ids_by_scale), shown)


def _flatten(ids_by_scale: list[list[torch.Tensor]]) -> torch.Tensor:
    """All ids, scale by scale, `(n,)`; none if no batch was quantised."""
    all_ids = [torch.empty(0, dtype=torch.int64)]
    for ids_of_scale in ids_by_scale:
        all_ids += ids_of_scale
    return torch.cat(all_ids)


def clamp(pair: Pair) -> Pair:
    """A pair whose reconstruction is limited to the range of pixels."""
    return pair._replace(output=pair.output.clamp(0, 1))


def describe_validations(validation_set: ValidationSet, validations: Validations) -> str:
    """Numbers of a set in the validation that was chosen and in the first one, as text for the card."""
    chosen = list_numbers(validations.chosen[validation_set.name])
    first = list_numbers(validations.first[validation_set.name])
    return (
        f"{validation_set.num_images} images, centre crops: {chosen} after step {validations.step:,}; "
        f"{first} in the first validation"
    )


def list_numbers(numbers: dict[str, float]) -> str:
    """Numbers with their names, separated by commas."""
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def make_card(options: TrainOptions, result: Result, vqvae: SVQVAE, rows: dict[str, str]) -> str:
    """Card of the model."""
    hub_sets = []
    if options.dataset_name is not None and is_hub_id(options.dataset_name):
        hub_sets.append(options.dataset_name)
    return model_card(
        vqvae.config,
        repo_id=result.name,
        license=result.origin.license,
        base_model=result.origin.base_model,
        datasets=hub_sets,
        provenance=rows | result.origin.rows,
    )


if __name__ == "__main__":
    run_script(train, TrainOptions)
