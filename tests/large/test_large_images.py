import errno
import json
import os
import pickle
import re
import shutil
import tracemalloc

import numcodecs
import numpy as np
import pytest
import tifffile
import torch
import zarr
from conftest import ROOT, make_tiny
from PIL import Image

import svqvae_cli
from svqvae_hf.atomic_io import os_error
from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.large import large_files, large_images
from svqvae_hf.large.large_files import UnsupportedError, find_large_images, open_large_image
from svqvae_hf.large.large_images import decode_large, encode_large, reconstruct_large, record_path
from svqvae_hf.models.image_processing_svqvae import load_image
from svqvae_hf.tokens.image_tokens import decode_image, encode_image, image_tokens
from svqvae_hf.tokens.token_files import load_tokens, save_tokens, token_file_header

pytestmark = pytest.mark.usefixtures("small_sample")
# Height and width, tile and overlap: sides that are no multiples of a tile, of f, or as small as can be.
GEOMETRIES = [
    ((75, 49), (32, 8)),
    ((33, 129), (32, 4)),
    ((31, 30), (32, 8)),
    ((5, 90), (16, 4)),
    ((90, 1), (16, 4)),
    ((1, 1), (16, 0)),
    ((64, 40), (8, 0)),
]


@pytest.fixture
def model():
    tiny = make_tiny()
    tiny.enable_tiling(32, 8)
    return tiny


@pytest.fixture
def tiff(tmp_path, photo):
    """A TIFF of 70 x 90 pixels: twenty tiles."""
    return save_tiff(tmp_path / "photo.tif", np.asarray(photo)[100:190, 100:170])


def save_tiff(path, pixels, **options):
    tifffile.imwrite(path, pixels, **({"photometric": "rgb"} | options))
    return path


def read_image(path):
    return zarr.open_array(path, mode="r")[:] if path.suffix == ".zarr" else tifffile.imread(path)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("size", "tiles"), GEOMETRIES)
@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_ids_and_pixels_are_those_of_the_image_in_memory(size, tiles, suffix, model, photo, tmp_path):
    model.enable_tiling(*tiles)
    image = photo.crop((100, 100, 100 + size[1], 100 + size[0]))
    source = save_tiff(tmp_path / "a.tif", np.asarray(image))
    tokens = encode_image(model, image, [1.0])
    save_tokens(tmp_path / "memory.safetensors", tokens)
    (expected,) = decode_image(model, tokens)

    encode_large(model, source, tmp_path / "large.safetensors")
    decode_large(model, tmp_path / "large.safetensors", tmp_path / f"decoded{suffix}")
    result = reconstruct_large(model, source, tmp_path / f"reconstructed{suffix}")

    assert (tmp_path / "large.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    for name in ("decoded", "reconstructed"):
        assert np.array_equal(read_image(tmp_path / f"{name}{suffix}"), expected)
    (in_memory,) = measure_reconstructions(image, tokens, [expected])
    assert result.psnr == pytest.approx(in_memory.psnr)
    assert np.array_equal(result.codes, in_memory.codes)
    assert result[:4] == in_memory[:4]
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, model, tiff, tmp_path):
    model.to(dtype)
    encode_large(model, tiff, tmp_path / "a.safetensors")
    decode_large(model, tmp_path / "a.safetensors", tmp_path / "a.tif")
    tokens = encode_image(model, Image.open(tiff), [1.0])
    assert torch.equal(load_tokens(tmp_path / "a.safetensors").ids[0], tokens.ids[0])
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), decode_image(model, tokens)[0])


def test_output_is_a_tiled_bigtiff_that_others_read(model, tiff, tmp_path):
    reconstruct_large(model, tiff, tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        assert file.pages[0].is_tiled
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.tif")), tifffile.imread(tmp_path / "a.tif"))


def test_output_of_several_tiles_each_way(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (300, 530, 3), dtype=np.uint8)
    for output, path in (
        (large_files.TiffOutput, tmp_path / "a.tif"),
        (large_files.ZarrOutput, tmp_path / "a.zarr"),
    ):
        output.create(path, 300, 530)
        with output(path) as opened:
            for top in range(0, 300, 100):
                for left in range(0, 530, 265):
                    opened.write(top, left, values[top : top + 100, left : left + 265])
        assert np.array_equal(read_image(path), values)


def test_no_window_is_larger_than_a_tile(model, tmp_path, photo, monkeypatch):
    source = save_tiff(tmp_path / "a.tif", np.asarray(photo)[:150, :200])
    sides = []
    read = large_files.LargeImage.read

    def spy(image, rows, columns):
        sides.append(max(rows.stop - rows.start, columns.stop - columns.start))
        return read(image, rows, columns)

    monkeypatch.setattr(large_files.LargeImage, "read", spy)
    encode_large(model, source, tmp_path / "a.safetensors")
    assert max(sides) <= model.tile_size


@pytest.mark.parametrize("codebook_size", [64, 2**16, 2**16 + 1])
def test_header_is_that_of_a_token_file(codebook_size, tmp_path):
    model = make_tiny(codebook_size=codebook_size)
    tokens = image_tokens(model, [torch.randint(64, (5, 7))], 19, 27, [1.0])
    save_tokens(tmp_path / "a.safetensors", tokens)
    header = token_file_header(tokens)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content.startswith(header)
    assert len(content) == len(header) + 5 * 7 * (2 if codebook_size <= 2**16 else 4)


def colours(channels, dtype=np.uint8):
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max + 1, (50, 70, *channels), dtype=dtype)


TIFFS = {
    "grey": (colours(()), {"photometric": "minisblack"}),
    "grey of 16 bits": (colours((), np.uint16), {"photometric": "minisblack"}),
    "grey of 16 bits, big-endian, strips": (
        colours((), np.uint16),
        {"photometric": "minisblack", "byteorder": ">", "compression": "zlib", "rowsperstrip": 7},
    ),
    "rgb": (colours((3,)), {}),
    "rgb, strips": (colours((3,)), {"rowsperstrip": 8}),
    "rgb, BigTIFF": (colours((3,)), {"bigtiff": True}),
    "rgb, LZW": (colours((3,)), {"compression": "lzw", "rowsperstrip": 8, "predictor": True}),
    "rgb, deflated tiles": (colours((3,)), {"compression": "zlib", "tile": (16, 32), "predictor": True}),
    "rgb, tiles": (colours((3,)), {"tile": (16, 32)}),
    "rgb of 16 bits": (colours((3,), np.uint16), {}),
    "rgb of 16 bits, big-endian": (colours((3,), np.uint16), {"byteorder": ">"}),
    "rgba": (colours((4,)), {"extrasamples": ["unassalpha"]}),
    "rgba, premultiplied": (colours((4,)), {"extrasamples": ["assocalpha"]}),
    "rgba of 16 bits": (colours((4,), np.uint16), {"extrasamples": ["unassalpha"], "tile": (32, 32)}),
    "rgb and a channel that is no alpha": (colours((4,)), {"extrasamples": ["unspecified"]}),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff_is_read_as_by_load_image(kind, tmp_path):
    pixels, options = TIFFS[kind]
    path = save_tiff(tmp_path / "a.tif", pixels, **options)
    expected = np.asarray(load_image(path))
    with open_large_image(path) as image:
        assert (image.height, image.width) == (50, 70)
        for rows, columns in [((0, 50), (0, 70)), ((3, 20), (0, 20)), ((3, 20), (10, 40)), ((3, 20), (33, 70))]:
            assert np.array_equal(image.read(slice(*rows), slice(*columns)), expected[slice(*rows), slice(*columns)])


def test_planes_apart_and_further_pages(tmp_path):
    pixels = colours((3,))
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", compression="zlib")
        file.write(255 - pixels, photometric="rgb")
    with open_large_image(path) as image:
        assert np.array_equal(image.read(slice(5, 30), slice(8, 60)), pixels[5:30, 8:60])


def test_jpeg_in_tiff_is_read_close_to_load_image(tmp_path, photo):
    path = save_tiff(tmp_path / "a.tif", np.asarray(photo), compression="jpeg", tile=(64, 64))
    with open_large_image(path) as image:
        window = image.read(slice(0, photo.height), slice(0, photo.width))
    assert np.abs(window.astype(int) - np.asarray(load_image(path))).max() <= 8


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_in(version, model, tiff, tmp_path):
    pixels = tifffile.imread(tiff)
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=pixels.shape, chunks=(40, 33, 3), dtype="uint8", zarr_format=version
    )
    array[:] = pixels
    encode_large(model, tmp_path / "a.zarr", tmp_path / "zarr.safetensors")
    encode_large(model, tiff, tmp_path / "tiff.safetensors")
    assert (tmp_path / "zarr.safetensors").read_bytes() == (tmp_path / "tiff.safetensors").read_bytes()
    assert find_large_images([str(tmp_path), str(tmp_path / "a.zarr")]) == [tiff, tmp_path / "a.zarr"]


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def broken_images(folder):
    """Paths that are no image, or none that is read, and what is said of each."""
    rgb = colours((3,))
    yield save_tiff(folder / "cmyk.tif", colours((4,)), photometric="separated"), "SEPARATED"
    yield save_tiff(folder / "float.tif", rgb.astype(np.float32)), "32 bits"
    yield save_tiff(folder / "white.tif", colours(()), photometric="miniswhite"), "MINISWHITE"
    yield save_tiff(folder / "bits.tif", colours(()) > 9, photometric="minisblack"), "1 bits"
    yield save_tiff(folder / "turned.tif", rgb, extratags=[(274, 3, 1, 6, True)]), "orientation 6"
    (folder / "empty.tif").write_bytes(b"")
    yield folder / "empty.tif", "cannot be read"
    (folder / "text.tif").write_text("not an image")
    yield folder / "text.tif", "cannot be read"
    for name, options in (("whole", {}), ("tiled", {"tile": (16, 16)}), ("lzw", {"compression": "lzw"})):
        cut_short(save_tiff(folder / f"{name}.tif", rgb, **options))
        yield folder / f"{name}.tif", "cannot be read"
    path = save_tiff(folder / "missing.tif", rgb, compression="zlib", rowsperstrip=50)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["RowsPerStrip"].overwrite(10)
    yield path, "strips or tiles are missing"
    zarr.create_array(folder / "grey.zarr", shape=(9, 9), dtype="uint8")
    yield folder / "grey.zarr", r"\(9, 9\) of uint8"
    zarr.create_array(folder / "wide.zarr", shape=(9, 9, 3), dtype="uint16")
    yield folder / "wide.zarr", "of uint16"
    zarr.create_group(folder / "group.zarr")
    yield folder / "group.zarr", "cannot be read"


def test_what_is_no_image_is_refused_in_one_line_that_names_it(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for path, message in broken_images(tmp_path / "in"):
        with pytest.raises(ValueError, match=message) as caught:
            encode_large(model, path, tmp_path / "out" / "a.safetensors")
        assert str(path) in str(caught.value)
        assert names(tmp_path / "out") == []
    with pytest.raises(FileNotFoundError):
        encode_large(model, tmp_path / "nothing.tif", tmp_path / "out" / "a.safetensors")


@pytest.mark.parametrize(
    ("filters", "compressor"),
    [
        ([{"id": "pickle"}], None),
        ([{"id": "shuffle", "elementsize": 1}, {"id": "pickle"}], None),
        ([{"id": "pickle"}, {"id": "shuffle", "elementsize": 1}], None),
        (None, {"id": "pickle"}),
    ],
)
def test_zarr_whose_chunks_are_pickles_is_refused_and_not_run(filters, compressor, model, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    source = tmp_path / "a.zarr"
    zarr.create_array(source, shape=(9, 9, 3), chunks=(9, 9, 3), dtype="uint8", zarr_format=2)
    metadata = json.loads((source / ".zarray").read_text()) | {"filters": filters, "compressor": compressor}
    (source / ".zarray").write_text(json.dumps(metadata))
    (source / "0.0.0").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="cannot be read"):
        encode_large(model, source, tmp_path / "a.safetensors")
    assert names(tmp_path) == ["a.zarr"]


COMPRESSORS = {
    "zstd": (zarr.codecs.ZstdCodec(), numcodecs.Zstd()),
    "gzip": (zarr.codecs.GzipCodec(), numcodecs.GZip()),
    "blosc": (zarr.codecs.BloscCodec(), numcodecs.Blosc()),
    "none": (None, None),
    "zlib": (None, numcodecs.Zlib()),
    "lz4": (None, numcodecs.LZ4()),
}
LAYOUTS = {"version 2": {"zarr_format": 2}, "version 3": {}, "shards": {"shards": (32, 64, 3)}}


def make_zarr(path, compressor, layout):
    return zarr.create_array(
        path,
        shape=(50, 70, 3),
        chunks=(16, 32, 3),
        dtype="uint8",
        compressors=COMPRESSORS[compressor][layout == "version 2"],
        **LAYOUTS[layout],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_zarr_of_other_tools_is_read(compressor, layout, tmp_path):
    pixels = colours((3,))
    make_zarr(tmp_path / "a.zarr", compressor, layout)[:] = pixels
    with open_large_image(tmp_path / "a.zarr") as image:
        assert np.array_equal(image.read(slice(3, 40), slice(10, 60)), pixels[3:40, 10:60])


def test_filters_that_keep_the_size_are_read(tmp_path):
    options = {"shape": (50, 70, 3), "chunks": (16, 32, 3), "dtype": "uint8"}
    filters = {2: [numcodecs.Shuffle(1)], 3: [zarr.codecs.TransposeCodec(order=(2, 0, 1))]}
    for version, of_version in filters.items():
        path = tmp_path / f"{version}.zarr"
        zarr.create_array(path, filters=of_version, zarr_format=version, **options)[:] = colours((3,))
        with open_large_image(path) as image:
            assert np.array_equal(image.read(slice(0, 50), slice(0, 70)), colours((3,)))


@pytest.mark.parametrize("compressor", [zarr.codecs.ZstdCodec(), zarr.codecs.GzipCodec()])
def test_checksums_within_and_around_a_compressor_are_read(compressor, tmp_path):
    codecs = [zarr.codecs.Crc32cCodec(), compressor, zarr.codecs.Crc32cCodec()]
    values = colours((3,))
    zarr.create_array(tmp_path / "a", data=values, chunks=(16, 32, 3), compressors=codecs)
    with open_large_image(tmp_path / "a") as image:
        assert np.array_equal(image.read(slice(0, 50), slice(0, 70)), values)


@pytest.mark.parametrize(
    ("compressor", "layout"),
    [*((name, "version 2") for name in COMPRESSORS if name != "none"), ("zstd", "version 3"), ("zstd", "shards")],
)
def test_chunk_takes_no_more_memory_than_it_is_declared_to(compressor, layout, tmp_path):
    path = tmp_path / "a.zarr"
    make_zarr(path, compressor, layout)[:] = 1
    bomb = COMPRESSORS[compressor][1].encode(np.zeros(1 << 26, np.uint8))
    if layout == "version 2":
        (path / "0.0.0").write_bytes(bomb)
    else:
        shard = path / "c" / "0" / "0" / "0"
        index = np.full((2, 2, 2), 2**64 - 1, "<u8")  # of the shard's chunks, where each is; none but the first
        index[0, 0] = 0, len(bomb)
        checksum = numcodecs.CRC32C(location="end").encode(index.ravel().view(np.uint8))[-4:]
        tail = b"" if layout == "version 3" else index.tobytes() + bytes(checksum)
        shard.write_bytes(bytes(bomb) + tail)
    tracemalloc.start()
    try:
        with open_large_image(path) as image, pytest.raises(ValueError, match="cannot be read"):
            image.read(slice(0, 16), slice(0, 32))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("version", [2, 3])
def test_chunk_compressed_twice_is_refused(version, tmp_path):
    options = {"shape": (9, 9, 3), "dtype": "uint8", "zarr_format": version}
    if version == 2:
        zarr.create_array(tmp_path / "a", filters=[numcodecs.Zlib()], compressors=numcodecs.Zlib(), **options)
    else:
        zarr.create_array(tmp_path / "a", compressors=[zarr.codecs.ZstdCodec(), zarr.codecs.GzipCodec()], **options)
    with pytest.raises(ValueError, match=r"compressed once at most, .* encoded by"), open_large_image(tmp_path / "a"):
        pass


def test_chunk_of_another_compressor_is_refused(tmp_path):
    options = {"shape": (9, 9, 3), "dtype": "uint8", "zarr_format": 2}
    zarr.create_array(tmp_path / "a", compressors=numcodecs.LZMA(), **options)
    with pytest.raises(UnsupportedError, match="encoded by `lzma`"), open_large_image(tmp_path / "a"):
        pass


def test_what_is_whole_but_unsupported_is_not_called_broken(tmp_path):
    path = tmp_path / "a.zarr"
    options = {"shape": (9, 9, 3), "zarr_format": 2, "filters": [numcodecs.Delta("u1")]}
    zarr.create_array(path, dtype="uint8", **options)
    filters = r"^`.*a.zarr`: chunks must be compressed .* by shuffle .* transpose.* encoded by `delta`\. Store .*\.$"
    with pytest.raises(UnsupportedError, match=filters), open_large_image(path):
        pass
    zarr.create_array(path, dtype="uint16", overwrite=True, **options)
    with pytest.raises(UnsupportedError, match=r"^`.*a.zarr`: an array must be .* of uint16"), open_large_image(path):
        pass


@pytest.mark.parametrize("change", [lambda chunk: chunk + b"more", lambda chunk: chunk[:-1]])
@pytest.mark.parametrize("compressor", ["gzip", "zlib"])
def test_chunk_is_one_whole_stream(compressor, change, tmp_path):
    make_zarr(tmp_path, compressor, "version 2")[:] = 1
    chunk = tmp_path / "0.0.0"
    chunk.write_bytes(change(chunk.read_bytes()))
    with open_large_image(tmp_path) as image, pytest.raises(ValueError, match=f"one whole stream of {compressor}"):
        image.read(slice(0, 16), slice(0, 32))


def test_chunk_that_is_too_large_to_decode_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("svqvae_hf.untrusted.images.MAX_CHUNK_BYTES", 50 * 70 * 3 - 1)
    path = save_tiff(tmp_path / "a.tif", colours((3,)), compression="zlib", rowsperstrip=50)
    with pytest.raises(ValueError, match="Store the image in tiles"):
        encode_large(model, path, tmp_path / "a.safetensors")


def test_strips_that_are_too_wide_to_keep_are_refused(model, tmp_path, monkeypatch):
    path = save_tiff(tmp_path / "a.tif", colours((3,)), compression="zlib", rowsperstrip=8)
    monkeypatch.setattr(large_files, "BLOCK_LIMIT", 20 * 62)
    with open_large_image(path) as image:
        image.read(slice(0, 20), slice(0, 8))
        with pytest.raises(UnsupportedError, match=r"^`.*a.tif`: .* at most 67 pixels a row, since 21 .* has 70\."):
            image.read(slice(0, 21), slice(0, 8))


def test_tokens_that_cannot_be_decoded_are_refused(model, tiff, tmp_path):
    with Image.open(tiff) as image:
        save_tokens(tmp_path / "two.safetensors", encode_image(model, image, [1.0, 0.5]))
    with pytest.raises(ValueError, match=r"scale 1 alone .* has 1, 0\.5"):
        decode_large(model, tmp_path / "two.safetensors", tmp_path / "a.tif")
    encode_large(model, tiff, tmp_path / "one.safetensors")
    with torch.no_grad():
        model.quantize.embedding.weight.add_(1)
    with pytest.raises(ValueError, match="codebook"):
        decode_large(model, tmp_path / "one.safetensors", tmp_path / "a.tif")


def test_model_without_tiles_is_refused(tiny_model, tiff, tmp_path):
    with pytest.raises(ValueError, match="enable_tiling"):
        encode_large(tiny_model, tiff, tmp_path / "a.safetensors")


def stop_at(tile):
    def on_tile(done, total):
        if done == tile:
            raise KeyboardInterrupt

    return on_tile


def test_run_whose_disk_fails_for_a_while_goes_on(model, tiff, tmp_path, monkeypatch):
    reads = []
    read = large_files.LargeImage.read

    def fail_once(image, rows, columns):
        reads.append(rows)
        if len(reads) == 15:
            image.values = unreadable
            image._block = None
        return read(image, rows, columns)

    def unreadable(rows, columns):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(large_files.LargeImage, "read", fail_once)
    target = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match=r"^`.*photo.tif` cannot be read: Input/output error\.$") as caught:
        encode_large(model, tiff, target)
    assert caught.value.errno == errno.EIO
    rest = []
    encode_large(model, tiff, target, resume=True, on_tile=lambda *count: rest.append(count))
    assert len(rest) < rest[-1][1]


def test_full_disk_names_the_way_on(model, tiff, tmp_path, monkeypatch):
    write = large_images.write_file
    records = []

    def full_disk(path, content):
        records.append(content)
        if len(records) == 3:
            raise os_error("no space", OSError(errno.ENOSPC, "No space left on device"))
        write(path, content)

    monkeypatch.setattr(large_images, "write_file", full_disk)
    with pytest.raises(OSError, match=r"a.safetensors` cannot be written: No space .* `resume` goes on"):
        encode_large(model, tiff, tmp_path / "a.safetensors")
    encode_large(model, tiff, tmp_path / "a.safetensors", resume=True)


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_interrupted_run_goes_on_to_the_same_result(suffix, model, tiff, tmp_path):
    counts = []
    reconstruct_large(model, tiff, tmp_path / f"unbroken{suffix}", on_tile=lambda *count: counts.append(count))
    total = len(counts)
    assert counts == [(i + 1, total) for i in range(total)]
    target = tmp_path / f"a{suffix}"
    for tile in range(3, total, 5):  # in each pass, in the first tile of a row and within it
        with pytest.raises(KeyboardInterrupt):
            reconstruct_large(model, tiff, target, resume=True, on_tile=stop_at(tile))
        assert record_path(target).exists()
        assert not target.exists()
    rest = []
    result = reconstruct_large(model, tiff, target, resume=True, on_tile=lambda *count: rest.append(count))
    assert rest == counts[-len(rest) :]
    assert len(rest) < total / 3
    assert np.array_equal(read_image(target), read_image(tmp_path / f"unbroken{suffix}"))
    assert result.tokens == 23 * 18
    assert not list(tmp_path.glob("*.partial*"))


def test_interrupted_encoding_and_decoding_go_on(model, tiff, tmp_path):
    for name, stop in (("unbroken", 0), ("broken", 17)):
        for run, source, target in (
            (encode_large, tiff, tmp_path / f"{name}.safetensors"),
            (decode_large, tmp_path / f"{name}.safetensors", tmp_path / f"{name}.tif"),
        ):
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    run(model, source, target, on_tile=stop_at(stop))
            run(model, source, target, resume=True)
    for suffix in (".safetensors", ".tif"):
        assert (tmp_path / f"broken{suffix}").read_bytes() == (tmp_path / f"unbroken{suffix}").read_bytes()


def test_run_goes_on_only_as_it_was_begun(model, tiff, tmp_path):
    target = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encode_large(model, tiff, target, on_tile=stop_at(9))
    with pytest.raises(ValueError, match="--resume"):
        encode_large(model, tiff, target)
    other = make_tiny(commit_loss_beta=0.5)
    other.enable_tiling(32, 8)
    with pytest.raises(ValueError, match="differ: model"):
        encode_large(other, tiff, target, resume=True)
    model.enable_tiling(16, 4)
    with pytest.raises(ValueError, match="differ: tile_size, overlap"):
        encode_large(model, tiff, target, resume=True)
    model.enable_tiling(32, 8)
    kept = record_path(target).read_bytes()
    record_path(target).write_text("{")
    with pytest.raises(ValueError, match="Remove it"):
        encode_large(model, tiff, target, resume=True)
    record_path(target).write_bytes(kept)
    save_tiff(tiff, tifffile.imread(tiff)[:, :69])
    with pytest.raises(ValueError, match="differ: input"):
        encode_large(model, tiff, target, resume=True)
    record_path(target).unlink()
    encode_large(model, tiff, target)
    assert load_tokens(target).width == 69
    assert not list(tmp_path.glob("*.partial*"))


def test_folder_is_not_overwritten(model, tiff, tmp_path):
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ValueError, match="must be new"):
        reconstruct_large(model, tiff, tmp_path / "a.zarr")


def test_file_in_the_place_of_a_zarr_array_is_refused_before_the_work(model, tiff, tmp_path):
    (tmp_path / "a.zarr").touch()
    with pytest.raises(ValueError, match="must be new"):
        reconstruct_large(model, tiff, tmp_path / "a.zarr", on_tile=lambda *_: pytest.fail("it has begun"))


@pytest.fixture
def saved(tmp_path_factory, model):
    """Arguments of the command line for a saved model and its tiles."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return ["--model", str(folder), "--device", "cpu"]


TILES = ["--tile-size", "32", "--overlap", "8"]


def test_command_line_goes_to_tokens_and_back(saved, model, tiff, tmp_path, capsys):
    out = tmp_path / "out"
    assert svqvae_cli.main(["encode", str(tiff), "--large", "--output", str(out), *saved, *TILES]) == 0
    assert svqvae_cli.main(["decode", str(out / "photo.safetensors"), "--large", "--output", str(out), *saved]) == 0
    assert capsys.readouterr().out == ""
    argv = ["reconstruct", str(tiff), "--large", "--output", str(out), *saved, *TILES]
    assert svqvae_cli.main(argv) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "image"
    assert row.split()[:4] == ["photo.tif", "1", "70x90", "414"]
    assert names(out) == ["photo.safetensors", "photo_x1.tif"]
    with Image.open(tiff) as image:
        expected = decode_image(model, encode_image(model, image, [1.0]))[0]
    assert np.array_equal(read_image(out / "photo_x1.tif"), expected)


def test_command_line_resumes_and_leaves_what_is_whole(saved, tiff, tmp_path, capsys, monkeypatch):
    shutil.copy(tiff, tmp_path / "second.tif")
    out = tmp_path / "out"
    argv = ["encode", str(tmp_path), "--large", "--output", str(out), *saved, *TILES]
    encode = large_images.encode_large

    def interrupted(model, source, target, resume, on_tile):
        encode(model, source, target, resume, stop_at(9) if source.name == "second.tif" else on_tile)

    monkeypatch.setattr(large_images, "encode_large", interrupted)
    assert svqvae_cli.main(argv) == 130
    line, last = capsys.readouterr().err.splitlines()
    assert f"`{out / 'second.safetensors'}` is not complete yet" in line
    assert "--resume" in line
    assert last == "svqvae: interrupted"
    monkeypatch.setattr(large_images, "encode_large", encode)
    before = (out / "photo.safetensors").stat().st_mtime_ns
    assert svqvae_cli.main([*argv, "--resume"]) == 0
    assert (out / "photo.safetensors").stat().st_mtime_ns == before
    assert names(out) == ["photo.safetensors", "second.safetensors"]


def test_mistakes_on_the_command_line_are_one_line(saved, tiff, tmp_path, capsys):
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    for argv, message in (
        (["encode", tiff, "--resume"], "Add --large"),
        (["encode", tiff, "--large", "--scales", "0.5"], "scale 1 alone"),
        (["reconstruct", tiff, "--large", "--side-by-side"], "--side-by-side"),
        (["encode", ROOT / "docs" / "images", "--large"], "has no file that ends in .tif"),
        (["encode", ROOT / "docs" / "images" / "chelsea.png", "--large"], "cannot be read as TIFF"),
        (["reconstruct", tmp_path / "broken.tif", "--large"], "cannot be read as TIFF"),
        (["encode", tiff, "--large", "--tile-size", "31"], "multiple of f"),
    ):
        out = tmp_path / "out"
        assert svqvae_cli.main([*map(str, argv), "--output", str(out), *saved]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "large_images.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_code_block_of_the_documentation_runs(code, tmp_path, monkeypatch, photo):
    save_tiff(tmp_path / "scan.tif", np.asarray(photo))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert read_image(tmp_path / "scan_x1.tif").shape == (photo.height, photo.width, 3)
