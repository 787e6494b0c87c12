import base64
import io
import json
import re
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cli_runner import svqvae
from conftest import ROOT, Lazy
from generators import make_next_scale
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from PIL import Image

from svqvae_hf.demo.previews import draw_codes, preview_scales
from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.tokens.image_tokens import decode_image, encode_image

demo = Lazy("svqvae_hf.demo.page")


@pytest.fixture
def picture(photo):
    return photo.crop((150, 80, 214, 121))  # 64 x 41


@pytest.fixture
def page(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("svqvae_hf.demo.page.CACHE", str(tmp_path / "cache"))
    return demo.Page(tiny_model)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def error_shown(values):
    """Message of an error, with no results shown."""
    message, results, *_ = values
    assert not results.visible
    assert "role='alert'" in message
    return message


def test_previews_match_tokens_and_metrics(tiny_model, picture):
    tokens = encode_image(tiny_model, picture, demo.SCALES)
    shown = list(preview_scales(tiny_model, tokens, picture))
    images = decode_image(tiny_model, tokens)
    for preview, image, result in zip(shown, images, measure_reconstructions(picture, tokens, images), strict=True):
        np.testing.assert_array_equal(preview.image, image)
        assert preview.figures["PSNR"] == f"{result.psnr:.2f} dB"
        assert preview.figures["bits per pixel"] == f"{result.bits_per_pixel:.3f}"
        assert preview.figures["tokens"].endswith(f"= {result.tokens}")
        assert preview.figures["size"] == f"{image.width} × {image.height}"


def test_code_grid_has_ids_and_their_pictures(tiny_model, picture):
    tokens = encode_image(tiny_model, picture, [1, 4])
    for preview, ids in zip(preview_scales(tiny_model, tokens, picture), tokens.ids, strict=True):
        grid = json.loads(json.dumps(preview.code_grid))  # as the browser receives it
        cells = np.frombuffer(base64.b64decode(grid["cells"]), "<u4").reshape(grid["height"], grid["width"])
        assert grid.keys() <= set(re.findall(r"\w+", (demo.STATIC / "code_grid.js").read_text()))
        codes = np.array(grid["codes"])
        np.testing.assert_array_equal(codes[cells], ids)
        side, columns = grid["look_px"], grid["columns"]
        sheet = pixels(io.BytesIO(base64.b64decode(grid["looks"].removeprefix("data:image/png;base64,"))))
        for index, look in enumerate(draw_codes(tiny_model, torch.from_numpy(codes))):
            top, left = index // columns * side, index % columns * side
            np.testing.assert_array_equal(sheet[top : top + side, left : left + side], look)


def test_encode_shows_photograph_beside_reconstructions(page, tiny_model, picture, tmp_path):
    picture.save(tmp_path / "cat & mouse.png")
    summary, tabs, *outputs = page.encode(str(tmp_path / "cat & mouse.png"))
    tokens = encode_image(tiny_model, picture, demo.SCALES)
    assert "cat &amp; mouse.png" in summary
    assert "64 × 41 pixels" in summary
    assert tabs.visible
    tabs = zip(outputs[::3], outputs[1::3], outputs[2::3], strict=True)
    for ((left, right), figures, grid), decoded in zip(tabs, decode_image(tiny_model, tokens), strict=True):
        np.testing.assert_array_equal(pixels(left), picture)
        np.testing.assert_array_equal(pixels(right), decoded)
        assert "bits per pixel" in figures
        assert grid["codes"]


def test_two_visitors_at_once_get_their_own_pictures(page, photo, tmp_path, monkeypatch):
    """Both encode before either decodes, one by tiles and one as a whole."""
    monkeypatch.setattr("svqvae_hf.tokens.image_tokens.GIB", 2**23)
    encode, both = demo.encode_image, threading.Barrier(2, timeout=60)
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    for path, side in zip(paths, (64, 290), strict=True):
        photo.crop((0, 0, side, side)).save(path)
    alone = [page.encode(str(path)) for path in paths]

    def encode_together(*args, **options):
        both.wait()
        assert not page.model.use_tiling
        tokens = encode(*args, **options)
        both.wait()
        return tokens

    monkeypatch.setattr("svqvae_hf.demo.page.encode_image", encode_together)
    with ThreadPoolExecutor(2) as pool:
        together = [*pool.map(page.encode, map(str, paths))]
    for (_, _, *expected), (_, _, *found) in zip(alone, together, strict=True):
        for (_, right), (_, wanted) in zip(found[::3], expected[::3], strict=True):
            np.testing.assert_array_equal(pixels(right), pixels(wanted))
        assert found[1::3] + found[2::3] == expected[1::3] + expected[2::3]


def test_errors_show_no_folders(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<b>no image</b>")
    answer = page.encode(str(broken))
    assert "`broken.png`" in error_shown(answer)
    assert str(tmp_path) not in answer[0]


def test_too_large_image_is_an_error_before_decoding(page, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (11000, 11000)).save(path)
    path.write_bytes(path.read_bytes()[:60])  # a decoder would say that it is cut short
    assert "at most 17 million pixels" in error_shown(page.encode(str(path)))


def test_taken_port_is_an_error():
    class Taken:
        def launch(self, **_):
            raise OSError("Cannot find empty port")

        def close(self):
            pass

    message = "Could not serve the page at `localhost`, port 7860. Choose another --host or --port."
    with pytest.raises(OSError, match=message), demo.serving(Taken(), "localhost", 7860):
        pass


def test_the_command_serves_either_page_until_it_is_interrupted(saved_model, tmp_path, monkeypatch, capsys):
    def shown(page, host, port):
        return nullcontext(f"{type(page).__name__} at {host}:{port}")

    monkeypatch.setattr("svqvae_hf.demo.page.serving", shown)
    for module in ("page", "generator_page"):
        monkeypatch.setattr(f"svqvae_hf.demo.{module}.build", lambda page: page)
    monkeypatch.setattr(threading, "Event", lambda: Mock(wait=Mock(side_effect=KeyboardInterrupt)))
    make_next_scale().save_pretrained(tmp_path / "pipeline")
    for options, name in (("--model", saved_model), "Page"), (("--generator", tmp_path / "pipeline"), "GeneratorPage"):
        assert svqvae("demo", *options, "--device", "cpu", "--port", 7000) == 130
        assert capsys.readouterr().out == f"{name} at 127.0.0.1:7000 shows the page until Ctrl-C\n"


def test_a_program_gets_reconstructions_or_an_error_without_folders(page, picture, tmp_path):
    picture.save(tmp_path / "photo.png")
    tokens = encode_image(page.model, picture, demo.SCALES)
    images = page.reconstruct(str(tmp_path / "photo.png"))
    for image, expected in zip(images, decode_image(page.model, tokens), strict=True):
        np.testing.assert_array_equal(image, expected)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(Exception, match="^'`text.png` .* is not a readable image"):
        page.reconstruct(str(tmp_path / "text.png"))


def test_space_matches_the_package():
    metadata = metadata_load(ROOT / "demo" / "README.md")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (gradio,) = [requirement for requirement in map(Requirement, extras["demo"]) if requirement.name == "gradio"]
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] in gradio.specifier
    assert 'main(["demo"' in (ROOT / "demo" / metadata["app_file"]).read_text()
    (needed,) = map(Requirement, (ROOT / "demo" / "requirements.txt").read_text().split())
    assert (needed.name, needed.extras) == ("svqvae-hf", {"demo"})
