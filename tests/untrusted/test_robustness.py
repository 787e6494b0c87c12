"""What no input may do: give a wrong answer in silence, take the memory, run code, leave half a file."""

import io
import json
import os
import pickle
import struct
import subprocess
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import encoding_process
import numpy as np
import pytest
import torch
from conftest import ROOT, fill, make_tiny
from PIL import Image
from safetensors.torch import load_file

import svqvae_cli
from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.atomic_io import save_png, write_file
from svqvae_hf.conversion.convert import convert
from svqvae_hf.conversion.export import export_graphs
from svqvae_hf.data.image_sets import open_rows
from svqvae_hf.data.token_set_writer import tokenize_set
from svqvae_hf.data.token_sets import SETTINGS_FILE, read_settings
from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.perceptual import load_inception, load_lpips
from svqvae_hf.evaluation.report import write_report
from svqvae_hf.large.large_images import decode_large, encode_large
from svqvae_hf.large.run_record import record_path
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models import image_processing_svqvae
from svqvae_hf.models.image_processing_svqvae import load_image, to_rgb
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import ImageTokens, is_token_file, load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("small_sample")
read_svqvae = partial(read_checkpoint, model_class=SVQVAE)
GOLDEN = ROOT / "tests" / "golden"
NAN, INFINITY = float("nan"), float("inf")


def fails(capsys, *argv) -> str:
    """The one line that the command line says."""
    assert svqvae_cli.main([str(each) for each in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("svqvae: error: ")
    assert said.endswith("\n")
    assert said[:-1].isprintable()
    return said


# Images of odd sizes


@pytest.mark.parametrize("size", [(1, 30_000), (8, 30_000), (30_000, 3)])
def test_strips(tiny_model, no_grad, size):
    height, width = size
    tiny_model.enable_tiling()
    sample = torch.rand(1, 3, height, width)
    ids = tiny_model.encode_tokens(sample)
    assert tuple(ids.shape) == (1, -(-height // 4), -(-width // 4))
    decoded = tiny_model.resize_to_image(tiny_model.decode(ids).sample, size, 1)
    assert decoded.shape == sample.shape
    assert decoded.isfinite().all()


def test_a_strip_from_file_to_file(tiny_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30_000, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image), pixels)
    tiny_model.enable_tiling()
    save_tokens(tmp_path / "a.safetensors", encode_image(tiny_model, image, [1.0, 0.01]))
    whole, small = decode_image(tiny_model, load_tokens(tmp_path / "a.safetensors"))
    assert (whole.size, small.size) == ((30_000, 2), (300, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_one_pixel(tiny_model, tmp_path, mode):
    image = to_rgb(Image.new(mode, (1, 1)))
    save_tokens(tmp_path / "a.safetensors", encode_image(tiny_model, image, [0.01, 1, 3]))
    images = decode_image(tiny_model, load_tokens(tmp_path / "a.safetensors"))
    assert [each.size for each in images] == [(1, 1), (1, 1), (3, 3)]


# Decompression bombs


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP"])
def test_images_of_more_pixels_than_allowed(tmp_path, monkeypatch, kind):
    Image.new("RGB", (90, 90)).save(tmp_path / "a", kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match="a` must keep to Pillow's limit against decompression bombs"):
        load_image(tmp_path / "a")


def test_text_that_unpacks_without_end(tmp_path):
    text = b"zTXt" + b"comment\0\0" + zlib.compress(bytes(1 << 26))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    (tmp_path / "a.png").write_bytes(file.getvalue()[:33] + chunk + file.getvalue()[33:])
    with pytest.raises(ValueError, match=r"a.png` is not a readable image"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_blocks_are_converted_as_the_whole(photo, monkeypatch, mode):
    image = photo.crop((0, 0, 45, 31))
    if mode in ("I;16", "F"):
        grey = np.asarray(image.convert("L"))
        image = Image.fromarray(np.float32(grey) / 255 if mode == "F" else np.uint16(grey) * 257)
    image = image.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(photo.crop((45, 0, 90, 31)).convert("L"))
    whole = np.asarray(to_rgb(image))
    monkeypatch.setattr(image_processing_svqvae, "BLOCK", 8)
    assert np.array_equal(np.asarray(to_rgb(image)), whole)


def archive(path: Path, names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in names.items():
            file.writestr(name, content)


def test_a_compressed_checkpoint_does_not_unpack(tmp_path):
    torch.save({"model": {"a": torch.zeros(100)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        content = {name: file.read(name) for name in file.namelist()}
    content = {name: bytes(1 << 24) if "/data/" in name else each for name, each in content.items()}
    archive(tmp_path / "bomb.pt", content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bomb.pt` must be a whole PyTorch checkpoint .* compressed") as error:
        read_checkpoint(tmp_path / "bomb.pt", SVQVAE)
    assert "the archive unpacks to 167" in str(error.value.__cause__)


def test_records_that_share_their_bytes_do_not_unpack(tmp_path):
    archive(tmp_path / "a.pt", {"a/data.pkl": pickle.dumps({}, 2), "a/data/0": bytes(10_000)})
    content = (tmp_path / "a.pt").read_bytes()
    start, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
    directory = content[start:end] + 99 * content[content.rindex(b"PK\1\2") : end]
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 101, 101, len(directory), start, 0)
    (tmp_path / "a.pt").write_bytes(content[:start] + directory + last)
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        assert len(file.namelist()) == 101
    with pytest.raises(ValueError, match=r"a.pt` must be a whole PyTorch checkpoint .* compressed") as error:
        read_checkpoint(tmp_path / "a.pt", SVQVAE)
    assert "the archive unpacks to 1000" in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("number", "message"), [("{}", "16 levels .* got 1000 levels"), ("0.res.{}", "got 2 levels and 1000 blocks")]
)
def test_a_checkpoint_of_many_levels_is_refused_at_once(tmp_path, number, message):
    weights = load_file(GOLDEN / "svqvae_tiny.safetensors")
    names = [f"encoder.conv_blocks.{number.format(index)}.x" for index in range(1000)]
    torch.save({"model": weights | {name: torch.zeros(1) for name in names}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pt", SVQVAE)


@pytest.mark.parametrize(
    "config", [{"num_res_blocks": 10**9}, {"encoder_ch_mult": (1,) * 999, "decoder_ch_mult": (1,) * 999}]
)
def test_a_config_of_many_levels_is_refused_at_once(config):
    with pytest.raises(ValueError, match="at most 16 levels and 64 residual blocks"):
        make_tiny(**config)


def test_keys_that_are_nests_are_not_spelled_out(tmp_path):
    nest = ()
    for _ in range(12):  # more are refused before
        nest = (nest, nest)
    torch.save({"model": load_file(GOLDEN / "svqvae_tiny.safetensors") | {nest: torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="unexpected: a key of type tuple") as error:
        read_checkpoint(tmp_path / "a.pt", SVQVAE)
    assert len(str(error.value)) < 1000


def test_nested_tensors_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="nested tensors"):
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])
    weights = load_file(GOLDEN / "svqvae_tiny.safetensors") | {"encoder.conv_in.weight": nested}
    torch.save({"model": weights}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"not dense: encoder.conv_in.weight"):
        read_checkpoint(tmp_path / "a.pt", SVQVAE)


def test_what_a_terminal_obeys_is_not_printed(tmp_path, capsys):
    weights = load_file(GOLDEN / "svqvae_tiny.safetensors") | {"a\n\x1b[2J": torch.zeros(1)}
    torch.save({"model": weights}, tmp_path / "a.pt")
    assert r"unexpected: a \x1b[2J." in fails(capsys, "info", tmp_path / "a.pt")


# Tensors


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("tiled", [False, True])
def test_what_is_no_number_has_no_ids(tiny_model, no_grad, value, tiled):
    if tiled:
        tiny_model.enable_tiling(16, 4)
    sample = torch.rand(1, 3, 40, 40)
    sample[0, 1, 30, 17] = value
    with pytest.raises(ValueError, match="`latents` must be finite, but some are NaN or infinite"):
        tiny_model.encode_tokens(sample)
    assert not tiny_model.encode(sample).latents.isfinite().all()
    with pytest.raises(ValueError, match=r"must have values in \[0, 1\]"):
        SVQVAEImageProcessor()(sample[0])
    with pytest.raises(ValueError, match=r"must have values in \[0, 1\]"):
        SVQVAEImageProcessor()(sample[0].movedim(0, -1).numpy())


def test_what_overflows_float16_has_no_ids(tiny_model, no_grad):
    tiny_model.encoder.conv_in.weight *= 1e6
    half = tiny_model.half()
    with pytest.raises(ValueError, match="because float16 may overflow"):
        half.encode_tokens(torch.rand(1, 3, 8, 8).half())


def test_what_is_no_number_is_no_image(tiny_model, no_grad):
    latents = torch.full((1, 8, 2, 2), NAN)
    assert tiny_model.decode(latents).sample.isnan().all()
    with pytest.raises(ValueError, match="must not contain NaN"):
        SVQVAEImageProcessor().postprocess(tiny_model.decode(latents).sample)


def test_no_reader_takes_float_grey_that_is_no_number(tmp_path):
    Image.fromarray(np.full((2, 2), NAN, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a.tif`: .* values in \[0, 1\], got \[nan, nan\]"):
        load_image(tmp_path / "a.tif")


IMAGE, IDS, LATENTS = torch.rand(2, 3, 8, 12), torch.zeros(2, 2, 3, dtype=torch.int64), torch.rand(2, 8, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: model(IMAGE[:0]), ValueError, r"no side of 0, got \(0, 3, 8, 12\)"),
        (lambda model: model.encode_tokens(IMAGE[..., :0]), ValueError, r"no side of 0, got \(2, 3, 8, 0\)"),
        (lambda model: model.decode_tokens(IDS[:0]), ValueError, r"at least one, got \(0, 2, 3, 8\) for 0"),
        (lambda model: model.decode(IDS[:, :0]), ValueError, r"at least one, got \(2, 0, 3, 8\) for 0"),
        (lambda model: model.decode(IDS, shape=(2, 2, 2, 8)), ValueError, r"got \(2, 2, 2, 8\) for 12"),
        (lambda model: model.decode(LATENTS[:0]), ValueError, r"no side of 0, got shape \(0, 8, 2, 3\)"),
        (lambda _: SVQVAEImageProcessor()([]), ValueError, "at least one image"),
        (lambda model: model(IMAGE.double()), TypeError, "model's type torch.float32, got torch.float64"),
        (lambda model: model.encode_tokens(IMAGE.half()), TypeError, "got torch.float16"),
        (lambda model: model.encode(IMAGE.to(torch.float8_e4m3fn)), TypeError, "got torch.float8_e4m3fn"),
        (lambda model: model.encode(IMAGE.byte()), TypeError, "a floating-point tensor .* got torch.uint8"),
        (lambda model: model.encode(IMAGE.numpy()), TypeError, "a floating-point tensor .* got ndarray"),
        (lambda model: model.decode_tokens(IDS.bool()), TypeError, "an integer type, got torch.bool"),
        (lambda model: model.decode_tokens(IDS.to(torch.complex64)), TypeError, "got torch.complex64"),
        (lambda model: model.decode_tokens(IDS.numpy()), TypeError, "must be a tensor .* got ndarray"),
        (lambda model: model.decode(IDS.numpy()), TypeError, "must be a tensor .* got ndarray"),
        (lambda _: SVQVAEImageProcessor()(IMAGE.to(torch.float8_e4m3fn)), TypeError, "got torch.float8_e4m3fn"),
        (lambda _: SVQVAEImageProcessor()(IMAGE.long()), TypeError, "got torch.int64"),
    ],
)
def test_tensors_that_are_refused(tiny_model, no_grad, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_model)


def test_no_image_gives_none_back():
    assert SVQVAEImageProcessor().postprocess(IMAGE[:0]) == []


def test_images_and_ids_in_any_order_of_memory(tiny_model, no_grad):
    def scattered(tensor):
        return torch.stack([tensor, tensor + 1], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    ids = tiny_model.encode_tokens(IMAGE)
    assert not scattered(IMAGE).is_contiguous()
    assert torch.equal(tiny_model.encode_tokens(scattered(IMAGE)), ids)
    assert torch.equal(tiny_model.encode_tokens(IMAGE.flip(-1).flip(-1)), ids)
    assert torch.equal(tiny_model.decode_tokens(scattered(ids)), tiny_model.decode_tokens(ids))
    assert torch.equal(tiny_model.decode(scattered(LATENTS)).sample, tiny_model.decode(LATENTS).sample)
    expanded = IMAGE[:1, :, :1].expand(2, -1, 8, -1)
    assert torch.equal(tiny_model.encode_tokens(expanded), tiny_model.encode_tokens(expanded.contiguous()))
    processor = SVQVAEImageProcessor()
    assert torch.equal(processor(scattered(IMAGE))["pixel_values"], IMAGE)
    flipped = processor(IMAGE[0].movedim(0, -1).numpy()[::-1])["pixel_values"]
    assert torch.equal(flipped, IMAGE[:1].flip(-2))


def test_autocast_takes_any_floating_image(tiny_model, no_grad):
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_model.encode_tokens(IMAGE.bfloat16()).shape == (2, 2, 3)


# Hostile pickles


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def model_folder(path: Path, files: dict[str, bytes]) -> Path:
    make_tiny().save_pretrained(path)
    (path / "diffusion_pytorch_model.safetensors").unlink()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


READERS = {
    "checkpoint.pt": read_svqvae,
    "checkpoint.ckpt": SVQVAE.from_single_file,
    "checkpoint.safetensors": read_svqvae,
    "tokens.safetensors": load_tokens,
    "image.png": load_image,
    "weights.pth": lambda path: load_lpips("alex", path),
    "inception.pth": load_inception,
    "set.parquet": read_settings,
    "large.tif": lambda path: encode_large(make_tiled(), path, path.with_suffix(".safetensors")),
}


def make_tiled() -> SVQVAE:
    model = make_tiny()
    model.enable_tiling(16, 4)
    return model


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_no_reader_runs_what_a_file_holds(tmp_path, name, form):
    content = {"model": Payload(tmp_path / "ran"), "state_dict": Payload(tmp_path / "ran")}
    path = tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert not is_token_file(path)
    with pytest.raises(ValueError, match=name):
        READERS[name](path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["info", "convert", "reconstruct", "encode", "decode", "detokenize"])
def test_no_command_runs_what_a_model_folder_or_file_holds(tmp_path, capsys, photo, command):
    file = tmp_path / "hostile.bin"
    torch.save({"state_dict": Payload(tmp_path / "ran")}, file)
    folder = model_folder(tmp_path / "model", {"diffusion_pytorch_model.bin": file.read_bytes()})
    photo.crop((0, 0, 9, 9)).save(tmp_path / "a.png")
    save_tokens(tmp_path / "a.safetensors", encode_image(make_tiny(), photo.crop((0, 0, 9, 9)), [1.0]))
    out = tmp_path / "out"
    fails(
        capsys,
        *{
            "info": ["info", folder],
            "convert": ["convert", file, out],
            "reconstruct": ["reconstruct", tmp_path / "a.png", "--output", out, "--model", folder],
            "encode": ["encode", tmp_path / "a.png", "--output", out, "--model", folder],
            "decode": ["decode", tmp_path / "a.safetensors", "--output", out, "--model", folder],
            "detokenize": ["detokenize", tmp_path, "--output", out, "--model", folder],
        }[command],
    )
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


def test_from_pretrained_runs_nothing(tmp_path):
    torch.save({"encoder.conv_in.weight": Payload(tmp_path / "ran")}, tmp_path / "hostile.bin")
    content = (tmp_path / "hostile.bin").read_bytes()
    folder = model_folder(tmp_path / "model", {"diffusion_pytorch_model.bin": content})
    with pytest.raises((ValueError, OSError)):
        SVQVAE.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_token_set_runs_nothing(tmp_path):
    """`datasets` once ran a script of the set's name; numpy's pickles are no Parquet either."""
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('ran')")
    (tmp_path / SETTINGS_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="is not a token set"):
        read_settings(tmp_path)
    assert not (tmp_path / "ran").exists()


# Several at once


def test_two_threads_use_one_model(tiny_model, tmp_path):
    tiny_model.enable_tiling(16, 4)
    samples = [torch.rand(1, 3, 24 + 4 * index, 50 - 3 * index) for index in range(8)]

    def work(sample):
        with torch.inference_mode():
            ids = tiny_model.encode_tokens(sample, [1.0, 0.5])
            return [*ids, *tiny_model.decode_tokens(ids), *tiny_model(sample, scales=[1.0, 0.5]).sample]

    alone = [work(sample) for sample in samples]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, samples))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert not tiny_model.quantize.code_counts.any()


def test_two_threads_read_checkpoints(monkeypatch):
    """What torch lets through is a setting of the process: one reader must not take it from another."""
    load, both = torch.load, threading.Barrier(2)

    def slow_load(*args, **options):
        try:
            both.wait(0.3)
        except threading.BrokenBarrierError:
            both.reset()
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", slow_load)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read_svqvae, 4 * [GOLDEN / "llamagen_tiny.pt"]))
    assert {each.format.name for each in found} == {"llamagen"}


def test_two_processes_use_one_model(tiny_model, no_grad):
    """Its weights are in memory that both share."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    sample = torch.rand(1, 3, 20, 30)
    tiny_model.share_memory()
    workers = [context.Process(target=encoding_process.encode, args=(tiny_model, sample, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == 2 * [3 * [tiny_model.encode_tokens(sample).tolist()]]


# A full disk


def tokens_of(side: int) -> ImageTokens:
    ids = torch.randint(300, (side, side), generator=torch.Generator().manual_seed(0))
    return ImageTokens([ids], side * 8, side * 8, (1.0,), 8, None, None, 300, 64 * "0")


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


WRITERS = {
    "file": lambda path, side: write_file(path, bytes(side * side)),
    "tokens": lambda path, side: save_tokens(path, tokens_of(side)),
    "png": lambda path, side: save_png(noise(side), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file(disk, kind):
    path = disk / "kept"
    WRITERS[kind](path, 8)
    old = path.read_bytes()
    fill(disk)
    with pytest.raises(OSError, match=r"/kept` cannot be written: No space left on device\.$"):
        WRITERS[kind](path, 200)
    assert path.read_bytes() == old
    assert sorted(each.name for each in disk.iterdir()) == ["ballast", "kept"]


def test_a_full_disk_leaves_no_part_of_a_report(disk):
    report = evaluate(make_tiny(), [noise(20)], scales=[1.0])
    report.settings |= {"model": "org/name", "data": ["org/photos"], "config": None, "split": None}
    fill(disk)
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        write_report(report, disk / "report")
    assert all(json.loads(path.read_text()) for path in (disk / "report").glob("*.json"))
    assert not list((disk / "report").glob(".*"))


@pytest.mark.parametrize("kind", ["convert", "torch"])
def test_a_full_disk_leaves_no_part_of_a_folder(disk, kind):
    fill(disk)
    make = {
        "convert": lambda out: convert(GOLDEN / "svqvae_tiny.safetensors", out, license="mit"),
        "torch": lambda out: export_graphs(make_tiny(), out, format="torch"),
    }[kind]
    with pytest.raises(OSError, match="/made` cannot be written: .*(No space left|os error 28)"):
        make(disk / "made")
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_full_disk_ends_a_token_set_which_goes_on_when_there_is_room(disk, tmp_path):
    for index in range(6):
        noise(64).save(tmp_path / f"{index}.png")

    def tokenize():
        images = open_rows([str(tmp_path / f"{index}.png") for index in range(6)])
        return tokenize_set(make_tiny(), images, disk / "set", model_name="org/tiny", shard_size=1)

    fill(disk)
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        tokenize()
    assert not (disk / "set").exists()
    (disk / "ballast").unlink()
    assert tokenize().rows == 6
    assert read_settings(disk / "set").model == "org/tiny"


def test_a_full_disk_ends_a_large_output_which_goes_on_when_there_is_room(disk, tmp_path):
    model = make_tiny()
    model.enable_tiling(64, 8)
    noise(300).save(tmp_path / "a.tif")
    encode_large(model, tmp_path / "a.tif", tmp_path / "a.safetensors")
    fill(disk)
    full = (
        r"/a.tif` cannot be written: No space left on device. Free some space, then run the same again with `resume`."
    )
    with pytest.raises(OSError, match=f"{full}|/a.tif.partial.json` cannot be written: No space left on device"):
        decode_large(model, tmp_path / "a.safetensors", disk / "a.tif")
    assert not (disk / "a.tif").exists()
    (disk / "ballast").unlink()
    resume = record_path(disk / "a.tif").exists()
    with pytest.raises(OSError, match=full):  # 300 x 300 x 3 bytes are more than the disk has
        decode_large(model, tmp_path / "a.safetensors", disk / "a.tif", resume=resume)
    assert not (disk / "a.tif").exists()
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    decode_large(model, tmp_path / "a.safetensors", disk / "a.tif", resume=True)
    decode_large(model, tmp_path / "a.safetensors", tmp_path / "b.tif")
    assert (disk / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


@pytest.mark.parametrize("command", ["encode", "reconstruct", "decode", "tokenize", "convert"])
def test_the_command_line_says_that_the_disk_is_full(disk, tmp_path, capsys, command):
    make_tiny().save_pretrained(tmp_path / "model")
    noise(400).save(tmp_path / "a.png")
    save_tokens(tmp_path / "a.safetensors", encode_image(make_tiny(), noise(400), [1.0]))
    fill(disk)
    out, model = disk / "out", ["--model", tmp_path / "model"]
    line = fails(
        capsys,
        *{
            "encode": ["encode", tmp_path / "a.png", "--output", out, *model],
            "reconstruct": ["reconstruct", tmp_path / "a.png", "--output", out, *model],
            "decode": ["decode", tmp_path / "a.safetensors", "--output", out, *model],
            "tokenize": ["tokenize", tmp_path / "a.png", out, *model, "--workers", "0"],
            "convert": ["convert", GOLDEN / "svqvae_tiny.safetensors", out, "--license", "mit"],
        }[command],
    )
    assert "cannot be written" in line
    assert "No space left on device" in line or "os error 28" in line
    left = [path.name for path in disk.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert left == ["ballast"]
