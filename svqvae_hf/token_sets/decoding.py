"""Decodes token sets to image files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from tqdm import tqdm

from svqvae_hf.data.image_sets import is_hub_set
from svqvae_hf.files.folders import Folder
from svqvae_hf.files.outputs import save_png, scale_endings
from svqvae_hf.models.context_model import ContextModel
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.parts import MANIFEST_FILE
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.image_tokens import check_memory, check_same_codebook, decode_image


class DecodedCounts(NamedTuple):
    """Numbers of images that [`detokenize_set`] has written, and that it has kept, because they were there."""

    written: int
    kept: int


def detokenize_set(
    model: SVQVAE,
    data: str | os.PathLike,
    output: str | os.PathLike,
    *,
    max_images: int | None = None,
    part: int = 0,
    num_parts: int = 1,
    overwrite: bool = False,
    context_model: ContextModel | None = None,
) -> DecodedCounts:
    """Decodes the rows of a token set to image files; row 12 at scale 1 becomes `00000012_x1.png`.

    A row whose images are all there is skipped, so a run that was interrupted can be run again.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode with the codebook of the set. Its tiling is set to the tiling of
            the set.
        data (`str` or `os.PathLike`): Folder of the set, its URL for `fsspec`, or its name on the Hub.
        output (`str` or `os.PathLike`): Folder to write to.
        max_images (`int`, *optional*): Number of rows after which to stop; all by default.
        part (`int`, defaults to 0): Number of the part to decode, from 0.
        num_parts (`int`, defaults to 1): Number of parts of about equal numbers of rows.
        overwrite (`bool`, defaults to `False`): Whether images that are there are decoded again.
        context_model ([`ContextModel`], *optional*): Context model of a set whose rows are compressed.

    Returns:
        [`DecodedCounts`]: Numbers of images written and kept.

    Raises:
        OSError: The set cannot be reached, or `output` cannot be written.
        ValueError: The set has another codebook, a row does not match the settings, a row needs more memory than is
            available, or there is no such part.
    """
    if not 0 <= part < num_parts:
        raise ValueError(f"`part` must be in [0, {num_parts - 1}] for {num_parts} parts, got {part}.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1, got {max_images}.")
    name = os.fspath(data)
    settings = read_settings(name)
    check_same_codebook(model, settings)
    folder = Folder(f"hf://datasets/{name}" if is_hub_set(name) else name)
    files = _files(folder)
    total = sum(rows for _, rows in files)
    stop = total if max_images is None else min(max_images, total)
    wanted = range(part * stop // num_parts, (part + 1) * stop // num_parts)
    written = kept = 0
    for index, row in tqdm(_rows(folder, files, wanted), total=len(wanted), unit="image", disable=None):
        tokens = row_tokens(row, settings, context_model)
        paths = [Path(output, f"{index:08}{ending}") for ending in scale_endings(tokens.scales)]
        if not overwrite and all(path.exists() for path in paths):
            kept += len(paths)
            continue
        largest = max(1, *tokens.scales)
        model.tile_if_large(largest * tokens.height, largest * tokens.width, settings.tile_size, settings.overlap)
        check_memory(model, largest * tokens.height, largest * tokens.width)
        for image, path in zip(decode_image(model, tokens), paths, strict=True):
            save_png(image, path)
            written += 1
    return DecodedCounts(written, kept)


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
            with folder.open(name) as opened:
                file, first = pq.ParquetFile(opened), start
                for group in range(file.num_row_groups):
                    stop = first + file.metadata.row_group(group).num_rows
                    if first < wanted.stop and stop > wanted.start:
                        numbered = enumerate(file.read_row_group(group).to_pylist(), first)
                        yield from ((index, row) for index, row in numbered if index in wanted)
                    first = stop
        start += rows
