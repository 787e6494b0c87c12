import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import save_tiff

from svqvae_hf.large.tiff_reader import open_large_image
from svqvae_hf.models.image_files import load_image
from svqvae_hf.untrusted import images as guards


def colours(channels: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """Noise of 50 x 70 pixels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max + 1, (50, 70, *channels), dtype=dtype)


RGB, GREY = colours((3,)), {"photometric": "minisblack"}
TIFFS = {
    "grey": (colours(()), GREY),
    "grey, 16 bits, deflated": (colours((), np.uint16), GREY | {"byteorder": ">", "compression": "zlib"}),
    "rgb": (RGB, {}),
    "rgb, deflated": (RGB, {"compression": "zlib", "predictor": True}),
    "rgb, LZW, in one tile": (RGB, {"compression": "lzw", "tile": (64, 80), "predictor": True}),
    "rgb, 16 bits, big-endian": (colours((3,), np.uint16), {"byteorder": ">"}),
    "rgba": (colours((4,)), {"extrasamples": ["unassalpha"]}),
    "rgba, 16 bits": (colours((4,), np.uint16), {"extrasamples": ["unassalpha"]}),
}
WINDOWS = [((0, 50), (0, 70)), ((3, 20), (0, 20)), ((3, 20), (10, 40)), ((3, 20), (33, 70)), ((15, 17), (31, 33))]


def test_windows_equal_load_image(tmp_path):
    for kind, (pixels, options) in TIFFS.items():
        path = save_tiff(tmp_path / "a.tif", pixels, **options)
        expected = np.asarray(load_image(path))
        with open_large_image(str(path)) as image:
            assert (image.height, image.width) == (50, 70)
            for rows, columns in WINDOWS:
                window = slice(*rows), slice(*columns)
                assert np.array_equal(image.read(*window), expected[window]), kind


def test_further_pages_are_left_out(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(RGB, photometric="rgb", tile=(16, 32))
        file.write(255 - RGB, photometric="rgb", tile=(16, 32))
    with open_large_image(path) as image:
        assert np.array_equal(image.read(slice(5, 30), slice(8, 60)), RGB[5:30, 8:60])


def test_jpeg_in_tiff_is_close_to_load_image(tmp_path, photo):
    path = save_tiff(tmp_path / "a.tif", np.asarray(photo), compression="jpeg", tile=(64, 64))
    with open_large_image(path) as image:
        window = image.read(slice(0, photo.height), slice(0, photo.width))
    assert np.abs(window.astype(int) - np.asarray(load_image(path))).max() <= 8


def cut_short(path: Path) -> Path:
    os.truncate(path, path.stat().st_size * 2 // 3)
    return path


def test_unsupported_kinds_are_named(tmp_path):
    for pixels, options, message in (
        (colours((4,)), {"photometric": "separated"}, "SEPARATED"),
        (RGB.astype(np.float32), {}, "32 bits"),
        (colours(()), {"photometric": "miniswhite"}, "MINISWHITE"),
        (colours(()) > 9, {"photometric": "minisblack"}, "1 bits"),
        (RGB, {"extratags": [(274, 3, 1, 6, True)]}, "orientation 6"),
        (RGB, {"tile": None}, "no tiles. Convert it: vips"),
        (RGB.transpose(2, 0, 1), {"planarconfig": "separate"}, "RGB with 3 channels"),
    ):
        path = save_tiff(tmp_path / "a.tif", pixels, **options)
        with pytest.raises(ValueError, match=rf"^`{path}` cannot be .* image: .*{message}"), open_large_image(path):
            pass


def test_broken_files_are_named(tmp_path, monkeypatch):
    for name, options in (("tiled", {}), ("lzw", {"compression": "lzw"})):
        cut_short(save_tiff(tmp_path / f"{name}.tif", RGB, **options))
    missing = save_tiff(tmp_path / "missing.tif", RGB, compression="zlib", tile=(64, 80))
    with tifffile.TiffFile(missing, mode="r+b") as file:
        file.pages[0].tags["TileLength"].overwrite(16)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"^`{path}` cannot be read as a large image: ") as caught:
            with open_large_image(path) as image:
                image.read(slice(0, 50), slice(0, 70))
        assert ("tiles are missing" in str(caught.value)) or path != missing
    with pytest.raises(FileNotFoundError), open_large_image(tmp_path / "nothing.tif"):
        pass


def test_tiles_larger_than_the_limit_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MAX_CHUNK_BYTES", 16 * 32 * 3 - 1)
    path = save_tiff(tmp_path / "a.tif", RGB)
    with pytest.raises(ValueError, match="Use smaller ones"), open_large_image(path):
        pass
