"""Validation of an SVQVAE: opens the sets, measures their reconstructions, and logs numbers and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.logging import get_logger

from svqvae_files.identity import value_digest
from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.trainer.data.crops import centre_crops
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.identity import image_set_digests
from svqvae_hf.trainer.losses.objective import Objective, Pair
from svqvae_hf.trainer.options import about_split
from svqvae_hf.trainer.run import Run
from svqvae_hf.trainer.tracking import ScaleStatistics, log_images, rows_of_images
from svqvae_hf.trainer.train_options import TrainOptions
from svqvae_hf.trainer.validations import Validations, mean_psnr
from svqvae_hf.trainer.weights import Weights

SHOWN_IMAGES = 4
LARGE_LOSS = 0.5  # dB of a validation set
ADVICE = '"Lose less on photographs" in docs/your_own_pictures.md.'

logger = get_logger(__name__, log_level="INFO")


@dataclass
class ValidationSet:
    """Images of one `--validation_data_dir`.

    Args:
        name (`str`): Name in the log: `validation`, `validation_2`, ...
        batches (`Sequence[torch.Tensor]`): Centre crops `(B, 3, side, side)` of its first images.
        num_skipped (`int`): Number of images among them that cannot be read.
        digest (`str`): Digest of the whole set.
    """

    name: str
    batches: Sequence[torch.Tensor]
    num_skipped: int
    digest: str

    @property
    def num_images(self) -> int:
        """Number of crops."""
        return sum(len(batch) for batch in self.batches)


def open_validation_sets(options: TrainOptions, images: ImageSource) -> list[ValidationSet]:
    """Opens the set of each `--validation_data_dir`.

    Raises:
        ValueError: If an image of a set is trained on, or a set has no readable image.
    """
    sets = []
    for number, folder in enumerate(options.validation_data_dir, 1):
        with about_split("validation_split"):
            held_out = open_images(
                [folder], split=options.validation_split, keep_labels=False, results=options.output_dir
            )
        images.check_held_out(held_out)
        crops = centre_crops(held_out, options.num_validation_images, options.resolution, images.pixel_range)
        for key, reason in crops.skipped:
            logger.warning(f"Skipped `{key}` of `{folder}`: {reason}")
        if len(crops.sample) == 0:
            raise ValueError(
                f"`--validation_data_dir` must hold at least one readable image, but `{folder}` holds none."
            )
        name = "validation"
        if number > 1:
            name = f"validation_{number}"
        batches = crops.sample.split(options.per_device_train_batch_size)
        sets.append(ValidationSet(name, batches, len(crops.skipped), held_out.fingerprint))
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
    measured = {
        "validation_data_dir": [validation_set.digest for validation_set in validation_sets],
        "num_validation_images": options.num_validation_images,
        "validation_scales": options.validation_scales,
    }
    return Validations(vqvae, options.load_best_model_at_end, measured)


def validate(
    run: Run[TrainOptions],
    weights: Weights,
    objective: Objective,
    sets: Sequence[ValidationSet],
    validations: Validations,
    steps_done: int,
) -> None:
    """Measures each set, remembers and logs the numbers, and logs a picture of images of each set."""
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
        log_reconstructions(run, measured, steps_done)


def log_reconstructions(run: Run[TrainOptions], measured: Mapping[str, "Measured"], steps_done: int) -> None:
    """Logs a picture with a row per image, set by set: the image, and its reconstruction at each scale.

    Args:
        run ([`Run`]): The run.
        measured (`Mapping[str, Measured]`): Measurement of each set, by its name.
        steps_done (`int`): Steps before the validation.
    """
    labels_of_scales = [f"reconstruction, scale {scale:g}" for scale in run.options.validation_scales]
    images: list[torch.Tensor] = []
    labels: list[str] = []
    for name, measurement in measured.items():
        images.append(rows_of_images(measurement.shown))
        num_rows = len(measurement.shown[0].target)
        labels += [f"original, {name}", *labels_of_scales] * num_rows
    num_columns = 1 + len(labels_of_scales)
    folder = Path(run.options.output_dir, "samples")
    log_images(run.accelerator, torch.cat(images), labels, num_columns, folder, steps_done)


@dataclass
class Measured:
    """Measurement of one validation set.

    Args:
        numbers (`dict[str, float]`): Statistics of each scale, by name.
        ids (`torch.Tensor` of shape `(n,)`): All ids, scale by scale, so that their order does not depend on batches.
        shown (`list[Pair]`): Some of the images at each scale, taken evenly from the set.
    """

    numbers: dict[str, float]
    ids: torch.Tensor
    shown: list[Pair]


def measure(
    run: Run[TrainOptions], weights: Weights, objective: Objective, validation_set: ValidationSet, steps_done: int
) -> Measured:
    """Reconstructs the images of a validation set at each scale, and compares them."""
    scales = run.options.validation_scales
    skips_quantizer = not quantises_after(steps_done, run.options)
    codebook_size = objective.codebook.weight.shape[0]
    statistics = ScaleStatistics(codebook_size, by_octave=False)  # each scale by itself
    ids_of_batches: list[list[torch.Tensor]] = []  # a list per batch, with the ids (B, h, w) of each scale in it
    shown_of_batches: list[list[Pair]] = []
    all_rows_shown = rows_shown(validation_set)
    for batch, batch_rows_shown in zip(validation_set.batches, all_rows_shown, strict=True):
        sample = batch.to(run.accelerator.device)  # (B, 3, side, side)
        output = weights.model(sample, scales, scale_from="latents", force_not_quantize=skips_quantizer)
        pairs = [clamp(pair) for pair in objective.pairs(sample, output)]
        ids_of_scales: list[torch.Tensor] = []
        if output.ids is not None:  # the model has quantised
            ids_of_scales = list(output.ids)
        statistics.add(scales, pairs, ids_of_scales)
        ids_of_batches.append(ids_of_scales)
        shown_of_batches.append([pair.images(batch_rows_shown) for pair in pairs])
    numbers = statistics.summary(run.accelerator.reduce)
    all_ids = join_by_scale(ids_of_batches)  # one tensor (n,)
    return Measured(numbers, all_ids, join_pairs(shown_of_batches))


def rows_shown(validation_set: ValidationSet) -> list[list[int]]:
    """Rows of each batch that are shown: at most `SHOWN_IMAGES` in all, taken evenly from the set."""
    num_shown = min(SHOWN_IMAGES, validation_set.num_images)
    numbers = [index * validation_set.num_images // num_shown for index in range(num_shown)]
    rows_of_batches = []
    start = 0  # number of the first image of the batch
    for batch in validation_set.batches:
        end = start + len(batch)
        rows_of_batches.append([number - start for number in numbers if start <= number < end])
        start = end
    return rows_of_batches


def join_pairs(pairs_of_batches: Sequence[Sequence[Pair]]) -> list[Pair]:
    """Pairs of all batches, joined at each scale."""
    joined_pairs = []
    for pairs_of_scale in zip(*pairs_of_batches, strict=True):
        target = torch.cat([pair.target for pair in pairs_of_scale])
        output = torch.cat([pair.output for pair in pairs_of_scale])
        joined_pairs.append(pairs_of_scale[0]._replace(target=target, output=output))
    return joined_pairs


def quantises_after(steps_done: int, options: TrainOptions) -> bool:
    """Whether the model quantises after some steps. The first step that quantises sets the codes, if they are new."""
    if options.quantize_from == 0:
        return True
    return steps_done > options.quantize_from


def join_by_scale(ids_of_batches: list[list[torch.Tensor]]) -> torch.Tensor:
    """All ids of all batches as one row `(n,)` on the CPU, scale by scale.

    Args:
        ids_of_batches (`list[list[torch.Tensor]]`): For each batch, the ids `(B, h, w)` of each scale; none if nothing
            was quantised.
    """
    joined_ids = [torch.empty(0, dtype=torch.int64)]
    num_scales = len(ids_of_batches[0])
    for scale_number in range(num_scales):
        for ids_of_scales in ids_of_batches:
            joined_ids.append(ids_of_scales[scale_number].flatten().cpu())
    return torch.cat(joined_ids)


def clamp(pair: Pair) -> Pair:
    """A pair whose reconstruction is limited to the range of pixels."""
    return pair._replace(output=pair.output.clamp(0, 1))


def rows_of_validations(
    validation_sets: Sequence[ValidationSet], validations: Validations, max_steps: int
) -> dict[str, str]:
    """Rows of the card: the numbers of each set and, if the run saves the weights of its start, that it does."""
    rows = {}
    if validations.start_was_best:
        rows["steps"] = (
            "0: no validation after a step was better than the one before the first step, so these are the weights "
            f"that the run of {max_steps:,} steps started from, unchanged"
        )
    for validation_set in validation_sets:
        rows[validation_set.name] = describe_validations(validation_set, validations)
    return rows


def describe_validations(validation_set: ValidationSet, validations: Validations) -> str:
    """Numbers of a set in the validation that was chosen and in the first one, as text for the card."""
    first = list_numbers(validations.first[validation_set.name])
    images = f"{validation_set.num_images} images"
    if validation_set.num_skipped > 0:
        images += f" ({validation_set.num_skipped} that cannot be read are skipped)"
    if validations.start_was_best:
        return f"{images}, centre crops: {first} before the first step"
    chosen = list_numbers(validations.chosen[validation_set.name])
    return f"{images}, centre crops: {chosen} after step {validations.step:,}; {first} in the first validation"


def list_numbers(numbers: dict[str, float]) -> str:
    """Numbers with their names, separated by commas."""
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def closing_line(options: TrainOptions, validations: Validations) -> str:
    """What the log says at the end: the PSNR of each set before and after, and which weights are saved."""
    line = "PSNR"
    if len(options.validation_scales) > 1:
        scales = [f"{scale:g}" for scale in options.validation_scales]
        line += f", mean over the scales {', '.join(scales)}"
    line += f": {describe_changes(validations)}. "
    if validations.start_was_best:
        line += "Saved: the weights that the run started from, because no later validation was better on the first "
        line += "folder. Train for longer, or at another `--learning_rate`."
        return line
    saved_step = options.max_steps
    if options.load_best_model_at_end:
        saved_step = validations.step
    line += f"Saved: the weights after step {saved_step:,}."
    losers = sets_with_loss(validations)
    starts_from_model = options.pretrained_model_name_or_path is not None
    if starts_from_model and losers:
        line += f" To lose less on {' and '.join(losers)}: {ADVICE}"
    return line


def describe_changes(validations: Validations) -> str:
    """PSNR of each set in the first and in the chosen validation, separated by semicolons."""
    changes = []
    for name, numbers in validations.chosen.items():
        before = mean_psnr(validations.first[name])
        after = mean_psnr(numbers)
        changes.append(f"{name} {before:.2f} -> {after:.2f} dB ({after - before:+.2f})")
    return "; ".join(changes)


def sets_with_loss(validations: Validations) -> list[str]:
    """Names of the sets whose PSNR has fallen by more than `LARGE_LOSS`."""
    names = []
    for name, numbers in validations.chosen.items():
        loss = mean_psnr(validations.first[name]) - mean_psnr(numbers)
        if loss > LARGE_LOSS:
            names.append(name)
    return names
