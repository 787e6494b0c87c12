import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import EpsImagePlugin, Image
from transformers import AutoImageProcessor

import svqvae_hf
from svqvae_hf import SVQVAE
from svqvae_hf.models.image_files import load_image, to_grey, to_rgb
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor


@pytest.fixture
def pixels():
    """Every 8-bit value, in three channels of 32 x 24."""
    return np.random.default_rng(0).permutation(np.arange(32 * 24 * 3) % 256).astype(np.uint8).reshape(32, 24, 3)


def save(image, path, **options):
    image.save(path, **options)
    return path


def read(path):
    return np.asarray(load_image(path))


@pytest.mark.parametrize("pixel_range", [(0, 1), (-1, 1), (0.2, 0.3)])
def test_8_bit_images_come_back_as_they_went_in(pixels, pixel_range):
    processor = SVQVAEImageProcessor(pixel_range=pixel_range)
    batch = processor(Image.fromarray(pixels))
    assert batch["pixel_values"].shape == (1, 3, 32, 24)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].min().item() == pytest.approx(pixel_range[0], rel=1e-6)
    assert batch["pixel_values"].max().item() == pytest.approx(pixel_range[1], rel=1e-6)
    (image,) = processor.postprocess(batch["pixel_values"], batch["image_sizes"])
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_all_kinds_of_input_agree(pixels, tmp_path):
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [
        *(Image.fromarray(pixels), pixels, pixels[::-1][::-1], (pixels / 255).astype(">f4")),
        *(chw, chw[None], chw / 255, str(path), path.read_bytes(), path.open("rb")),
    ]
    with kinds[-1]:
        batch = SVQVAEImageProcessor()(kinds)
    assert batch["pixel_values"].shape == (len(kinds), 3, 32, 24)
    for values in batch["pixel_values"]:
        torch.testing.assert_close(values, chw / 255, rtol=0, atol=1e-7)


def test_the_dtype_decides_what_a_value_means():
    dark = np.ones((4, 4, 3), np.uint8)
    values = SVQVAEImageProcessor()([dark, dark.astype(np.float32)])["pixel_values"]
    assert values[0].unique().tolist() == pytest.approx([1 / 255])
    assert values[1].unique().tolist() == [1]


def test_an_array_with_alpha_is_its_picture():
    values = np.arange(256, dtype=np.uint8)
    colours, alpha = np.meshgrid(values, values)
    rgba = np.stack([colours, colours[::-1], colours.T, alpha], -1)
    processor = SVQVAEImageProcessor(pixel_range=(-1, 1))
    expected = processor(Image.fromarray(rgba))["pixel_values"]
    chw = torch.from_numpy(rgba).movedim(-1, 0)
    for image in (rgba, rgba[None], chw):
        assert torch.equal(processor(image)["pixel_values"], expected)
    for image in (rgba / 255, chw / 255):  # not rounded to 8 bits
        torch.testing.assert_close(processor(image)["pixel_values"], expected, rtol=0, atol=1.001 / 255)


def test_images_of_several_sizes_are_refused_because_padding_changes_ids(tiny_model, no_grad, pixels):
    processor = SVQVAEImageProcessor()
    small, large = pixels[:16, :12], pixels
    message = r"must have one size, .*, got 12 x 16, 24 x 32 \(width x height\). Process each size on its own"
    with pytest.raises(ValueError, match=message):
        processor([small, large, small])
    together = tiny_model.encode_tokens(processor([large, large[::-1]])["pixel_values"])
    for image, ids in zip((large, large[::-1]), together, strict=True):
        assert torch.equal(tiny_model.encode_tokens(processor(image)["pixel_values"])[0], ids)


def test_output_types():
    sample = torch.tensor([-2.0, 0.0, 3.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    processor = SVQVAEImageProcessor(pixel_range=(-1, 1))
    tensors, arrays, images = (processor.postprocess(sample, output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensors.shape == (2, 3, 4, 5)
    assert tensors[0][:, 0, 0].tolist() == [0, 0.5, 1]
    for output_type, others in {"pt": tensors, "np": arrays}.items():
        alike = VaeImageProcessor().postprocess(sample, output_type)
        assert type(alike) is type(others)
        assert alike.tolist() == others.tolist()
        crops = processor.postprocess(sample, [(4, 5), (2, 3)], output_type)
        assert [crop.size if output_type == "np" else crop.numel() for crop in crops] == [60, 18]
    assert images[0].size == (5, 4)
    assert images[0].getpixel((0, 0)) == (0, 128, 255)


def test_saves_and_loads_as_a_component(tmp_path):
    SVQVAEImageProcessor(pixel_range=(-1, 1)).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert SVQVAEImageProcessor.from_pretrained(tmp_path).pixel_range == (-1, 1)
    assert SVQVAEImageProcessor.from_pretrained(tmp_path, pixel_range=(0, 1)).pixel_range == (0, 1)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is svqvae_hf.SVQVAEImageProcessor


def test_a_processor_made_from_a_model_has_its_range(tiny_model, saved_model):
    signed = SVQVAE.from_pretrained(saved_model, pixel_range=(-1, 1))
    for model in (tiny_model, signed):
        assert SVQVAEImageProcessor.from_model(model).pixel_range == tuple(model.config["pixel_range"])


# Decoding


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_alpha_goes_on_white(mode, tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(90, 90, 90, 255), (90, 90, 90, 0), (0, 0, 0, 128)])
    if mode == "PA":
        image = Image.merge("PA", (image.convert("L"), image.getchannel("A")))
        image.putpalette([grey for grey in range(256) for _ in range(3)])
    else:
        image = image.convert(mode)
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [90, 255, 127]


@pytest.mark.parametrize(("mode", "name"), [("1", "a.png"), ("L", "a.png"), ("P", "a.gif"), ("CMYK", "a.tif")])
def test_other_8_bit_modes(tmp_path, mode, name):
    image = Image.new("RGB", (4, 2), "white")
    image.paste((0, 0, 0), (0, 0, 2, 2))
    assert read(save(image.convert(mode), tmp_path / name))[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(("mode", "name"), [("I;16", "a.png"), ("I;16", "a.tif"), ("I;16B", "a.tif"), ("I", "a.tif")])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, mode, name):
    values = np.array([[0, 128, 257, 32768, 65535]])
    image = Image.fromarray(values.astype({"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]))
    assert image.mode == mode
    assert read(save(image, tmp_path / name))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def write_png(bits: int, colour_type: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of 2 x 1 pixels with one transparent value."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"\0" + row)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*named) for named in chunks)


@pytest.mark.parametrize(
    ("png", "expected"),
    [
        (write_png(1, 0, b"\x40", b"\0\0"), [[255, 255, 255], [255, 255, 255]]),
        (write_png(2, 0, b"\x60", b"\0\1"), [[255, 255, 255], [170, 170, 170]]),
        (write_png(4, 0, b"\x5a", b"\0\5"), [[255, 255, 255], [170, 170, 170]]),
        (write_png(8, 0, b"\x05\x0a", b"\0\5"), [[255, 255, 255], [10, 10, 10]]),
        (write_png(16, 0, struct.pack(">2H", 1285, 0), struct.pack(">H", 1285)), [[255, 255, 255], [0, 0, 0]]),
        (write_png(8, 2, bytes(range(6)), struct.pack(">3H", 0, 1, 2)), [[255, 255, 255], [3, 4, 5]]),
        (
            write_png(16, 2, struct.pack(">6H", 300, 600, 900, 256, 0, 0), struct.pack(">3H", 300, 600, 900)),
            [[255, 255, 255], [1, 0, 0]],
        ),
    ],
)
def test_the_transparent_value_of_a_png_goes_on_white(png, expected):
    assert np.asarray(load_image(io.BytesIO(png))).tolist() == [expected]
    assert np.asarray(to_rgb(Image.open(io.BytesIO(png)))).tolist() == [expected]


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_goes_on_white(mode):
    straight = Image.new({"La": "LA", "RGBa": "RGBA"}[mode], (2, 2))
    straight.putpixel((0, 0), (120,) * (len(mode) - 1) + (255,))
    image = to_rgb(straight.convert(mode))
    assert image.getpixel((0, 0)) == (120, 120, 120)
    assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "mode"),
    [(np.float32([[0, 0.5, 1]]), "F"), (np.uint16([[0, 32768, 65535]]), "I;16"), (np.int32([[0, 32768, 65535]]), "I")],
)
def test_grey_is_scaled_and_not_clipped(array, mode):
    image = Image.fromarray(array)
    assert image.mode == mode
    assert np.asarray(to_grey(image)).tolist() == [[0, 128, 255]]
    assert to_grey(Image.new("La", (1, 1))).getpixel((0, 0)) == 0


def test_exif_orientation_is_applied_once(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    upright = np.rot90(pixels, -1)
    assert np.array_equal(read(path), upright)
    values = SVQVAEImageProcessor()([path, Image.open(path)])["pixel_values"]
    assert torch.equal(values[0], values[1])
    assert values.shape == (2, 3, 24, 32)


# Errors

# A whole bitmap, 4 x 1, of one run and the end. Pillow decodes these in Python, and has no limit for them.
RUN_LENGTHS = struct.pack("<2s3I", b"BM", 62, 0, 58) + struct.pack("<3I2H6I4x", 40, 4, 1, 1, 8, 1, 4, 0, 0, 1, 0)
RUN_LENGTHS += b"\4\0\0\1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\(0 bytes\) is not a readable image. It must be intact, in one of"),
        (b"Dear diary, ...", r"\(15 bytes\) is not a readable image. It must be intact, in one of"),
        (b"\x89PNG\r\n\x1a\n", r"\(8 bytes\) is not a readable image. It must be intact"),
        (RUN_LENGTHS, r"\(62 bytes\) is not a readable image. It must .* \(BMP without run-length encoding\)"),
    ],
)
def test_files_that_are_not_images_are_named(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.png` ({message})"):
        SVQVAEImageProcessor()(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("dtype", "options", "bits"),
    [("uint16", {"photometric": "miniswhite"}, 16), ("uint16", {}, 12), ("int16", {}, 16)],
)
def test_tiffs_whose_values_pillow_takes_for_others_are_refused(tmp_path, dtype, options, bits):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8), dtype), **options)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags["BitsPerSample"].overwrite(bits)
    with Image.open(tmp_path / "a.tif") as opened:
        for image in (tmp_path / "a.tif", opened):
            with pytest.raises(ValueError, match="a grey TIFF must have unsigned values of 8 or 16 bits, black"):
                SVQVAEImageProcessor()(image)


CHANNELS_OF_MODE = {"RGB": 3, "RGBA": 4, "CMYK": 4}
PLANES = {
    "RGB": {"photometric": "rgb"},
    "RGBA": {"photometric": "rgb", "extrasamples": ["unassalpha"]},
    "CMYK": {"photometric": "separated"},
}


@pytest.mark.parametrize("mode", PLANES)
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_16_bit_tiffs_with_a_plane_per_channel_are_right_or_refused(tmp_path, mode, byteorder, tile):
    planes = np.random.default_rng(0).integers(0, 2**16, (CHANNELS_OF_MODE[mode], 24, 40)).astype(np.uint16)
    options = PLANES[mode] | {"byteorder": byteorder, "tile": tile}
    pixels = np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    tifffile.imwrite(tmp_path / "pixels.tif", pixels, planarconfig="contig", **options)
    expected = np.asarray(load_image(tmp_path / "pixels.tif"))
    tifffile.imwrite(tmp_path / "zlib.tif", planes, planarconfig="separate", compression="zlib", **options)
    difference = np.asarray(load_image(tmp_path / "zlib.tif")) - expected.astype(int)
    assert np.abs(difference).max() <= 2  # libtiff and Pillow round 16 bits to 8 differently
    tifffile.imwrite(tmp_path / "raw.tif", planes, planarconfig="separate", **options)
    message = "an uncompressed TIFF with a plane per channel must have 8 bits per channel, black the lowest"
    with pytest.raises(ValueError, match=f"raw.tif` is not a readable image: {message}"):
        load_image(tmp_path / "raw.tif")
    with Image.open(tmp_path / "raw.tif") as image:
        image.load()
        with pytest.raises(ValueError, match=message):
            SVQVAEImageProcessor()(image)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", ["bool", "uint8"])
def test_grey_tiffs_whose_one_plane_is_inverted_are_refused(tmp_path, photometric, dtype):
    values = np.arange(24 * 40).reshape(24, 40).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric, byteorder="<")
    expected = np.asarray(load_image(tmp_path / "a.tif"))
    content = (tmp_path / "a.tif").read_bytes()
    resolution_unit = content.index(struct.pack("<HH", 296, 3))  # an entry of 12 bytes that no picture depends on
    planes_apart = struct.pack("<HHIHH", 284, 3, 1, 2, 0)
    planar = io.BytesIO(content[:resolution_unit] + planes_apart + content[resolution_unit + 12 :])
    if photometric == "miniswhite":
        with pytest.raises(ValueError, match="an uncompressed TIFF with a plane per channel must have 8 bits"):
            load_image(planar)
    else:
        assert np.array_equal(load_image(planar), expected)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.gif"])
def test_files_cut_short_are_named(pixels, tmp_path, name):
    path = save(Image.fromarray(pixels), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}` (\(\d+ bytes\) )?is not a readable image"):
        load_image(path)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Pillow gives EPS files to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/STARTED'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(ValueError, match=r"a.png` \(\d+ bytes\) is not a readable image. It must be intact"):
        load_image(path)
    assert not (tmp_path / "STARTED").exists()


@pytest.mark.parametrize("suffix", [".avif", ".bmp", ".gif", ".jpg", ".mpo", ".png", ".ppm", ".tiff", ".webp"])
def test_each_format_is_read(pixels, tmp_path, suffix):
    path = save(Image.fromarray(pixels), tmp_path / f"a{suffix}")
    assert load_image(path).size == (24, 32)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (7, TypeError, "must be a PIL image, .* an open binary file or its bytes, got int"),
        ([], ValueError, "must hold at least one image"),
        ("https://example.com/a.png", ValueError, "must be a local file, because URLs are not read. Download it"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"ndarray images must have shape .* got \(3, 8, 8\)"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"\(RGB\), 4 \(RGBA\) or 1 \(grey\), got \(8, 8, 5\)"),
        (torch.zeros(8, 8, 3), ValueError, r"Tensor images must have shape .* got \(8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.int64), TypeError, "must be uint8 .* or floating point .* got torch.int64"),
        (np.full((8, 8, 3), 255.0), ValueError, r"must lie in \[0, 1\], got \[255, 255\]"),
        (torch.full((3, 8, 8), -1.0), ValueError, r"got \[-1, -1\]. Scale it, or pass uint8"),
    ],
)
def test_wrong_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        SVQVAEImageProcessor()(image)


@pytest.mark.parametrize("pixel_range", [(1, 0), (0,), (0, float("inf")), None, ("0", "1")])
def test_pixel_ranges_that_are_refused(pixel_range):
    with pytest.raises(ValueError, match="`pixel_range` must be two finite numbers"):
        SVQVAEImageProcessor(pixel_range=pixel_range)


def test_keywords_that_nothing_reads_are_refused(tmp_path):
    with pytest.raises(TypeError, match="take only `pixel_range`, got pixel_rnage"):
        SVQVAEImageProcessor(pixel_rnage=(-1, 1))
    config = {"image_processor_type": "SVQVAEImageProcessor", "processor_class": "P", "feature_extractor_type": "F"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"auto_map": {}, "pixel_range": [-1, 1]}))
    assert SVQVAEImageProcessor.from_pretrained(tmp_path).pixel_range == (-1, 1)


@pytest.mark.parametrize("sizes", [[[8, 8], [8, 8]], np.full((2, 2), 8), torch.full((2, 2), 8)])
def test_sizes_are_pairs_of_any_kind(sizes):
    sample = torch.rand(2, 3, 8, 8)
    assert torch.equal(SVQVAEImageProcessor().postprocess(sample, sizes, output_type="pt"), sample)


@pytest.mark.parametrize("size", [(9, 8), (8, -1), (4.0, 4), (8,), None])
def test_sizes_that_are_refused(size):
    with pytest.raises(ValueError, match=r"integers .* from 1 to .* 8 x 8, got .* `SVQVAE.resize_to_image`"):
        SVQVAEImageProcessor().postprocess(torch.zeros(2, 3, 8, 8), [(8, 8), size])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": torch.zeros(3, 8, 8)}, r"`sample` must have shape \(batch, 3, height, width\), got \(3, 8, 8\)"),
        ({"sample": torch.zeros(1, 4, 8, 8)}, r"got \(1, 4, 8, 8\)"),
        ({"sample": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "must be a floating-point tensor .* got torch.uint8"),
        ({"sample": torch.zeros(2, 3, 8, 8), "image_sizes": [(8, 8)]}, "one .* per sample, got 1 for 2"),
        ({"sample": torch.zeros(2, 3, 8, 8), "output_type": "jpg"}, "must be one of pil, np, pt, got 'jpg'"),
    ],
)
def test_samples_that_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SVQVAEImageProcessor().postprocess(**arguments)
