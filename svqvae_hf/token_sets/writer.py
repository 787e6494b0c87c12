"""Makes a token set from an image set, part by part: ids in Parquet files, which `datasets` reads."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import align_module_device
from tqdm import tqdm

from svqvae_files.folders import Folder
from svqvae_files.identity import value_digest
from svqvae_files.outputs import check_new_folder, scale_endings
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.hub.origin import find_origin, stated_license
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.cards import token_set_card
from svqvae_hf.token_sets.crops import CROPS, is_whole, read_crops
from svqvae_hf.token_sets.encoder import RowEncoder
from svqvae_hf.token_sets.manifest import PartRecord
from svqvae_hf.token_sets.parts import (
    RECORDS,
    SKIPPED_FILE,
    add_up,
    check_options,
    complete_set,
    delete_set,
    is_finished,
    read_options,
    restore_options,
    start_set,
    unfinished_parts,
    write_record,
)
from svqvae_hf.token_sets.settings import TokenSettings, lost_file_error
from svqvae_hf.token_sets.shards import row_features, write_shards
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.encoding import encoding_of

logger = logging.getLogger(__name__)

IMAGES_PER_PART = 10_000  # by default, in sets with random access
MAX_PARTS = 1000  # by default


@dataclass(frozen=True)
class TokenizeReport:
    """Summary of a run; `str` formats it.

    Args:
        out (`str`): Folder of the set.
        complete (`bool`): Whether the set is complete. If so, the numbers count the whole set, otherwise this run.
        parts (`int`): Number of parts.
        resumed (`int`): Parts that were finished before this run, and were skipped.
        images (`int`): Number of images, including the skipped ones.
        rows (`int`): Number of rows.
        ids (`int`): Number of ids of all scales.
        files (`int`): Number of Parquet files.
        skipped (`int`): Number of images that could not be read.
        enlarged (`int`): Number of images that are smaller than their crops.
    """

    out: str
    complete: bool
    parts: int
    resumed: int
    images: int
    rows: int
    ids: int
    files: int
    skipped: int
    enlarged: int

    def __str__(self) -> str:
        lines = []
        if self.resumed:
            lines.append(f"resumed: {self.resumed:,} of {self.parts:,} parts were there")
        lines.append(f"written  {self.out} (images: {self.images}, rows: {self.rows}, files: {self.files})")
        if self.enlarged:
            lines.append(f"enlarged {self.out} (images smaller than their crops: {self.enlarged})")
        if not self.complete:
            lines.append(f"missing  other parts of the set, see svqvae info {self.out}")
        elif self.skipped:
            lines.append(f"skipped  {self.out}/{SKIPPED_FILE} (unreadable images: {self.skipped})")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """Options of [`tokenize_set`].

    Args:
        model_name (`str`): Hub id of the model, or the name of its folder, for the settings and the card.
        source_set (`str`, *optional*): Name of the image set on the Hub, for the card.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Output side over input side, one column of ids each.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_tokens`].
        context_model ([`ContextModel`], *optional*): Context model of the tokenizer, to compress each row.
        crops (`str`, defaults to `"whole"`): Crops of an image that become rows, a key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.
        batch_size (`int`, *optional*): Crops of equal size that are encoded together. With 1, the ids equal
            [`SVQVAE.encode_tokens`] of one image. With more, a few may differ, because sums are rounded differently.
            By default 64, or fewer if these have more than a megapixel in all.
        parts (`Sequence[int]`, *optional*): Numbers of the parts to make, from 0; all by default.
        num_parts (`int`, *optional*): Number of parts, see [`count_parts`].
        num_workers (`int`, defaults to 0): Processes that read and crop images; with 0, this process does.
        overwrite (`bool`, defaults to `False`): Whether to delete a token set in the folder first.
        license (`str`, *optional*): Licence of the images, by the Hub's identifier, for the card; by default, the
            licence of `source_set`.
        tile_size (`int`, *optional*): Tile size for all images, as in
            [`~svqvae_hf.tokens.image_tokens.choose_tiles`].
        overlap (`int`, *optional*): Overlap for all images.

    Raises:
        ValueError: An option is out of range.
    """

    model_name: str
    source_set: str | None = None
    scales: Sequence[float] = (1.0,)
    scale_from: str = "image"
    context_model: ContextModel | None = None
    crops: str = "whole"
    resolution: int | None = None
    batch_size: int | None = None
    parts: Sequence[int] | None = None
    num_parts: int | None = None
    num_workers: int = 0
    overwrite: bool = False
    license: str | None = None
    tile_size: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        _check_least("batch_size", self.batch_size, 1)
        _check_least("num_workers", self.num_workers, 0)
        _check_least("resolution", self.resolution, 1)
        if self.crops not in CROPS:
            raise ValueError(f"`crops` must be one of {', '.join(CROPS)}, got {self.crops!r}.")
        if self.resolution is None and not is_whole(self.crops):
            raise self._resolution_error("Pass it, or choose other crops.")
        if self.resolution is not None and is_whole(self.crops):
            raise self._resolution_error("Leave it out, or choose other crops.")
        scale_endings(self.scales)  # raises if two scales would name the same file when the set is decoded

    def _resolution_error(self, advice: str) -> ValueError:
        """Error for a resolution that does not go with the crops."""
        return ValueError(
            f"`resolution` must be the side of the crops in pixels, got {self.resolution} for `crops` {self.crops!r}. "
            f"{advice}"
        )


def _check_least(name: str, value: int | None, least: int) -> None:
    """Raises ValueError if a number is given and too small."""
    if value is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def tokenize_set(model: SVQVAE, images: ImageSet, out: str | os.PathLike, **options: Any) -> TokenizeReport:
    """Makes a token set from an image set, or some parts of it.

    Each part is a function of the image set, the options and its number, so any process on any machine may make it. A
    part that is finished is skipped; one that was interrupted is made again. The process that finishes the last part
    completes the set. On devices of one kind, with the same number of threads per process, the files are the same
    however many processes took part.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, on its device.
        images ([`ImageSet`]): Images from [`~svqvae_hf.data.image_sets.open_images`]. Unreadable ones are skipped and
            listed.
        out (`str` or `os.PathLike`): Folder to create, or its URL for `fsspec`, such as `s3://bucket/tokens`. It must
            be absent, empty, or a token set that was started with the same options.
        **options: Fields of [`TokenizeOptions`]. `model_name` is required.

    Returns:
        [`TokenizeReport`]: Numbers of images, rows and files.

    Raises:
        OSError: `out` cannot be written, or an image cannot be fetched.
        ValueError: An option is out of range, or differs from the options that the set was started with; a file of the
            set is damaged; no image can be read; or an image needs more memory than is available.
    """
    plan = plan_set(model, images, out, TokenizeOptions(**options))
    request = plan.request
    restore_options(plan.folder, plan.options)
    if request.overwrite:
        delete_set(plan.folder)
    start_set(plan.folder, plan.options)
    encoder = RowEncoder(model, plan.settings, images.features, request.batch_size, request.context_model)
    records = []
    makes_all_parts = len(plan.parts) == plan.num_parts
    num_images = images.length if makes_all_parts else None
    with tqdm(total=num_images, unit="image", disable=None) as bar:
        for part in unfinished_parts(plan.folder, plan.options, plan.parts):
            begun = time.monotonic()
            record = make_part(plan, images, encoder, part, bar.update)
            records.append(record)
            seconds = time.monotonic() - begun
            logger.info(_finished_part_line(plan, record, seconds))
    totals = finish_set(plan)
    is_complete = totals is not None
    if totals is None:
        totals = add_up(records)  # of this run
    num_made = len(records)  # the other parts were finished before
    return TokenizeReport(
        out=plan.folder.url,
        complete=is_complete,
        parts=plan.num_parts,
        resumed=len(plan.parts) - num_made,
        **totals,
    )


@dataclass(frozen=True)
class SetPlan:
    """What a run makes.

    Args:
        request ([`TokenizeOptions`]): What was asked for.
        folder ([`Folder`]): Folder of the set.
        settings ([`TokenSettings`]): What all rows share.
        features (`datasets.Features`): Columns of the set.
        options (`dict[str, Any]`): All on which the files depend, as JSON holds it.
        num_parts (`int`): Number of parts of the set.
        parts (`Sequence[int]`): Numbers of the parts that this run makes.
        license (`str`, *optional*): Licence of the images.
        model_license (`str`, *optional*): Licence of the tokenizer, if its card states one.
    """

    request: TokenizeOptions
    folder: Folder
    settings: TokenSettings
    features: datasets.Features
    options: dict[str, Any]
    num_parts: int
    parts: Sequence[int]
    license: str | None
    model_license: str | None


def plan_set(model: SVQVAE, images: ImageSet, out: str | os.PathLike, request: TokenizeOptions) -> SetPlan:
    """Plans a run, and writes nothing.

    Raises:
        OSError: `out` cannot be reached.
        ValueError: An option is out of range, or `out` has something else in it.
    """
    license = find_origin({}, {"image set": request.source_set}, request.license).license
    model_license = stated_license(model.config.get("_name_or_path"))
    num_parts = count_parts(images, request.num_parts)
    parts: Sequence[int] = range(num_parts)
    if request.parts is not None:
        parts = request.parts
    for part in parts:
        if not 0 <= part < num_parts:
            raise ValueError(
                f"A part (`--part`) must be in [0, {num_parts - 1}], because the set has {num_parts:,} in all, got "
                f"{list(parts)!r:.80}. For more parts, pass `--num-parts`."
            )
    if request.overwrite and len(parts) < num_parts:
        raise ValueError("--overwrite deletes all parts, so one process must make them. Or delete the folder first.")
    folder = check_out(out)
    scales = [float(scale) for scale in request.scales]
    tiles = model.tiles_of_call(request.tile_size, request.overlap)
    context_model = None
    if request.context_model is not None:
        context_model = request.context_model.fingerprint
    settings = TokenSettings(
        model=request.model_name,
        crops=request.crops,
        resolution=request.resolution,
        context_model=context_model,
        **encoding_of(model, scales, request.scale_from, tiles),
    )
    features = row_features(settings, images.features)
    options = settings.to_record() | {
        "columns": features.to_dict(),
        "images": images.length,
        "image_set": images.fingerprint,
        "image_files": images.files_digest,
        "parts": num_parts,
        "batch_size": request.batch_size,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "encoder": encoder_digest(model),
    }
    options = json.loads(json.dumps(options))  # as they will be read, with lists for tuples
    return SetPlan(request, folder, settings, features, options, num_parts, parts, license, model_license)


def make_part(
    plan: SetPlan, images: ImageSet, encoder: RowEncoder, part: int, on_image: Callable[[], object]
) -> PartRecord:
    """Writes the files of a part, and then its record, which marks it as finished.

    Args:
        plan ([`SetPlan`]): The set.
        images ([`ImageSet`]): Its images.
        encoder ([`RowEncoder`]): Makes the rows.
        part (`int`): Number of the part.
        on_image (`Callable`): Called after each image.

    Returns:
        [`PartRecord`]: The record.

    Raises:
        OSError: A file cannot be written, or an image cannot be fetched.
        ValueError: Another process has meanwhile started the set anew with other options; or an image needs more
            memory than is available.
    """
    image_parts = images.part(part, plan.num_parts)
    names = [image_part.name for image_part in image_parts]
    record = PartRecord(part, value_digest(plan.options), read=names)
    # These are iterators: nothing is read until `_write_part` takes rows, so only few images are in memory.
    image_rows = chain.from_iterable(image_part.read() for image_part in image_parts)
    cropped_images = read_crops(image_rows, plan.request.crops, plan.request.resolution, plan.request.num_workers)
    token_rows = encoder.encode(cropped_images, record, on_image)  # counts images in the record
    try:
        _write_part(plan, token_rows, record)
    except OSError:
        # Another process may make the same part. If it completes the set first, it deletes the temporary files of this
        # process. That is no failure, because the part is finished. The record of this process is not stored then, and
        # only counts in the summary of the run.
        if not is_finished(plan.folder, plan.options, part):
            raise
    return record


def _write_part(plan: SetPlan, rows: Iterator[dict[str, Any]], record: PartRecord) -> None:
    """Writes the rows of a part to files, enters the files in its record, and then writes the record."""
    for written in write_shards(plan.folder, record.part, rows, plan.settings, plan.features):
        record.files.append(written.file)
        record.rows += written.file.rows
        record.ids += written.num_ids
    check_options(plan.folder, plan.options)
    write_record(plan.folder, record)


def _finished_part_line(plan: SetPlan, record: PartRecord, seconds: float) -> str:
    """Line of a log about a part that a run has finished after some seconds."""
    number = plan.parts.index(record.part) + 1  # among the parts of this run, which are made in this order
    num_parts_of_run = len(plan.parts)
    images_per_second = record.images / seconds
    return (
        f"finished part {record.part}, {number:,} of {num_parts_of_run:,} in this run (images: {record.images}, "
        f"rows: {record.rows}, images per second: {images_per_second:.1f})"
    )


def finish_set(plan: SetPlan) -> dict[str, int] | None:
    """Completes a set if all its parts are finished. Returns its totals, or `None` if it is not complete."""
    _, _, folder_name = plan.folder.path.rpartition("/")
    card = partial(
        token_set_card,
        repo_id=folder_name,  # as the name on the Hub is not known
        settings=plan.settings,
        columns=plan.features,
        license=plan.license,
        model_license=plan.model_license,
        source_set=plan.request.source_set,
    )
    content = json.loads(plan.settings.to_json()) | {"options": plan.options}
    return complete_set(plan.folder, content, card)


def encoder_digest(model: SVQVAE) -> str:
    """SHA-256 in hexadecimal of the config and the weights that make latents.

    Models of one name and codebook may differ in them.
    """
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    digest = hashlib.sha256()
    digest.update(value_digest(config).encode())
    for module in (*model.encoder.modules(), *model.quant_conv.modules()):
        with align_module_device(module):  # loads the weights that accelerate has offloaded
            for weight in module.parameters(recurse=False):
                array = weight.detach().to("cpu", torch.float32).numpy()
                digest.update(array.tobytes())
    return digest.hexdigest()


def count_parts(images: ImageSet, num_parts: int | None = None) -> int:
    """Number of parts of a token set.

    Args:
        images ([`ImageSet`]): Images.
        num_parts (`int`, *optional*): Number asked for, at most the number of images or, in a stream, of files. By
            default one per 10,000 images or per file, and at most 1,000.

    Raises:
        ValueError: There cannot be so many parts.
    """
    is_stream = images.rows is None
    unit = "files" if is_stream else "images"  # of which parts consist, and which `max_parts` counts
    if num_parts is None:
        if is_stream:
            return min(MAX_PARTS, images.max_parts)
        return min(MAX_PARTS, math.ceil(images.max_parts / IMAGES_PER_PART))
    if not 1 <= num_parts <= images.max_parts:
        message = f"`--num-parts` must be in [1, {images.max_parts}], the number of {unit}, got {num_parts}."
        if is_stream and num_parts > images.max_parts:
            message += f" A part reads whole files. Pass at most {images.max_parts}, or pack the images in more files."
        raise ValueError(message)
    return num_parts


def check_out(out: str | os.PathLike) -> Folder:
    """Raises unless a folder can become a token set: it is absent or empty, or a token set was started in it.

    Args:
        out (`str` or `os.PathLike`): Folder, or its URL for `fsspec`.

    Returns:
        [`Folder`]: The folder.

    Raises:
        OSError: The folder cannot be reached.
        ValueError: It has something else in it, or cannot be written.
    """
    folder = Folder(out)
    names = folder.names("")
    is_token_set = len(names) > 0 and read_options(folder) is not None
    has_lost_options = lost_file_error(folder) is not None  # `restore_options` writes them again
    if is_token_set or has_lost_options:
        return folder
    # If another process starts the same set at this moment, there is only a subfolder with its temporary file.
    is_being_started = names == {RECORDS} and _has_only_hidden_files(folder, RECORDS)
    if is_being_started:
        return folder
    if folder.is_local:
        check_new_folder(Path(folder.url.removeprefix("file://")))  # raises if the folder is not empty
        return folder
    if names:
        raise ValueError(f"`{folder.url}` must be a new or empty folder, but it is not empty. Choose another.")
    return folder


def _has_only_hidden_files(folder: Folder, subfolder: str) -> bool:
    """Whether all files in a subfolder are hidden, as temporary files are; also if there are none."""
    return all(name.startswith(".") for name in folder.names(subfolder))
