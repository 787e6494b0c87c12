import base64
import io
import json
import re
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny
from hub_server import HubError, HubHandler, serve_hub
from huggingface_hub import close_session, constants, metadata_load
from packaging.requirements import Requirement
from PIL import Image

from svqvae_cli.loading import load_model
from svqvae_hf import SVQVAE
from svqvae_hf.demo import page as demo
from svqvae_hf.demo.page import (
    MAX_SCALES,
    STATIC,
    Page,
    serving,
)
from svqvae_hf.demo.previews import draw_codes, preview_scales
from svqvae_hf.evaluation.metrics import ssim
from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.models.checks import SCALE_SOURCES
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import load_tokens

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


def encode(page, photograph, scales=SCALES, scale_from="image", source="", token_file=None):
    return page.encode(photograph, token_file, scales, scale_from, source)


def scale_tabs(values):
    """Values of each tab."""
    per_tab = values[4:]
    return [per_tab[first : first + 5] for first in range(0, len(per_tab), 5)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def error_shown(values):
    """Message of an error, with no results shown."""
    message, results, saving, *_ = values
    assert not results.visible
    assert not saving.visible
    assert "role='alert'" in message
    return message


def test_previews_match_tokens_and_metrics(tiny_model, picture):
    tokens = encode_image(tiny_model, picture, SCALES)
    shown = list(preview_scales(tiny_model, tokens, picture))
    images = decode_image(tiny_model, tokens)
    for preview, image, result in zip(shown, images, measure_reconstructions(picture, tokens, images), strict=True):
        np.testing.assert_array_equal(preview.image, image)
        assert preview.figures["PSNR"] == f"{result.psnr:.2f} dB"
        assert preview.figures["bits per pixel"] == f"{result.bits_per_pixel:.3f}"
        assert preview.figures["tokens"].endswith(f"= {result.tokens}")
        assert preview.figures["size"] == f"{image.width} × {image.height}"
        assert float(preview.figures["decoded in"].removesuffix(" s")) >= 0
    pair = [torch.from_numpy(np.array(each)).movedim(-1, 0)[None] for each in (images[1], picture)]
    (_, preview) = preview_scales(tiny_model, tokens, picture)
    assert preview.figures["SSIM"] == f"{ssim(*pair).item():.3f}"


def test_code_grid_has_ids_and_their_pictures(tiny_model, picture):
    tokens = encode_image(tiny_model, picture, [1, 4])
    for preview, ids in zip(preview_scales(tiny_model, tokens, picture), tokens.ids, strict=True):
        grid = json.loads(json.dumps(preview.code_grid))  # as the browser receives it
        cells = np.frombuffer(base64.b64decode(grid["cells"]), "<u4").reshape(grid["height"], grid["width"])
        assert grid.keys() <= set(re.findall(r"\w+", (STATIC / "code_grid.js").read_text()))
        codes = np.array(grid["codes"])
        np.testing.assert_array_equal(codes[cells], ids)
        side, columns = grid["look_px"], grid["columns"]
        sheet = pixels(io.BytesIO(base64.b64decode(grid["looks"].removeprefix("data:image/png;base64,"))))
        for index, look in enumerate(draw_codes(tiny_model, torch.from_numpy(codes))):
            top, left = index // columns * side, index % columns * side
            np.testing.assert_array_equal(sheet[top : top + side, left : left + side], look)


@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
def test_encode_shows_photograph_beside_reconstructions(page, photograph, tiny_model, picture, scale_from):
    summary, tabs, saving, download, *_ = values = encode(page, photograph, [1.0, 0.5], scale_from)
    assert saving.visible
    tokens = encode_image(tiny_model, picture, SCALES, scale_from)
    saved = load_tokens(download.value["path"])
    assert saved.scale_from == scale_from
    assert all(torch.equal(ids, other) for ids, other in zip(saved.ids, tokens.ids, strict=True))
    assert Path(download.value["path"]).name == "cat & mouse.safetensors"
    assert (saved.scales, saved.tile_size) == ((0.5, 1), None)
    assert "cat &amp; mouse.png" in summary
    assert "64 × 41 pixels" in summary
    assert (tabs.visible, tabs.selected) == (True, 1)
    for (tab, slider, image, figures, grid), scale, decoded in zip(
        scale_tabs(values)[:2], SCALES, decode_image(tiny_model, tokens), strict=True
    ):
        assert (tab.label, tab.visible, image.visible) == (f"scale {scale:g}", True, False)
        left, right = slider.value
        np.testing.assert_array_equal(pixels(left["path"]), picture)
        np.testing.assert_array_equal(pixels(right["path"]), decoded)
        assert "bits per pixel" in figures
        assert grid["codes"]
    assert [tab[0].visible for tab in scale_tabs(values)] == [True, True] + [False] * (MAX_SCALES - 2)


def test_errors_show_no_folders(page, photograph, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<b>no image</b>")
    assert "There is no photograph yet" in error_shown(encode(page, None))
    assert "No scale is chosen. Choose at least one." in error_shown(encode(page, photograph, scales=[]))
    for answer in (encode(page, str(broken)), page.decode(str(broken), "")):
        assert "`broken.png`" in error_shown(answer)
        assert str(tmp_path) not in answer[0]


LOCAL = ["/etc", "/etc/passwd", "..", "nowhere", "org/local", "org/local/deeper", "../org/name", "org/name:file.pt"]


def test_public_page_reveals_no_paths_of_the_machine(tmp_path, monkeypatch, photograph):
    (tmp_path / "org" / "local" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    page = Page(lambda source, **_: pytest.fail(f"loaded {source}"), public=True)
    for source in LOCAL:
        assert error_shown(encode(page, photograph, source=source)) == (
            "<p class='error' role='alert'>On this page a model must be a public model of the Hub. Write its id, "
            "`org/name`.</p>"
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """This process sees the stand-in as the Hub, with a token. The client reads its address when it is imported."""
    with serve_hub(tmp_path) as environment:
        for name in ("HF_TOKEN", "NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, environment[name])
        address = environment["HF_ENDPOINT"]
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", environment["HF_HOME"])
        close_session()  # clients keep the proxies of their time
        yield tmp_path / "hub"
    close_session()


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # passed by diffusers
def test_visitors_of_a_public_page_reach_only_public_models(hub, tiny_model, photograph, tmp_path, monkeypatch):
    branch = HubHandler._branch

    def branch_for_members(self, repo, revision):
        if repo == "org/private" and "Authorization" not in self.headers:
            raise HubError(401, "RepoNotFound")
        return branch(self, repo, revision)

    monkeypatch.setattr(HubHandler, "_branch", branch_for_members)
    for name in ("public", "private"):
        tiny_model.save_pretrained(hub / "org" / name / "main")
        (hub / "org" / name / "settings.json").write_text("{}")
    SVQVAE.from_pretrained("org/private")  # the token and the cache of this machine know it
    page = Page(partial(load_model, device="cpu", dtype="float32"), public=True)
    shown = (encode(page, photograph, [1.0], source=f"org/{name}") for name in ("public", "private"))
    public, private = (values[0] for values in shown)
    assert "64 × 41 pixels" in public
    assert "could not load the model `org/private`: the repository does not exist, or is private" in private
    assert list((tmp_path / "hf_home").rglob("*private*"))
    assert not list((tmp_path / "hf_home").rglob("*public*"))


def test_too_large_image_is_an_error_before_decoding(page, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (11000, 11000)).save(path)
    path.write_bytes(path.read_bytes()[:60])  # a decoder would say that it is cut short
    assert "at most 17 million pixels" in error_shown(encode(page, str(path)))


HOSTS = {
    "127.0.0.1": False,
    "localhost": False,
    "[::1]": False,
    "0.0.0.0": True,
    "localhost.example.org": True,
}  # and whether visitors come from other machines


def test_taken_port_is_an_error_and_only_loopback_is_private(tiny_model, monkeypatch):
    class Taken:
        def launch(self, **_):
            raise OSError("Cannot find empty port")

        def close(self):
            pass

    pages = []
    monkeypatch.setattr(demo, "build", lambda page: pages.append(page) or Taken())
    for host in HOSTS:
        message = f"Could not serve the page at `{re.escape(host)}`, port 7860. Choose another --host or --port."
        with pytest.raises(OSError, match=message), serving(lambda _: tiny_model, "", host, 7860):
            pass
    assert [page.public for page in pages] == list(HOSTS.values())


def test_space_matches_the_package():
    metadata = metadata_load(ROOT / "demo" / "README.md")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (gradio,) = [requirement for requirement in map(Requirement, extras["demo"]) if requirement.name == "gradio"]
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] in gradio.specifier
    assert 'main(["demo"' in (ROOT / "demo" / metadata["app_file"]).read_text()
    (needed,) = map(Requirement, (ROOT / "demo" / "requirements.txt").read_text().split())
    assert (needed.name, needed.extras) == ("svqvae-hf", {"demo"})
