"""Images larger than memory: TIFF and Zarr in and out, by rows of tiles, each written when it is whole."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
import zarr
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC

from svqvae_hf.codec import check_model, image_tokens
from svqvae_hf.files import find_files, write_file
from svqvae_hf.image_processing_svqvae import SVQVAEImageProcessor, to_rgb
from svqvae_hf.modeling_svqvae import SVQVAE, gather_context
from svqvae_hf.results import Result
from svqvae_hf.tiling import Read, map_tile, tile_axis
from svqvae_hf.tokens import UINT16_CODES, ImageTokens, load_tokens, token_file_header

TIFF_SUFFIXES = (".tif", ".tiff")
ZARR_METADATA = ("zarr.json", ".zarray")
OUTPUT_TILE = 256  # side of the tiles or chunks that are written, in pixels
CHUNK_LIMIT = 1 << 28  # bytes of a strip, tile or chunk, which is decoded as a whole: 256 MiB
LAYOUTS = {  # channels and what those beyond the colours are, in TIFF's numbers, to Pillow's names
    (1,): "L",
    (3,): "RGB",
    (4,): "RGBA",
    (4, 0): "RGBX",
    (4, 1): "RGBa",
    (4, 2): "RGBA",
}

OnTile = Callable[[int, int], None]


def find_large_images(patterns: Sequence[str]) -> list[Path]:
    """TIFF files and Zarr arrays that the arguments name, each once: files, arrays, folders of files, and globs."""
    found = []
    for pattern in patterns:
        path = Path(pattern)
        found += [path] if _is_zarr(path) else find_files([pattern], TIFF_SUFFIXES)
    return list({path.resolve(): path for path in found}.values())


@dataclass
class LargeImage:
    """An image in a file, read by windows.

    Args:
        path (`Path`): The file, or the folder of a Zarr array.
        height (`int`): Height in pixels.
        width (`int`): Width in pixels.
        chunk_width (`int`): Pixels along a row that are decoded together.
        layout (`str`): Pillow's name of the layout of a pixel, one of `LAYOUTS`.
        values (`Callable`): Gives the stored values `(rows, columns)` or `(rows, columns, channels)` at two slices.
    """

    path: Path
    height: int
    width: int
    chunk_width: int
    layout: str
    values: Callable[[slice, slice], np.ndarray]

    def __post_init__(self) -> None:
        self._block: tuple[slice, slice, np.ndarray] | None = None

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Pixels `(rows, columns, 3)` in uint8, as [`~svqvae_hf.image_processing_svqvae.load_image`] gives them."""
        values = self._read_block(rows, columns)
        if self.layout == "L":
            image = Image.fromarray(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
        else:
            if values.dtype.itemsize == 2:
                values = values >> 8  # as Pillow reads colours of 16 bits
            mode, size = "RGBA" if self.layout in ("RGBA", "RGBa") else "RGB", (values.shape[1], values.shape[0])
            image = Image.frombytes(mode, size, values.astype(np.uint8).tobytes(), "raw", self.layout)
        return np.asarray(to_rgb(image))

    def _read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """The stored values, of whole chunks along the rows, kept for the next window to the right."""
        if self._block is not None:
            held_rows, held, values = self._block
            if held_rows == rows and held.start <= columns.start and columns.stop <= held.stop:
                return values[:, columns.start - held.start : columns.stop - held.start]
        chunk = self.chunk_width
        held = slice(columns.start // chunk * chunk, min(-(-columns.stop // chunk) * chunk, self.width))
        self._block = None  # before the next one is read
        with _reading(self.path):
            self._block = rows, held, self.values(rows, held)
        return self._read_block(rows, columns)


@contextmanager
def open_large_image(path: Path) -> Iterator[LargeImage]:
    """Opens an image for reading by windows.

    Args:
        path (`Path`): TIFF or BigTIFF, its first page grey, RGB or RGBA of 8 or 16 bits; or the folder of a Zarr array
            `(height, width, 3)` of uint8.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is of another kind.
    """
    if path.is_dir():
        with _reading(path):
            array = zarr.open_array(path, mode="r")
        yield _zarr_image(path, array)
        return
    with _reading(path):
        file = tifffile.TiffFile(path)
    with file:
        with _reading(path):
            page = file.pages[0]
        yield _tiff_image(path, page)


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
        target (`Path`): Token file to write, in a folder that exists. It is there only once it is whole.
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
    check_model(model, tokens)
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
) -> Result:
    """Writes an image of any size as the model gives it back: [`encode_large`], then [`decode_large`].

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, with tiling enabled.
        source (`Path`): Image, see [`open_large_image`].
        target (`Path`): Image to write, as in [`decode_large`].
        resume (`bool`, defaults to `False`): Whether to go on where an interrupted run stopped.
        on_tile (`Callable`, *optional*): Called after each tile with the tiles done and their number.

    Returns:
        [`~svqvae_hf.results.Result`]: What it came to.

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
        self._facts = {"input": _identity(source), **_model_facts(model)}
        self._bands: dict[str, int] = {}  # rows of tiles that are done, of each pass
        self._read_record(resume)
        self._tile = model.tile_size // model.f
        self._cells = [-(-side // model.f) for side in size]
        self._rows, self._columns = (tile_axis(cells, self._tile, model.overlap // model.f) for cells in self._cells)
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
                ids = self.model.quantize.search(latents.contiguous())[0].cpu().numpy().astype(dtype)
                for row, values in enumerate(ids, start=y):
                    file.seek(len(header) + (row * self._cells[1] + x) * dtype.itemsize)
                    file.write(values.tobytes())

            read = partial(_read_sample, self.model, image)
            self._map("encode", self.model.encode_window, read, write, file.flush, self.model.f, 1)

    def decode(self, ids: torch.Tensor, path: Path) -> None:
        """Writes the image of ids `(h, w)` to `path`."""
        f, dim = self.model.f, self.model.config["codebook_embed_dim"]
        processor = SVQVAEImageProcessor(pixel_range=self.model.config["pixel_range"])
        output = _ZarrOutput if self.target.suffix == ".zarr" else _TiffOutput
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
            self._map("decode", self.model.decode_window, read, write, opened.flush, 1, f)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Gives a whole output its name, keeps an interrupted one, and removes one that cannot become whole."""
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
        source_cell: int,
        result_cell: int,
    ) -> None:
        """Maps a network over the tiles, as `SVQVAE` does it in memory; `write` gets the cell where a core begins."""
        done = self._bands.setdefault(name, 0)
        self._write_record()
        if max(self._cells) > self._tile:
            network = partial(network, context=gather_context(network, read, self._cells, self._tile, source_cell))
        self._done += done * len(self._columns)
        for band, y in enumerate(self._rows[done:], start=done + 1):
            for x in self._columns:
                write(y.core_start, x.core_start, map_tile(network, read, y, x, source_cell, result_cell))
                self._count()
            flush()
            self._bands[name] = band
            self._write_record()

    def _count(self) -> None:
        self._done += 1
        if self._on_tile is not None:
            self._on_tile(self._done, self._tiles)

    def _read_record(self, resume: bool) -> None:
        if self.target.is_dir():
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
            facts, self._bands = record["facts"], record["bands"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`{self._record_path}` must be the record of a run, but is not. Remove it.") from error
        differing = [name for name, value in self._facts.items() if facts.get(name) != value]
        if differing:
            raise ValueError(
                f"`{self.target}` must be continued with the input, model and options that it was begun with, but "
                f"these differ: {', '.join(differing)}. Give those, {remedy}"
            )

    def _write_record(self) -> None:
        write_file(self._record_path, json.dumps({"facts": self._facts, "bands": self._bands}).encode())


class _TiffOutput:
    """An uncompressed tiled BigTIFF, whose tiles have their place in the file before they are written."""

    @staticmethod
    def create(path: Path, height: int, width: int) -> None:
        tile = (OUTPUT_TILE, OUTPUT_TILE)
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            file.write(shape=(height, width, 3), dtype=np.uint8, tile=tile, photometric="rgb", metadata=None)

    def __init__(self, path: Path):
        with tifffile.TiffFile(path) as file:
            self._offsets = file.pages[0].dataoffsets
            self._across = -(-file.pages[0].imagewidth // OUTPUT_TILE)
        self._file = path.open("r+b")
        self.flush = self._file.flush

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        bottom, right = top + pixels.shape[0], left + pixels.shape[1]
        for y in range(top, bottom):
            for tile in range(left // OUTPUT_TILE, -(-right // OUTPUT_TILE)):
                start, stop = max(left, tile * OUTPUT_TILE), min(right, (tile + 1) * OUTPUT_TILE)
                within = y % OUTPUT_TILE * OUTPUT_TILE + start % OUTPUT_TILE
                self._file.seek(self._offsets[y // OUTPUT_TILE * self._across + tile] + within * 3)
                self._file.write(pixels[y - top, start - left : stop - left].tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _ZarrOutput:
    """A Zarr array `(height, width, 3)` of uint8, whose chunks are written at once."""

    @staticmethod
    def create(path: Path, height: int, width: int) -> None:
        shape, chunks = (height, width, 3), (OUTPUT_TILE, OUTPUT_TILE, 3)
        zarr.create_array(path, shape=shape, chunks=chunks, dtype="uint8", overwrite=True)

    def __init__(self, path: Path):
        self._array = zarr.open_array(path, mode="r+")

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        self._array[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def flush(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # decoders raise errors of many kinds
        raise ValueError(f"`{path}` cannot be read as TIFF or Zarr, it may be broken or cut short: {error}") from error


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ZARR_METADATA)


def _zarr_image(path: Path, array: Any) -> LargeImage:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"`{path}` must be a Zarr array (height, width, 3) of uint8, but is {array.shape} of {array.dtype}."
        )
    _check_chunk(path, array)
    height, width, _ = array.shape
    return LargeImage(path, height, width, array.chunks[1], "RGB", lambda rows, columns: array[rows, columns])


def _tiff_image(path: Path, page: Any) -> LargeImage:
    grey, jpeg = page.photometric == PHOTOMETRIC.MINISBLACK, page.compression == COMPRESSION.JPEG
    coloured = page.photometric == PHOTOMETRIC.RGB or (page.photometric == PHOTOMETRIC.YCBCR and jpeg)
    layout = LAYOUTS.get((page.samplesperpixel, *page.extrasamples))
    orientation = page.tags.valueof("Orientation", 1)
    if (
        not (grey or coloured)
        or layout is None
        or grey != (layout == "L")
        or page.bitspersample not in (8, 16)
        or page.dtype not in (np.uint8, np.uint16)
        or page.axes not in ("YX", "YXS", "SYX")
        or orientation != 1
    ):
        kind = getattr(page.photometric, "name", page.photometric)
        raise ValueError(
            f"`{path}` must be grey, RGB or RGBA of 8 or 16 bits and stored upright, but is {kind} of "
            f"{page.samplesperpixel} channels and {page.bitspersample} bits, orientation {orientation}. Convert it."
        )
    if page.is_memmappable:
        array, chunk_width = _Uncompressed(path, page), 1
    else:
        with _reading(path):
            array = zarr.open_array(page.aszarr(), mode="r")
        _check_chunk(path, array)
        chunk_width = array.chunks[page.axes.index("X")]

    def values(rows: slice, columns: slice) -> np.ndarray:
        return np.moveaxis(array[:, rows, columns], 0, -1) if page.axes == "SYX" else array[rows, columns]

    return LargeImage(path, page.imagelength, page.imagewidth, chunk_width, layout, values)


def _check_chunk(path: Path, array: Any) -> None:
    size = math.prod(array.chunks) * array.dtype.itemsize
    if size > CHUNK_LIMIT:
        raise ValueError(
            f"`{path}` must be stored in strips, tiles or chunks of at most {CHUNK_LIMIT >> 20} MiB, since each is "
            f"decoded as a whole, but has some of {size >> 20} MiB. Store it in tiles."
        )


class _Uncompressed:
    """The values of a TIFF that are stored in one piece. Each window maps the file anew, so that none stays mapped."""

    def __init__(self, path: Path, page: Any):
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        self._map = partial(np.memmap, path, dtype, "r", page.dataoffsets[0], page.shape)

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        return np.array(self._map()[window])


def _read_sample(model: SVQVAE, image: LargeImage, rows: slice, columns: slice) -> torch.Tensor:
    """A window of the sample `(1, 3, rows, columns)`, beyond the image its last row and column."""
    bottom, right = max(0, rows.stop - image.height), max(0, columns.stop - image.width)
    pixels = image.read(slice(rows.start, rows.stop - bottom), slice(columns.start, columns.stop - right))
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    sample = processor(pixels)["pixel_values"].to(model.device, model.dtype)
    return F.pad(sample, (0, right, 0, bottom), mode="replicate")


def _identity(path: Path) -> list[Any]:
    """What tells an input from another: name, size and time of change, of a Zarr array those of its metadata."""
    file = next(path / name for name in ZARR_METADATA if (path / name).is_file()) if path.is_dir() else path
    status = file.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _model_facts(model: SVQVAE) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(_public(model.config), sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    options = {"tile_size": model.tile_size, "overlap": model.overlap, "dtype": str(model.dtype)}
    return {"model": digest.hexdigest(), **options, "device": model.device.type}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _measure(original: LargeImage, reconstruction: LargeImage, tokens: ImageTokens) -> Result:
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
    return Result(
        scale=1.0,
        width=original.width,
        height=original.height,
        tokens=ids.numel(),
        codes=np.flatnonzero(used),
        bits_per_pixel=tokens.bits_per_pixel(0),
        psnr=10 * math.log10(255**2 * 3 * original.height * original.width / error) if error else math.inf,
    )
