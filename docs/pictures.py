"""Makes the pictures of the pages with the bundled model: `python docs/pictures.py [FOLDER]`."""

import math
import sys
import textwrap
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.demo.previews import draw_codes
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.evaluation.pictures import Panel, contact_sheet
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.models.image_files import load_image
from svqvae_hf.models.layers import TileContext
from svqvae_hf.models.tiling import TiledRun, map_tiles, sample_windows, tile_axis
from svqvae_hf.tokens.image_tokens import decode_image, encode_image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scenes import read_prompts

IMAGES = Path(__file__).parent / "images"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HELD_OUT = ("chelsea.png", "osprey.jpg")  # not among the photographs that the bundled model was trained on
WORST = 96  # pixels
LARGE = (1000, 665)  # pixels, enough to be tiled
TILE = 32  # latents: 256 pixels
HALO = 4  # latents: 32 pixels
GREEN = "#00d0a0"
ORANGE = "#ff7a00"
WHITE = "#ffffff"
GREY = "#6b6b6b"
MARGIN = 16  # pixels between images
LABEL = 44  # pixels under images
SCENE_PX = 192
SCENE_ROWS = 3
SCENE_COLUMNS = 6
SCENE_LABEL = 84  # pixels under a scene
SCENE_LINE = 27  # characters in a line there


def main(folder: Path = IMAGES) -> None:
    """Writes each picture to a folder."""
    model = SVQVAE.from_pretrained(DEFAULT_MODEL).eval()
    photo = load_image(IMAGES / "chelsea.png")
    large = photo.resize(LARGE, Image.Resampling.BICUBIC)
    pictures = {
        "pyramid": picture_of_the_pyramid(model, load_image(IMAGES / "osprey.jpg")),
        "steps": picture_of_the_steps(model, photo),
        "scales": picture_of_scales(model, photo),
        "tiles": picture_of_tiles(model, large),
        "seams": picture_of_seams(model, load_image(IMAGES / "wren.jpg")),
        "worst": picture_of_the_worst(model, [load_image(IMAGES / name) for name in HELD_OUT]),
        "scenes": picture_of_scenes(ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype=torch.float32)),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.jpg", quality=88, subsampling=0, optimize=True)


def picture_of_the_pyramid(model: SVQVAE, photo: Image.Image) -> Image.Image:
    """One photograph, decoded at four scales, at half its size."""
    model.enable_tiling(tile_size=TILE * model.f, overlap=HALO * model.f)
    tokens = encode_image(model, photo, [1, 0.5, 0.25, 0.125], "image")
    images = decode_image(model, tokens)
    model.disable_tiling()
    width = photo.width // 2
    height = photo.height // 2
    second_column = width + MARGIN
    third_column = second_column + width // 4 + MARGIN
    second_row = height // 2 + LABEL
    sheet = Image.new("RGB", (second_column + width // 2, height + LABEL), WHITE)
    draw = ImageDraw.Draw(sheet)
    corners = [(0, 0), (second_column, 0), (second_column, second_row), (third_column, second_row)]
    for (x, y), image, ids, scale in zip(corners, images, tokens.ids, tokens.scales, strict=True):
        shown = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        sheet.paste(shown, (x, y))
        label = f"scale {scale:g}, {ids.numel():,} tokens"
        draw.text((x, y + shown.height + 6), label, GREY, ImageFont.load_default(19))
    return sheet


def picture_of_the_steps(model: SVQVAE, photo: Image.Image) -> Image.Image:
    """From pixels to latents to ids, and back."""
    tokens = encode_image(model, photo, [1])
    with torch.inference_mode():
        sample = SVQVAEImageProcessor()(photo)["pixel_values"]
        latents = model.encode(sample).latents[0, :3]  # (3, h, w), shown as red, green and blue
    lowest = latents.amin((1, 2), keepdim=True)
    highest = latents.amax((1, 2), keepdim=True)
    shown_latents = _pixels((latents - lowest) / (highest - lowest))
    height, width = tokens.ids[0].shape
    panels = [
        Panel(photo, "image", f"{photo.width} x {photo.height} x 3 numbers"),
        Panel(_enlarged(shown_latents, photo), "latents", f"{width} x {height} x 8 numbers"),
        Panel(_mosaic(model, tokens.ids[0], photo), "ids", f"{width} x {height} numbers of 14 bits"),
        Panel(decode_image(model, tokens)[0], "reconstruction", f"{photo.width} x {photo.height} x 3 numbers"),
    ]
    return contact_sheet(panels)


def picture_of_scales(model: SVQVAE, photo: Image.Image) -> Image.Image:
    """Ids and reconstructions at three scales."""
    tokens = encode_image(model, photo, [1, 0.5, 0.25], "image")
    ids = []
    reconstructions = []
    for grid, scale, image in zip(tokens.ids, tokens.scales, decode_image(model, tokens), strict=True):
        height, width = grid.shape
        ids.append(Panel(_mosaic(model, grid, photo), f"ids at scale {scale:g}", f"{width} x {height}"))
        caption = f"{image.width} x {image.height} pixels"
        if scale < 1:
            caption += ", shown enlarged"
        reconstructions.append(Panel(image, "decoded", caption))
    upper = contact_sheet(ids)
    lower = contact_sheet(reconstructions)
    picture = Image.new("RGB", (upper.width, upper.height + lower.height))
    picture.paste(upper, (0, 0))
    picture.paste(lower, (0, upper.height))
    return picture


def picture_of_tiles(model: SVQVAE, photo: Image.Image) -> Image.Image:
    """The grid of tiles, one of them with its margin, and the windows for what all tiles share."""
    size = (math.ceil(photo.height / model.f), math.ceil(photo.width / model.f))  # latents
    tiles = _draw_tiles(model, photo, size)
    windows = _context_windows(size)
    sampled = photo.copy()
    draw = ImageDraw.Draw(sampled)
    for rows, columns in windows:
        _box(draw, model.f, rows, columns, GREEN, 4)
    rows_of_window = windows[0][0]
    side = (rows_of_window.stop - rows_of_window.start) * model.f
    shown_size = photo.width * 2 // 3, photo.height * 2 // 3
    panels = [
        Panel(
            tiles.resize(shown_size, Image.Resampling.LANCZOS),
            "tiles of 256 pixels",
            "one tile reads the orange square and keeps the green core",
        ),
        Panel(
            sampled.resize(shown_size, Image.Resampling.LANCZOS),
            "windows",
            f"{len(windows)} of {side} x {side} pixels, for the statistics that all tiles share",
        ),
    ]
    return contact_sheet(panels)


def _draw_tiles(model: SVQVAE, photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The photograph with the cores of all tiles, and the core and the window of a tile in the middle."""
    picture = photo.copy()
    draw = ImageDraw.Draw(picture)
    tiles_down = tile_axis(size[0], TILE, HALO)  # window and core of each row of tiles
    tiles_across = tile_axis(size[1], TILE, HALO)
    for _, core_rows in tiles_down:
        for _, core_columns in tiles_across:
            _box(draw, model.f, core_rows, core_columns, WHITE, 2)
    window_rows, core_rows = tiles_down[len(tiles_down) // 2]
    window_columns, core_columns = tiles_across[len(tiles_across) // 2]
    _box(draw, model.f, window_rows, window_columns, ORANGE, 5)
    _box(draw, model.f, core_rows, core_columns, GREEN, 5)
    return picture


def _context_windows(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns, in latents, of the windows that are sampled from an image."""
    windows = []

    def read(rows: slice, columns: slice) -> torch.Tensor:
        windows.append((rows, columns))
        return torch.zeros(1, 1, rows.stop - rows.start, columns.stop - columns.start)

    sample_windows(TiledRun(lambda windows, shared: windows, read, size, TILE, HALO))
    return windows


@torch.inference_mode()
def picture_of_seams(model: SVQVAE, photo: Image.Image) -> Image.Image:
    """Part of a photograph by tiles with statistics of their own, and by tiles that share them."""
    sample = SVQVAEImageProcessor()(photo)["pixel_values"]
    shared = model(sample, tile_size=TILE * model.f, overlap=HALO * model.f).sample

    def encode_apart(window: torch.Tensor, shared: TileContext) -> torch.Tensor:
        return shared.core_of(model.encode_window(window))

    def decode_apart(window: torch.Tensor, shared: TileContext) -> torch.Tensor:
        return shared.core_of(model.decode_window(window))

    latents = map_tiles(encode_apart, sample, TILE, HALO, input_stride=model.f)
    apart = map_tiles(decode_apart, model.quantize(latents)[0], TILE, HALO, output_stride=model.f)
    part = (0, photo.height // 5, photo.width // 2, photo.height * 17 // 20)
    panels = []
    for title, image in {"tiles with statistics of their own": apart, "tiles that share them": shared}.items():
        quality = psnr(image, sample, data_range=1).item()
        panels.append(Panel(_pixels(image[0]).crop(part), title, f"PSNR {quality:.2f} dB"))
    return contact_sheet(panels)


@torch.inference_mode()
def picture_of_the_worst(model: SVQVAE, photos: list[Image.Image]) -> Image.Image:
    """The square of each photograph that differs most from its reconstruction, before and after."""
    panels = []
    for photo in photos:
        reconstruction = decode_image(model, encode_image(model, photo, [1]))[0]
        error = torch.from_numpy(np.asarray(photo, np.float32) - np.asarray(reconstruction, np.float32))
        squares = F.avg_pool2d(error.square().mean(-1)[None], WORST, stride=WORST // 2)[0]
        row, column = divmod(int(squares.argmax()), squares.shape[1])
        top = row * WORST // 2
        left = column * WORST // 2
        square = (left, top, left + WORST, top + WORST)
        quality = 10 * math.log10(255**2 / squares.max().item())
        caption = f"PSNR {quality:.1f} dB"
        panels += [
            Panel(photo.crop(square), "image", f"{WORST} x {WORST} pixels"),
            Panel(reconstruction.crop(square), "reconstruction", caption),
        ]
    return contact_sheet(panels)


def picture_of_scenes(model: ImageLanguageModel) -> Image.Image:
    """Pictures by the bundled language model for random prompts of strangers, one per prompt."""
    prompts = []
    for file in sorted(BENCHMARKS.glob("scene_prompts_stranger_*.tsv")):
        prompts += read_prompts(file)[0]
    captions = Random(0).sample(prompts, SCENE_ROWS * SCENE_COLUMNS)
    generators = [torch.Generator().manual_seed(number) for number in range(len(captions))]
    images = model.draw(captions, generator=generators)
    across = SCENE_PX + MARGIN
    down = SCENE_PX + SCENE_LABEL
    sheet = Image.new("RGB", (across * SCENE_COLUMNS - MARGIN, down * SCENE_ROWS), WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
        left = number % SCENE_COLUMNS * across
        top = number // SCENE_COLUMNS * down
        sheet.paste(image.resize((SCENE_PX, SCENE_PX), Image.Resampling.BICUBIC), (left, top))
        text = "\n".join(textwrap.wrap(caption, SCENE_LINE))
        draw.multiline_text((left, top + SCENE_PX + 4), text, GREY, ImageFont.load_default(14))
    return sheet


def _mosaic(model: SVQVAE, ids: torch.Tensor, photo: Image.Image) -> Image.Image:
    """Ids at the size of a photograph, each in the mean colour of its code."""
    codes = torch.from_numpy(draw_codes(model, ids.flatten())).unflatten(0, ids.shape)  # (h, w, f, f, 3)
    joined = codes.float().mean((2, 3), keepdim=True).movedim(2, 1).flatten(2, 3).flatten(0, 1)  # (h, w, 3)
    return _enlarged(Image.fromarray(joined.byte().numpy()), photo)


def _enlarged(image: Image.Image, photo: Image.Image) -> Image.Image:
    return image.resize(photo.size, Image.Resampling.NEAREST)


def _pixels(sample: torch.Tensor) -> Image.Image:
    """Image of a sample `(3, height, width)` in [0, 1]."""
    return SVQVAEImageProcessor().postprocess(sample[None])[0]


def _box(draw: ImageDraw.ImageDraw, f: int, rows: slice, columns: slice, colour: str, width: int) -> None:
    corners = columns.start * f, rows.start * f, columns.stop * f - 1, rows.stop * f - 1
    draw.rectangle(corners, outline=colour, width=width)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
