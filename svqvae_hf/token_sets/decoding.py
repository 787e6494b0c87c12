"""Decodes token sets to image files."""

import itertools
import os
from pathlib import Path

import datasets
from tqdm import tqdm

from svqvae_hf.atomic_io import save_png
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.paths import scale_endings
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.image_tokens import check_memory, check_same_codebook, configure_tiling, decode_image


def detokenize_set(
    model: SVQVAE, data: str | os.PathLike, output: str | os.PathLike, *, max_images: int | None = None
) -> None:
    """Decodes the rows of a token set to image files; row 12 at scale 1 becomes `00000012_x1.png`.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode with the codebook of the set. Its tiling is set to the tiling of
            the set.
        data (`str` or `os.PathLike`): Folder of the set, or its name on the Hub. Rows on the Hub are streamed.
        output (`str` or `os.PathLike`): Folder to write to.
        max_images (`int`, *optional*): Number of rows after which to stop; all by default.

    Raises:
        OSError: The set cannot be reached, or `output` cannot be written.
        ValueError: The set has another codebook, a row does not match the settings, or a row needs more memory than
            is available.
    """
    settings = read_settings(data)
    check_same_codebook(model, settings)
    endings = scale_endings(settings.scales)
    configure_tiling(model, settings.tile_size, settings.overlap)
    rows = datasets.load_dataset(os.fspath(data), split="train", streaming=True)
    for index, row in enumerate(tqdm(itertools.islice(rows, max_images), unit="image", disable=None)):
        tokens = row_tokens(row, settings)
        check_memory(model, tokens.height, tokens.width, tokens.scales, encodes=False)
        for image, ending in zip(decode_image(model, tokens), endings, strict=True):
            save_png(image, Path(output, f"{index:08}{ending}"))
