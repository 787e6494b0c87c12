"""Encodes and decodes images larger than memory, from file to file, one row of tiles after the other."""

import errno
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from svqvae_hf.evaluation.reconstruction_table import ReconstructionFigures, psnr_of_error
from svqvae_hf.large.run_record import RunRecord
from svqvae_hf.large.tiff_reader import LargeImage, open_large_image
from svqvae_hf.large.tiff_writer import TILE_PX, TiffWriter
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.tiling import Read, gather_context, map_tile, tile_axis
from svqvae_hf.tokens.image_tokens import check_same_codebook, execution_device, image_tokens
from svqvae_hf.tokens.token_files import UINT16_CODES, ImageTokens, load_tokens, token_file_header

OnTile = Callable[[int, int], None]


@torch.inference_mode()
def encode_large(
    model: SVQVAE, source: Path, target: Path, resume: bool = False, on_tile: OnTile | None = None
) -> None:
    """Writes the token file of an image of any size: the same file as `encode_image` and `save_tokens` write.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Image, see [`open_large_image`].
        target (`Path`): Token file to write; its folder is created. It exists only once it is complete.
        resume (`bool`, defaults to `False`): Whether to resume an interrupted run.
        on_tile (`Callable`, *optional*): Called after each tile with the number of finished tiles and of all tiles.

    Raises:
        ValueError: If the image cannot be read, an interrupted run exists but `resume` is false, or that run had
            another image, model or tiling.
    """
    with (
        open_large_image(source) as image,
        _LargeRun(model, source, target, (image.height, image.width), 1, resume, on_tile) as run,
    ):
        run.encode(image, run.partial)


def load_large_tokens(source: Path) -> ImageTokens:
    """Reads a token file for [`decode_large`], with its ids mapped into memory.

    Args:
        source (`Path`): Token file of scale 1.

    Raises:
        ValueError: If it is no token file, or has other scales.
    """
    tokens = load_tokens(source, mapped=True)
    if tokens.scales != (1,):
        scales = ", ".join(f"{scale:g}" for scale in tokens.scales)
        raise ValueError(
            f"`{source}` must have scale 1 alone to be decoded as a large image, got {scales}. Decode it without "
            "--large, or encode it at scale 1."
        )
    return tokens


@torch.inference_mode()
def decode_large(
    model: SVQVAE, source: Path, target: Path, resume: bool = False, on_tile: OnTile | None = None
) -> None:
    """Writes the image of a token file of any size: the same pixels as `decode_image` returns.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Token file of scale 1.
        target (`Path`): Image to write, a tiled BigTIFF. It exists only once it is complete.
        resume (`bool`, defaults to `False`): Whether to resume an interrupted run.
        on_tile (`Callable`, *optional*): Called after each tile with the number of finished tiles and of all tiles.

    Raises:
        ValueError: If the tokens have other scales or another codebook, an interrupted run exists but `resume` is
            false, or that run had other tokens, another model or tiling.
    """
    tokens = load_large_tokens(source)
    check_same_codebook(model, tokens)
    with _LargeRun(model, source, target, (tokens.height, tokens.width), 1, resume, on_tile) as run:
        run.decode(tokens.ids[0], run.partial)


@torch.inference_mode()
def reconstruct_large(
    model: SVQVAE, source: Path, target: Path, resume: bool = False, on_tile: OnTile | None = None
) -> ReconstructionFigures:
    """Encodes and decodes an image of any size: [`encode_large`], then [`decode_large`].

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Image, see [`open_large_image`].
        target (`Path`): Image to write, see [`decode_large`].
        resume (`bool`, defaults to `False`): Whether to resume an interrupted run.
        on_tile (`Callable`, *optional*): Called after each tile with the number of finished tiles and of all tiles.

    Returns:
        [`~svqvae_hf.evaluation.reconstruction_table.ReconstructionFigures`]: Figures of the image at scale 1.

    Raises:
        ValueError: As [`encode_large`].
    """
    with (
        open_large_image(source) as image,
        _LargeRun(model, source, target, (image.height, image.width), 2, resume, on_tile) as run,
    ):
        run.encode(image, run.partial_ids)
        tokens = load_tokens(run.partial_ids, mapped=True)
        run.decode(tokens.ids[0], run.partial)
    with open_large_image(source) as image, open_large_image(target) as reconstruction:
        return _measure(image, reconstruction, tokens)


class _LargeRun:
    """Run over the tiles of one image in one or two passes. The output is at `partial` until all are finished.

    Leaving the context renames a complete output, keeps an interrupted one for `resume`, and removes one that cannot
    be completed.
    """

    def __init__(
        self,
        model: SVQVAE,
        source: Path,
        target: Path,
        size: tuple[int, int],
        passes: int,
        resume: bool,
        on_tile: OnTile | None,
    ):
        if not model.use_tiling:
            raise ValueError("a large image needs tiles, but tiling is disabled. Call `enable_tiling` first.")
        if target.is_dir():
            raise ValueError(f"the output `{target}` must be a file, but is a folder. Choose another output.")
        self.model = model
        self.size = size
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self.partial_ids = target.with_name(f"{target.name}.partial.safetensors")
        self.record = RunRecord(target, model, source, resume)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.tile_latent = model.tile_size // model.f
        self.latent_size = [-(-side // model.f) for side in size]
        self.is_whole = max(self.latent_size) <= self.tile_latent
        side = max(self.latent_size) if self.is_whole else self.tile_latent
        self.rows, self.columns = (tile_axis(length, side, model.overlap // model.f) for length in self.latent_size)
        self.tiles = passes * len(self.rows) * len(self.columns)
        self.finished_tiles = 0
        self.on_tile = on_tile

    def encode(self, image: LargeImage, path: Path) -> None:
        """Writes the token file of an image to `path`."""
        placeholder = torch.zeros((), dtype=torch.int64).expand(*self.latent_size)
        header = token_file_header(image_tokens(self.model, [placeholder], *self.size, [1.0]))
        dtype = np.dtype("<i4" if self.model.config["codebook_size"] > UINT16_CODES else "<u2")
        if self._is_new("encode", path):
            with path.open("wb") as empty:
                empty.write(header)
                empty.truncate(len(header) + math.prod(self.latent_size) * dtype.itemsize)

        with path.open("r+b") as file:

            def write(y: int, x: int, latents: torch.Tensor) -> None:
                ids = self.model.quantize.nearest_ids(latents.contiguous())[0].cpu().numpy().astype(dtype)
                for row, values in enumerate(ids, start=y):
                    file.seek(len(header) + (row * self.latent_size[1] + x) * dtype.itemsize)
                    file.write(values.tobytes())

            read = partial(_read_sample, self.model, image)
            self._map("encode", self.model.encode_window, read, write, file.flush, self.model.f)

    def decode(self, ids: torch.Tensor, path: Path) -> None:
        """Writes the image of ids `(h, w)` to `path`."""
        f, dim = self.model.f, self.model.config["codebook_embed_dim"]
        processor = SVQVAEImageProcessor(pixel_range=self.model.config["pixel_range"])
        if self._is_new("decode", path):
            TiffWriter.create(path, *self.size)

        def read(rows: slice, columns: slice) -> torch.Tensor:
            window = ids[rows, columns].long().to(execution_device(self.model))
            codes = self.model.quantize.get_codebook_entry(window, (1, *window.shape, dim))
            return codes.to(self.model.dtype)

        def write(y: int, x: int, decoded: torch.Tensor) -> None:
            height, width = (side - start * f for side, start in zip(self.size, (y, x), strict=True))
            (image,) = processor.postprocess(decoded[..., :height, :width])  # without the padding
            output.write(y * f, x * f, np.asarray(image))

        with TiffWriter(path) as output:
            self._map("decode", self.model.decode_window, read, write, output.flush, 1)

    def _is_new(self, name: str, path: Path) -> bool:
        """Whether a pass starts anew. A run that was killed at its very end has a record, but no unfinished file."""
        if not path.exists():
            self.record.finished_rows.pop(name, None)
        return name not in self.record.finished_rows

    def _map(
        self,
        name: str,
        network: Callable[..., torch.Tensor],
        read: Read,
        write: Callable[[int, int, torch.Tensor], None],
        flush: Callable[[], None],
        input_stride: int,
    ) -> None:
        """Runs a network over the tiles as `SVQVAE` does in memory. `write` takes a core's origin in latents."""
        finished_rows = self.record.finished_rows
        first = finished_rows.setdefault(name, 0)
        self.record.write()
        if not self.is_whole:
            shared = gather_context(network, read, self.latent_size, self.tile_latent, input_stride)
            network = partial(network, shared=shared)
        self.finished_tiles += first * len(self.columns)
        for y in self.rows[first:]:
            for x in self.columns:
                write(y.core_start, x.core_start, map_tile(network, read, y, x, input_stride))
                self.finished_tiles += 1
                if self.on_tile is not None:
                    self.on_tile(self.finished_tiles, self.tiles)
            flush()
            finished_rows[name] += 1
            self.record.write()

    def __enter__(self) -> Self:
        hook = getattr(self.model, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.model)  # loads offloaded weights, as `encode` and `decode` do
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                f"`{self.target}` cannot be written: No space left on device. Free some space, then run the same "
                "again with `resume`."
            ) from error
        if kind is not None and not issubclass(kind, ValueError):
            return  # interrupted: a later run can resume
        if kind is None:
            self.partial.replace(self.target)
        for path in (self.partial, self.partial_ids, self.record.path):
            path.unlink(missing_ok=True)


def _read_sample(model: SVQVAE, image: LargeImage, rows: slice, columns: slice) -> torch.Tensor:
    """Returns a window of the sample `(1, 3, rows, columns)`. Padding repeats the last row and column."""
    bottom, right = max(0, rows.stop - image.height), max(0, columns.stop - image.width)
    pixels = image.read(slice(rows.start, rows.stop - bottom), slice(columns.start, columns.stop - right))
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    sample = processor(pixels)["pixel_values"].to(execution_device(model), model.dtype)
    return F.pad(sample, (0, right, 0, bottom), mode="replicate")


def _measure(original: LargeImage, reconstruction: LargeImage, tokens: ImageTokens) -> ReconstructionFigures:
    (ids,) = tokens.ids
    squared_error = 0
    used = np.zeros(tokens.codebook_size, bool)
    for top in range(0, original.height, TILE_PX):
        for left in range(0, original.width, TILE_PX):
            bottom, right = min(top + TILE_PX, original.height), min(left + TILE_PX, original.width)
            window = slice(top, bottom), slice(left, right)
            before, after = (image.read(*window).astype(np.int64) for image in (original, reconstruction))
            squared_error += int(np.square(before - after).sum())
    for row in ids.numpy():
        used[row] = True
    return ReconstructionFigures(
        scale=1.0,
        width=original.width,
        height=original.height,
        tokens=ids.numel(),
        codes=np.flatnonzero(used),
        bits_per_pixel=tokens.bits_per_pixel(0),
        psnr=psnr_of_error(squared_error / (3 * original.height * original.width)),
    )
