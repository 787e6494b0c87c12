"""Images larger than memory, from file to file by rows of tiles, each written when it is whole."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from svqvae_hf.atomic_io import write_file
from svqvae_hf.evaluation.reconstruction_table import ReconstructionFigures, psnr_of_error
from svqvae_hf.large.large_files import (
    OUTPUT_TILE,
    LargeImage,
    TiffOutput,
    ZarrOutput,
    file_identity,
    open_large_image,
)
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.tiling import Read, fits_whole, gather_context, map_tile, tile_axis
from svqvae_hf.tokens.image_tokens import check_same_codebook, image_tokens
from svqvae_hf.tokens.token_files import UINT16_CODES, ImageTokens, load_tokens, token_file_header

OnTile = Callable[[int, int], None]


def record_path(target: Path) -> Path:
    """The record of an interrupted run, which is there as long as the output is not whole."""
    return target.with_name(f"{target.name}.partial.json")


@torch.inference_mode()
def encode_large(
    model: SVQVAE, source: Path, target: Path, resume: bool = False, on_tile: OnTile | None = None
) -> None:
    """Writes the token file of an image of any size, that which `encode_image` and `save_tokens` write.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Image, see [`open_large_image`].
        target (`Path`): Token file to write, its folder made if need be. It is there only once it is whole.
        resume (`bool`, defaults to `False`): Whether to go on where an interrupted run stopped.
        on_tile (`Callable`, *optional*): Called after each tile with the tiles done and their number.

    Raises:
        ValueError: If the image cannot be read, or an interrupted run is not to be resumed or was of another image,
            model or tile.
    """
    with (
        open_large_image(source) as image,
        _Run(model, source, target, (image.height, image.width), 1, resume, on_tile) as run,
    ):
        run.encode(image, run.partial)


@torch.inference_mode()
def decode_large(
    model: SVQVAE, source: Path, target: Path, resume: bool = False, on_tile: OnTile | None = None
) -> None:
    """Writes the image of a token file, whatever its size, as `decode_image` gives it.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Token file of scale 1.
        target (`Path`): Image to write: a Zarr array if its name ends in `.zarr`, else a tiled BigTIFF. It is there
            only once it is whole.
        resume (`bool`, defaults to `False`): Whether to go on where an interrupted run stopped.
        on_tile (`Callable`, *optional*): Called after each tile with the tiles done and their number.

    Raises:
        ValueError: If the tokens are of other scales or of another model, or an interrupted run is not to be resumed
            or was of other tokens, another model or tile.
    """
    tokens = load_tokens(source, mapped=True)
    check_same_codebook(model, tokens)
    if tokens.scales != (1,):
        scales = ", ".join(f"{scale:g}" for scale in tokens.scales)
        raise ValueError(
            f"`{source}` must have ids of scale 1 alone to be decoded as a large image, but has {scales}. Decode it "
            "without that, or encode at scale 1."
        )
    with _Run(model, source, target, (tokens.height, tokens.width), 1, resume, on_tile) as run:
        run.decode(tokens.ids[0], run.partial)


@torch.inference_mode()
def reconstruct_large(
    model: SVQVAE, source: Path, target: Path, resume: bool = False, on_tile: OnTile | None = None
) -> ReconstructionFigures:
    """Writes an image of any size as the model gives it back: [`encode_large`], then [`decode_large`].

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Image, see [`open_large_image`].
        target (`Path`): Image to write, as in [`decode_large`].
        resume (`bool`, defaults to `False`): Whether to go on where an interrupted run stopped.
        on_tile (`Callable`, *optional*): Called after each tile with the tiles done and their number.

    Returns:
        [`~svqvae_hf.evaluation.reconstruction_table.ReconstructionFigures`]: Figures of the image at scale 1.

    Raises:
        ValueError: As in [`encode_large`].
    """
    with (
        open_large_image(source) as image,
        _Run(model, source, target, (image.height, image.width), 2, resume, on_tile) as run,
    ):
        run.encode(image, run.partial_ids)
        tokens = load_tokens(run.partial_ids, mapped=True)
        run.decode(tokens.ids[0], run.partial)
    with open_large_image(source) as image, open_large_image(target) as reconstruction:
        return _measure(image, reconstruction, tokens)


class _Run:
    """The work on one output, and a record of it beside the output, from which an interrupted run can go on."""

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
            raise ValueError(
                "a large image needs tiles, but the model has tiling disabled. Call `enable_tiling` first."
            )
        self.model = model
        self.size = size
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self.partial_ids = target.with_name(f"{target.name}.partial.safetensors")
        self._record_path = record_path(target)
        self._facts = {"input": file_identity(source), **_model_facts(model)}
        self._bands: dict[str, int] = {}  # rows of tiles that are done, of each pass
        self._read_record(resume)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._tile = model.tile_size // model.f
        self._cells = [-(-side // model.f) for side in size]
        self._whole = fits_whole(self._cells, self._tile)
        largest = max(self._cells) if self._whole else self._tile
        self._rows, self._columns = (tile_axis(cells, largest, model.overlap // model.f) for cells in self._cells)
        self._tiles = passes * len(self._rows) * len(self._columns)
        self._done = 0
        self._on_tile = on_tile

    def encode(self, image: LargeImage, path: Path) -> None:
        """Writes the token file of an image to `path`."""
        placeholder = torch.zeros((), dtype=torch.int64).expand(*self._cells)
        header = token_file_header(image_tokens(self.model, [placeholder], *self.size, [1.0]))
        dtype = np.dtype("<i4" if self.model.config["codebook_size"] > UINT16_CODES else "<u2")
        if "encode" not in self._bands:
            with path.open("wb") as empty:
                empty.write(header)
                empty.truncate(len(header) + math.prod(self._cells) * dtype.itemsize)

        with path.open("r+b") as file:

            def write(y: int, x: int, latents: torch.Tensor) -> None:
                ids = self.model.quantize.nearest_ids(latents.contiguous())[0].cpu().numpy().astype(dtype)
                for row, values in enumerate(ids, start=y):
                    file.seek(len(header) + (row * self._cells[1] + x) * dtype.itemsize)
                    file.write(values.tobytes())

            read = partial(_read_sample, self.model, image)
            self._map("encode", self.model.encode_window, read, write, file.flush, self.model.f)

    def decode(self, ids: torch.Tensor, path: Path) -> None:
        """Writes the image of ids `(h, w)` to `path`."""
        f, dim = self.model.f, self.model.config["codebook_embed_dim"]
        processor = SVQVAEImageProcessor(pixel_range=self.model.config["pixel_range"])
        output = ZarrOutput if self.target.suffix == ".zarr" else TiffOutput
        if "decode" not in self._bands:
            output.create(path, *self.size)

        def read(rows: slice, columns: slice) -> torch.Tensor:
            window = ids[rows, columns].long().to(self.model.device)
            codes = self.model.quantize.get_codebook_entry(window, (1, *window.shape, dim))
            return codes.to(self.model.dtype)

        def write(y: int, x: int, decoded: torch.Tensor) -> None:
            height, width = (side - start * f for side, start in zip(self.size, (y, x), strict=True))
            (image,) = processor.postprocess(decoded[..., :height, :width])
            opened.write(y * f, x * f, np.asarray(image))

        with output(path) as opened:
            self._map("decode", self.model.decode_window, read, write, opened.flush, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Gives a whole output its name, keeps an interrupted one, and removes one that cannot become whole."""
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                f"`{self.target}` cannot be written: No space left on device. With more, the same run with `resume` "
                "goes on."
            ) from error
        if kind is not None and not issubclass(kind, ValueError):
            return
        if kind is None:
            self.partial.replace(self.target)
        elif self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)
        self.partial_ids.unlink(missing_ok=True)
        self._record_path.unlink(missing_ok=True)

    def _map(
        self,
        name: str,
        network: Callable[..., torch.Tensor],
        read: Read,
        write: Callable[[int, int, torch.Tensor], None],
        flush: Callable[[], None],
        input_stride: int,
    ) -> None:
        """Maps a network over the tiles, as `SVQVAE` does it in memory; `write` gets the cell where a core begins."""
        done = self._bands.setdefault(name, 0)
        self._write_record()
        if not self._whole:
            network = partial(network, shared=gather_context(network, read, self._cells, self._tile, input_stride))
        self._done += done * len(self._columns)
        for band, y in enumerate(self._rows[done:], start=done + 1):
            for x in self._columns:
                write(y.core_start, x.core_start, map_tile(network, read, y, x, input_stride))
                self._count()
            flush()
            self._bands[name] = band
            self._write_record()

    def _count(self) -> None:
        self._done += 1
        if self._on_tile is not None:
            self._on_tile(self._done, self._tiles)

    def _read_record(self, resume: bool) -> None:
        if self.target.is_dir() or (self.target.suffix == ".zarr" and os.path.lexists(self.target)):
            raise ValueError(
                f"`{self.target}` must be new, but is there already. Remove it, or choose another output."
            )
        if not self._record_path.exists():
            return
        remedy = f"or remove `{self._record_path}` to begin anew."
        if not resume:
            raise ValueError(f"`{self.target}` was begun by a run that was interrupted. Go on by --resume, {remedy}")
        try:
            record = json.loads(self._record_path.read_bytes())
            facts, self._bands = dict(record["facts"]), {name: int(done) for name, done in record["bands"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{self._record_path}` must be the record of a run, but is not. Remove it.") from error
        differing = [name for name, value in self._facts.items() if facts.get(name) != value]
        if differing:
            raise ValueError(
                f"`{self.target}` must be continued with the input, model and options that it was begun with, but "
                f"these differ: {', '.join(differing)}. Give those, {remedy}"
            )

    def _write_record(self) -> None:
        write_file(self._record_path, json.dumps({"facts": self._facts, "bands": self._bands}).encode())


def _read_sample(model: SVQVAE, image: LargeImage, rows: slice, columns: slice) -> torch.Tensor:
    """A window of the sample `(1, 3, rows, columns)`, beyond the image its last row and column."""
    bottom, right = max(0, rows.stop - image.height), max(0, columns.stop - image.width)
    pixels = image.read(slice(rows.start, rows.stop - bottom), slice(columns.start, columns.stop - right))
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    sample = processor(pixels)["pixel_values"].to(model.device, model.dtype)
    return F.pad(sample, (0, right, 0, bottom), mode="replicate")


def _model_facts(model: SVQVAE) -> dict[str, Any]:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    options = {"tile_size": model.tile_size, "overlap": model.overlap, "dtype": str(model.dtype)}
    return {"model": digest.hexdigest(), **options, "device": model.device.type}


def _measure(original: LargeImage, reconstruction: LargeImage, tokens: ImageTokens) -> ReconstructionFigures:
    (ids,) = tokens.ids
    error = 0
    used = np.zeros(tokens.codebook_size, bool)
    for top in range(0, original.height, OUTPUT_TILE):
        for left in range(0, original.width, OUTPUT_TILE):
            ends = min(top + OUTPUT_TILE, original.height), min(left + OUTPUT_TILE, original.width)
            window = slice(top, ends[0]), slice(left, ends[1])
            before, after = (image.read(*window).astype(np.int64) for image in (original, reconstruction))
            error += int(np.square(before - after).sum())
    for row in ids.numpy():
        used[row] = True
    return ReconstructionFigures(
        scale=1.0,
        width=original.width,
        height=original.height,
        tokens=ids.numel(),
        codes=np.flatnonzero(used),
        bits_per_pixel=tokens.bits_per_pixel(0),
        psnr=psnr_of_error(error / (3 * original.height * original.width)),
    )
