"""Makes a token set from an image set, part by part: ids in Parquet files, which `datasets` reads."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from svqvae_files.folders import Folder
from svqvae_files.outputs import check_new_folder, scale_endings
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.hub.origin import find_origin
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.cards import token_set_card
from svqvae_hf.token_sets.crops import CROPS, is_whole, read_crops
from svqvae_hf.token_sets.encoder import RowEncoder
from svqvae_hf.token_sets.parts import (
    RECORDS,
    SKIPPED_FILE,
    PartRecord,
    add_up,
    complete_set,
    delete_set,
    is_finished,
    read_options,
    record_name,
    start_set,
)
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.token_sets.shards import row_features, write_shards
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.encoding import encoding_of

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
        lines = [f"resumed: {self.resumed:,} of {self.parts:,} parts were there"] if self.resumed else []
        lines.append(f"written  {self.out} (images: {self.images}, rows: {self.rows}, files: {self.files})")
        if self.enlarged:
            lines.append(f"enlarged {self.out} (images smaller than their crops: {self.enlarged})")
        if not self.complete:
            lines.append(f"waiting  for other parts, see svqvae info {self.out}")
        elif self.skipped:
            lines.append(f"skipped  {self.out}/{SKIPPED_FILE} (unreadable images: {self.skipped})")
        return "\n".join(lines)


def tokenize_set(
    model: SVQVAE,
    images: ImageSet,
    out: str | os.PathLike,
    *,
    model_name: str,
    source_set: str | None = None,
    scales: Sequence[float] = (1.0,),
    scale_from: str = "image",
    context_model: ContextModel | None = None,
    crops: str = "whole",
    resolution: int | None = None,
    batch_size: int | None = None,
    parts: Sequence[int] | None = None,
    num_parts: int | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    license: str | None = None,
    tile_size: int | None = None,
    overlap: int | None = None,
) -> TokenizeReport:
    """Makes a token set from an image set, or some parts of it.

    Each part is a function of the image set, the options and its number, so any process on any machine may make it. A
    part that is finished is skipped; one that was interrupted is made again. The process that finishes the last part
    completes the set. On devices of one kind, the files are the same however many processes took part.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, on its device.
        images ([`ImageSet`]): Images from [`~svqvae_hf.data.image_sets.open_images`]. Unreadable ones are skipped and
            listed.
        out (`str` or `os.PathLike`): Folder to create, or its URL for `fsspec`, such as `s3://bucket/tokens`. It must
            be absent, empty, or a token set that was started with the same options.
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

    Returns:
        [`TokenizeReport`]: Numbers of images, rows and files.

    Raises:
        OSError: `out` cannot be written, or an image cannot be fetched.
        ValueError: An option is out of range, or differs from the options that the set was started with; no image can
            be read; or an image needs more memory than is available.
    """
    license = find_origin({}, {"image set": source_set}, license).license
    _check_options(crops, resolution, batch_size, num_workers)
    num_parts = count_parts(images, num_parts)
    parts = range(num_parts) if parts is None else parts
    if not all(0 <= part < num_parts for part in parts):
        raise ValueError(f"A part (`--part`) must be in [0, {num_parts - 1}], got {[*parts]!r:.80}.")
    folder = check_out(out)
    scale_endings(scales)  # `detokenize_set` names files by them
    settings = TokenSettings(
        model=model_name,
        crops=crops,
        resolution=resolution,
        context_model=None if context_model is None else context_model.fingerprint,
        **encoding_of(model, [*map(float, scales)], scale_from, model.tiles_of_call(tile_size, overlap)),
    )
    features = row_features(settings, images.features)
    stored = json.loads(settings.to_json())
    options = stored | {  # on which the files depend
        "columns": features.to_dict(),
        "images": images.length,
        "image_set": images.fingerprint,
        "parts": num_parts,
        "batch_size": batch_size,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "encoder": _digest_of_encoder(model),
    }
    if overwrite and len(parts) < num_parts:
        raise ValueError("--overwrite deletes all parts, so one process must make them. Or delete the folder first.")
    if overwrite:
        delete_set(folder)
    start_set(folder, options)
    encoder = RowEncoder(model, settings, images.features, batch_size, context_model)
    made: list[PartRecord] = []
    with tqdm(total=images.length if len(parts) == num_parts else None, unit="image", disable=None) as bar:
        for part in parts:
            if is_finished(folder, part):
                continue
            shards = images.part(part, num_parts)
            rows = itertools.chain.from_iterable(shard.read() for shard in shards)
            read = read_crops(rows, crops, resolution, num_workers)
            record = PartRecord(part, [shard.name for shard in shards])
            encoded = encoder.encode(read, record, bar.update)
            try:
                _write_part(folder, options, record, write_shards(folder, part, encoded, settings, features))
            except OSError:
                if not is_finished(folder, part):  # otherwise another process has made it and tidied up
                    raise
            made.append(record)
    name = folder.path.rpartition("/")[2]
    card = partial(
        token_set_card, repo_id=name, settings=settings, columns=features, license=license, source_set=source_set
    )
    totals = complete_set(folder, stored | {"options": options}, card)
    resumed = len(parts) - len(made)
    return TokenizeReport(folder.url, totals is not None, num_parts, resumed, **totals or add_up(made))


def _digest_of_encoder(model: SVQVAE) -> str:
    """SHA-256 in hexadecimal of the weights that make latents. Models of one name and codebook may differ in them."""
    weights = (each for part in (model.encoder, model.quant_conv) for each in part.parameters() if not each.is_meta)
    return hashlib.sha256(b"".join(each.detach().float().cpu().numpy().tobytes() for each in weights)).hexdigest()


def _write_part(folder: Folder, options: dict[str, Any], record: PartRecord, files: Iterable[dict[str, Any]]) -> None:
    """Writes the files of a part, and its record last, which marks it as finished."""
    for file in files:
        record.rows += file["rows"]
        record.ids += file.pop("ids")
        record.files.append(file)
    start_set(folder, options)  # raises if another process has meanwhile finished a part with others
    folder.write(record_name(record.part), json.dumps(dataclasses.asdict(record)).encode())


def count_parts(images: ImageSet, num_parts: int | None = None) -> int:
    """Number of parts of a token set.

    Args:
        images ([`ImageSet`]): Images.
        num_parts (`int`, *optional*): Number asked for, at most the number of images or, in a stream, of files. By
            default one per 10,000 images or per file, and at most 1,000.

    Raises:
        ValueError: There cannot be so many parts.
    """
    if num_parts is None:
        least = 1 if images.rows is None else IMAGES_PER_PART
        return min(MAX_PARTS, -(-images.max_parts // least))
    if not 1 <= num_parts <= images.max_parts:
        unit = "files" if images.rows is None else "images"
        raise ValueError(f"`num_parts` must be in [1, {images.max_parts}], the number of {unit}, got {num_parts}.")
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
    is_starting = names == {RECORDS} and all(name[0] == "." for name in folder.names(RECORDS))  # in another process
    if is_starting or (names and read_options(folder)):
        return folder
    if folder.is_local:
        check_new_folder(Path(folder.url.removeprefix("file://")))
    elif names:
        raise ValueError(f"`{folder.url}` must be a new or empty folder, but it is not empty. Choose another.")
    return folder


def _check_options(crops: str, resolution: int | None, batch_size: int | None, num_workers: int) -> None:
    least = {"batch_size": (batch_size, 1), "num_workers": (num_workers, 0), "resolution": (resolution, 1)}
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ValueError(f"`{name}` must be at least {lowest}, got {value}.")
    if crops not in CROPS:
        raise ValueError(f"`crops` must be one of {', '.join(CROPS)}, got {crops!r}.")
    if is_whole(crops) != (resolution is None):
        raise ValueError(
            f"`resolution` must be the side of the crops in pixels, got {resolution} for `crops` {crops!r}. "
            f"{'Pass it' if resolution is None else 'Leave it out'}, or choose other crops."
        )
