"""Decodes token sets to image files."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from svqvae_files.outputs import save_png, scale_endings
from svqvae_hf.models.checks import check_same_codebook
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.row_names import RowNames
from svqvae_hf.token_sets.settings import row_tokens
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.image_tokens import choose_tiles, decode_image


def detokenize_set(
    model: SVQVAE,
    data: str | os.PathLike,
    output: str | os.PathLike,
    *,
    max_images: int | None = None,
    keep: Callable[[list[Path]], bool] = lambda paths: False,
    writing: Callable[[list[Path]], AbstractContextManager[Any]] = nullcontext,
    context_model: ContextModel | None = None,
) -> tuple[int, int]:
    """Decodes the rows of a token set to image files.

    The row of `cat/0.png` at scale 1 becomes `cat/0_x1.png`. A row without a name, or with the name of a row before
    it, has its number: `00000012_x1.png`.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode with the codebook of the set.
        data (`str` or `os.PathLike`): Folder of the set, its URL for `fsspec`, or its name on the Hub.
        output (`str` or `os.PathLike`): Folder to write to.
        max_images (`int`, *optional*): Number of rows after which to stop; all by default.
        keep (`Callable`, *optional*): Called with the paths of a row's images. If it returns `True`, the row is
            skipped; by default none is.
        writing (`Callable`, *optional*): Called with the paths of a row's images. The images are written within the
            context that it returns.
        context_model ([`ContextModel`], *optional*): Context model of a set whose rows are compressed.

    Returns:
        `tuple[int, int]`: Numbers of images written, and of existing images kept.

    Raises:
        OSError: The set cannot be reached, or `output` cannot be written.
        ValueError: The set has another codebook; a file of it is missing, cut or foreign; a row does not match the
            settings, or needs more memory than is available.
    """
    token_set = TokenSet(data)
    settings = token_set.settings
    check_same_codebook(model, settings)
    token_set.check_files()
    endings = scale_endings(settings.scales)
    names = RowNames()
    num_written = 0
    num_kept = 0
    rows = enumerate(islice(token_set.rows(), max_images))
    for number, row in tqdm(rows, total=token_set.num_rows, unit="image", disable=None):
        name = names.next_name(number, row)
        paths = [Path(output, f"{name}{ending}") for ending in endings]
        if keep(paths):
            num_kept += len(paths)
            continue
        tokens = row_tokens(row, settings, context_model)
        tiles = choose_tiles(model, tokens.height, tokens.width, tokens.scales, settings.tile_size, settings.overlap)
        images = decode_image(model, tokens, tiles=tiles)
        with writing(paths):
            for image, path in zip(images, paths, strict=True):
                save_png(image, path)
        num_written += len(paths)
    return num_written, num_kept


def first_images(data: str | os.PathLike, output: str | os.PathLike) -> list[Path]:
    """Paths of the images that [`detokenize_set`] writes for the first row.

    Args:
        data (`str` or `os.PathLike`): Folder of the set, its URL for `fsspec`, or its name on the Hub.
        output (`str` or `os.PathLike`): Folder to write to.
    """
    token_set = TokenSet(data)
    name = RowNames().next_name(0, next(token_set.rows()))
    return [Path(output, f"{name}{ending}") for ending in scale_endings(token_set.settings.scales)]
