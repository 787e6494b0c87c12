import base64
import io
import json
import re
import tomllib
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny
from hub_server import HubError, HubHandler, run_python, serve_hub
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from PIL import Image

import svqvae_cli
from svqvae_hf.demo import page as demo
from svqvae_hf.demo.page import EXAMPLE, MAX_SCALES, OVERLAPS, STATIC, TILE_SIZES, Page, serving
from svqvae_hf.demo.previews import draw_codes, preview_scales
from svqvae_hf.evaluation.metrics import ssim
from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.tokens.image_tokens import configure_tiling, decode_image, encode_image
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

SCALES = [0.5, 1.0]


@pytest.fixture
def picture(photo):
    return photo.crop((150, 80, 214, 121))  # 64 x 41


@pytest.fixture
def photograph(picture, tmp_path):
    path = tmp_path / "cat & mouse.png"
    picture.save(path)
    return str(path)


@pytest.fixture
def page(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CACHE", str(tmp_path / "cache"))
    return Page({"": tiny_model, "other": make_tiny(codebook_size=32)}.__getitem__)


def encode(page, photograph, scales=SCALES, tile_size=32, overlap=8, source=""):
    return page.encode(photograph, scales, tile_size, overlap, source)


def slots(values):
    """What the page shows of each scale."""
    shown = values[3:]
    return [shown[first : first + 5] for first in range(0, len(shown), 5)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def said(values):
    """The sentence of a refusal, and nothing shown."""
    assert not values[1].interactive
    assert not values[2].visible
    assert "role='alert'" in values[0]
    return values[0]


def test_views_are_what_the_codec_and_the_metrics_give(tiny_model, picture):
    tokens = encode_image(tiny_model, picture, SCALES)
    shown = list(preview_scales(tiny_model, tokens, picture))
    images = decode_image(tiny_model, tokens)
    for view, image, result in zip(shown, images, measure_reconstructions(picture, tokens, images), strict=True):
        np.testing.assert_array_equal(view.image, image)
        assert view.figures["PSNR"] == f"{result.psnr:.2f} dB"
        assert view.figures["bits per pixel"] == f"{result.bits_per_pixel:.3f}"
        assert view.figures["tokens"].endswith(f"= {result.tokens}")
        assert view.figures["size"] == f"{image.width} × {image.height}"
        assert float(view.figures["decoded in"].removesuffix(" s")) >= 0
    pair = [torch.from_numpy(np.array(each)).movedim(-1, 0)[None] for each in (images[1], picture)]
    (_, view) = preview_scales(tiny_model, tokens, picture)
    assert view.figures["SSIM"] == f"{ssim(*pair).item():.3f}"


def test_a_picture_smaller_than_the_window_of_ssim_is_shown_without_it(tiny_model, picture):
    tiny = picture.resize((10, 30))
    (view,) = preview_scales(tiny_model, encode_image(tiny_model, tiny, [1]), tiny)
    assert view.figures["SSIM"] == "needs 11 pixels"


def test_without_the_original_nothing_is_compared(tiny_model, picture):
    for view in preview_scales(tiny_model, encode_image(tiny_model, picture, SCALES), None):
        assert not {"PSNR", "SSIM"} & set(view.figures)


def test_the_grid_holds_the_ids_and_what_they_look_like(tiny_model, picture):
    tokens = encode_image(tiny_model, picture, [1, 4])
    for view, ids in zip(preview_scales(tiny_model, tokens, picture), tokens.ids, strict=True):
        grid = json.loads(json.dumps(view.code_grid))  # it goes to the browser
        cells = np.frombuffer(base64.b64decode(grid["cells"]), "<u4").reshape(grid["height"], grid["width"])
        assert grid.keys() <= set(re.findall(r"\w+", (STATIC / "code_grid.js").read_text()))
        codes = np.array(grid["codes"])
        np.testing.assert_array_equal(codes[cells], ids)
        side, columns = grid["look_px"], grid["columns"]
        sheet = pixels(io.BytesIO(base64.b64decode(grid["looks"].removeprefix("data:image/png;base64,"))))
        for place, look in enumerate(draw_codes(tiny_model, torch.from_numpy(codes))):
            top, left = place // columns * side, place % columns * side
            np.testing.assert_array_equal(sheet[top : top + side, left : left + side], look)


def test_a_code_looks_the_same_in_any_company(tiny_model):
    codes = torch.arange(64)
    together = draw_codes(tiny_model, codes)
    assert together.shape == (64, 4, 4, 3)
    alone = draw_codes(tiny_model, codes[7:8])
    assert np.abs(together[7].astype(int) - alone[0]).max() <= 1
    assert len(np.unique(together.reshape(64, -1), axis=0)) > 32


def test_a_photograph_is_shown_beside_what_its_ids_decode_to(page, photograph, tiny_model, picture):
    summary, download, tabs, *_ = values = encode(page, photograph, scales=[1.0, 0.5])
    tiny_model.enable_tiling(32, 8)
    tokens = encode_image(tiny_model, picture, SCALES)
    saved = load_tokens(download.value["path"])
    assert all(torch.equal(ids, other) for ids, other in zip(saved.ids, tokens.ids, strict=True))
    assert Path(download.value["path"]).name == "cat & mouse.safetensors"
    assert (saved.scales, saved.tile_size, saved.overlap) == ((0.5, 1), 32, 8)
    assert "cat &amp; mouse.png" in summary
    assert "64 × 41 pixels" in summary
    assert (tabs.visible, tabs.selected) == (True, 1)
    for (tab, slider, image, figures, grid), scale, decoded in zip(
        slots(values)[:2], SCALES, decode_image(tiny_model, tokens), strict=True
    ):
        assert (tab.label, tab.visible, image.visible) == (f"scale {scale:g}", True, False)
        left, right = slider.value
        np.testing.assert_array_equal(pixels(left["path"]), picture)
        np.testing.assert_array_equal(pixels(right["path"]), decoded)
        assert "bits per pixel" in figures
        assert grid["codes"]
    assert [slot[0].visible for slot in slots(values)] == [True, True] + [False] * (MAX_SCALES - 2)


def test_a_token_file_shows_the_same_again(page, photograph):
    first = encode(page, photograph)
    summary, download, _, *_ = again = page.decode(first[1].value["path"], "")
    assert "decoded from ids alone" in summary
    assert Path(download.value["path"]).read_bytes() == Path(first[1].value["path"]).read_bytes()
    for before, after in zip(slots(first)[:2], slots(again)[:2], strict=True):
        np.testing.assert_array_equal(pixels(before[1].value[1]["path"]), pixels(after[2].value["path"]))
        assert before[4] == after[4]
        assert not after[1].visible


def test_tiles_are_optional(page, photograph):
    saved = load_tokens(encode(page, photograph, tile_size=0)[1].value["path"])
    assert (saved.tile_size, saved.overlap) == (None, None)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_each_tile_goes_with_each_overlap(levels):
    widths = (1,) * levels
    model = make_tiny(encoder_ch_mult=widths, decoder_ch_mult=widths)
    for _, tile_size in TILE_SIZES[1:]:
        for overlap in OVERLAPS:
            configure_tiling(model, tile_size, overlap)
            assert (model.tile_size, model.overlap) == (tile_size, overlap)


def test_mistakes_are_said_in_a_sentence_without_folders(page, photograph, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<b>no image</b>")
    assert "There is no photograph yet" in said(encode(page, None))
    assert "No scale is chosen. Choose at least one." in said(encode(page, photograph, scales=[]))
    assert "must be a multiple of f = 4" in said(encode(page, photograph, overlap=3))
    for answer in (encode(page, str(broken)), page.decode(str(broken), "")):
        assert "`broken.png`" in said(answer)
        assert str(tmp_path) not in answer[0]


def test_markup_of_a_name_is_not_run(page, tmp_path):
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    path.write_bytes(b"no")
    assert "<img" not in said(encode(page, str(path)))


def test_a_model_that_is_not_there_is_said(photograph):
    def load(source):
        raise OSError(f"there is no model `{source}`.")

    assert "there is no model `org/none`." in said(encode(Page(load), photograph, source=" org/none "))


def test_the_model_before_is_dropped_before_the_next_is_loaded(photograph):
    loaded = []

    def load(source):
        assert not any(model() for model in loaded)
        model = make_tiny()
        loaded.append(weakref.ref(model))
        return model

    page = Page(load)
    for source in ("", "other", " other ", "", ""):
        encode(page, photograph, source=source)
    assert len(loaded) == 3


LOCAL = ["/etc", "/etc/passwd", "..", "nowhere", "org/local", "org/local/deeper", "../org/name", "org/name:file.pt"]


@pytest.mark.parametrize("source", LOCAL)
def test_visitors_of_a_public_page_do_not_learn_what_is_on_the_machine(source, tmp_path, monkeypatch, photograph):
    (tmp_path / "org" / "local" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    page = Page(lambda source, **_: pytest.fail(f"loaded {source}"), public=True)
    assert said(encode(page, photograph, source=source)) == (
        "<p class='error' role='alert'>On this page a model must be a public model of the Hub. Write its id, "
        "`org/name`.</p>"
    )


def test_a_public_page_has_the_models_that_it_was_started_with(tiny_model, photograph, tmp_path):
    page = Page({"": tiny_model, str(tmp_path): make_tiny()}.__getitem__, str(tmp_path), public=True)
    for source in ("", str(tmp_path)):
        assert "64 × 41 pixels" in encode(page, photograph, source=source)[0]


# Prints what a public page says of each model, on a machine whose token and cache know the private one.
HUB_VISITOR = """
import sys
from functools import partial
from svqvae_hf import SVQVAE
from svqvae_cli.loading import load_model
from svqvae_hf.demo.page import Page

SVQVAE.from_pretrained("org/private")
page = Page(partial(load_model, device="cpu", dtype="float32"), public=True)
for name in ("org/public", "org/private"):
    print(page.encode(sys.argv[1], [1.0], 0, 0, name)[0])
"""


def test_visitors_of_a_public_page_get_public_models_alone(tiny_model, photograph, tmp_path, monkeypatch):
    branch = HubHandler._branch

    def asking_who(self, repo, revision):
        if repo == "org/private" and "Authorization" not in self.headers:
            raise HubError(401, "RepoNotFound")
        return branch(self, repo, revision)

    monkeypatch.setattr(HubHandler, "_branch", asking_who)
    with serve_hub(tmp_path) as environment:
        for name in ("public", "private"):
            folder = tmp_path / "hub" / "org" / name
            tiny_model.save_pretrained(folder / "main")
            (folder / "settings.json").write_text("{}")
        environment["GRADIO_TEMP_DIR"] = str(tmp_path / "gradio")
        public, private = run_python(HUB_VISITOR, environment, photograph).splitlines()
    assert "64 × 41 pixels" in public
    assert "could not load the model `org/private`: the repository does not exist, or is private" in private
    assert not list((tmp_path / "hf_home").rglob("*public*"))


def test_ids_of_another_codebook_are_refused(page, photograph):
    assert "codebook" in said(page.decode(encode(page, photograph)[1].value["path"], "other"))


def test_what_browsers_cannot_show_is_refused_before_it_is_encoded(page, tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (4200, 1001)).save(path)
    assert "at most 17 million pixels" in said(encode(page, str(path), scales=[2.0]))


def test_what_is_too_large_is_refused_before_it_is_decoded(page, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (11000, 11000)).save(path)
    path.write_bytes(path.read_bytes()[:60])  # a decoder would say that it is cut short
    assert "at most 17 million pixels" in said(encode(page, str(path)))


def test_a_photograph_that_has_expired_is_asked_for_again(page, photograph):
    Path(photograph).unlink()
    assert "The photograph is no longer stored here. Drop it again." in said(encode(page, photograph))


def test_more_scales_than_tabs_are_refused(page, tiny_model, picture, tmp_path):
    path = tmp_path / "many.safetensors"
    save_tokens(path, encode_image(tiny_model, picture, [0.1 * (index + 1) for index in range(MAX_SCALES + 1)]))
    assert f"at most {MAX_SCALES} scales" in said(page.decode(str(path), ""))


def test_too_little_memory_is_said_and_other_faults_are_not_hidden(page, photograph, monkeypatch):
    def fail(message):
        raise RuntimeError(message)

    monkeypatch.setattr(demo, "encode_image", lambda *_: fail("CUDA out of memory."))
    assert "Out of memory. Use smaller scales" in said(encode(page, photograph))
    monkeypatch.setattr(demo, "encode_image", lambda *_: fail("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        encode(page, photograph)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("localhost", False),
        ("[::1]", False),
        ("0.0.0.0", True),
        ("[::]", True),
        ("192.168.0.2", True),
        ("localhost.example.org", True),
    ],
)
def test_a_place_that_is_taken_is_said_and_others_than_loopback_are_public(tiny_model, monkeypatch, host, public):
    class Taken:
        def launch(self, **_):
            raise OSError("Cannot find empty port")

        def close(self):
            pass

    pages = []
    monkeypatch.setattr(demo, "build", lambda page: pages.append(page) or Taken())
    message = f"Could not serve the page at `{re.escape(host)}`, port 7860. Choose another --host or --port."
    with pytest.raises(OSError, match=message), serving(lambda _: tiny_model, "", host, 7860):
        pass
    assert [page.public for page in pages] == [public]


def test_the_example_is_the_photograph_of_the_readme(photo):
    np.testing.assert_array_equal(pixels(EXAMPLE), photo)


def test_the_space_is_whole():
    metadata = metadata_load(ROOT / "demo" / "README.md")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (gradio,) = [requirement for requirement in map(Requirement, extras["demo"]) if requirement.name == "gradio"]
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] in gradio.specifier
    assert 'main(["demo"' in (ROOT / "demo" / metadata["app_file"]).read_text()
    (needed,) = map(Requirement, (ROOT / "demo" / "requirements.txt").read_text().split())
    assert (needed.name, needed.extras) == ("svqvae-hf", {"demo"})


@pytest.mark.parametrize("port", ["0", "65536", "-1", "many", "\u0663"])
def test_a_port_that_is_none_is_one_line(port, capsys):
    assert svqvae_cli.main(["demo", "--port", port]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a port must be a whole number from 1 to 65535" in line
