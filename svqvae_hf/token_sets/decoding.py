"""Decodes token sets to image files."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from svqvae_hf.data.image_sets import is_hub_set
from svqvae_hf.files.folders import Folder
from svqvae_hf.files.outputs import save_png, scale_endings
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.manifest import MANIFEST_FILE
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.image_tokens import check_memory, check_same_codebook, configure_tiling, decode_image

ROWS_AT_ONCE = 64


def detokenize_set(
    model: SVQVAE,
    data: str | os.PathLike,
    output: str | os.PathLike,
    *,
    max_images: int | None = None,
    part: int = 0,
    num_parts: int = 1,
    overwrite: bool = False,
) -> int:
    """Decodes the rows of a token set to image files; row 12 at scale 1 becomes `00000012_x1.png`.

    A row whose scale was chosen by `min_psnr` or `max_bits` becomes one image, at this scale.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode with the codebook of the set. Its tiling is set to the tiling of
            the set.
        data (`str` or `os.PathLike`): Folder of the set, its URL for `fsspec`, or its name on the Hub.
        output (`str` or `os.PathLike`): Folder to write to.
        max_images (`int`, *optional*): Number of rows after which to stop; all by default.
        part (`int`, defaults to 0): Number of the part to decode, from 0.
        num_parts (`int`, defaults to 1): Number of parts of about equal numbers of rows.
        overwrite (`bool`, defaults to `False`): Whether images that exist are replaced.

    Returns:
        `int`: Number of images written.

    Raises:
        OSError: The set cannot be reached, or `output` cannot be written.
        ValueError: The set has another codebook, a row does not match the settings, a row needs more memory than is
            available, an image exists, or there is no such part.
    """
    if not 0 <= part < num_parts:
        raise ValueError(f"`part` must be in [0, {num_parts - 1}] for {num_parts} parts, got {part}.")
    name = os.fspath(data)
    settings = read_settings(name)
    check_same_codebook(model, settings)
    endings = scale_endings(settings.scales)
    folder = Folder(f"hf://datasets/{name}" if is_hub_set(name) else name)
    files = _files(folder)
    total = sum(rows for _, rows in files)
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1, got {max_images}.")
    stop = total if max_images is None else min(max_images, total)
    wanted = range(part * stop // num_parts, (part + 1) * stop // num_parts)
    if not overwrite:
        _check_absent(Path(output), endings, wanted)
    configure_tiling(model, settings.tile_size, settings.overlap)
    written = 0
    for index, row in tqdm(_rows(folder, files, wanted), total=len(wanted), unit="image", disable=None):
        tokens = row_tokens(row, settings)
        check_memory(model, tokens.height, tokens.width, tokens.scales, encodes=False)
        for image, ending in zip(decode_image(model, tokens), scale_endings(tokens.scales), strict=True):
            save_png(image, Path(output, f"{index:08}{ending}"))
            written += 1
    return written


def _files(folder: Folder) -> list[tuple[str, int]]:
    """Parquet files of a set in its order, each with its number of rows."""
    manifest = folder.read(MANIFEST_FILE)
    if manifest is None:
        raise ValueError(f"`{folder.url}` must have a {MANIFEST_FILE}, but has none. Make it with `svqvae tokenize`.")
    try:
        return [(file["name"], file["rows"]) for line in manifest.splitlines() for file in json.loads(line)["files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{MANIFEST_FILE}` in `{folder.url}` is damaged. Fetch or make the set again.") from error


def _rows(folder: Folder, files: list[tuple[str, int]], wanted: range) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the wanted rows with their numbers. Only files and row groups that have some are read."""
    start = 0
    for name, rows in files:
        if start < wanted.stop and start + rows > wanted.start:
            with folder.open(name) as file:
                yield from _rows_of(pq.ParquetFile(file), start, wanted)
        start += rows


def _rows_of(file: pq.ParquetFile, start: int, wanted: range) -> Iterator[tuple[int, dict[str, Any]]]:
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if start < wanted.stop and start + rows > wanted.start:
            first = start
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                numbered = enumerate(batch.to_pylist(), first)
                yield from ((index, row) for index, row in numbered if index in wanted)
                first += batch.num_rows
        start += rows


def _check_absent(output: Path, endings: list[str], wanted: range) -> None:
    pattern = re.compile(rf"(\d+)({'|'.join(map(re.escape, endings))})")
    for path in output.glob("*.png"):
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) in wanted:
            raise ValueError(f"`{path}` already exists. Pass --overwrite, or use another --output.")
