"""`svqvae demo` in headless Chromium, as a visitor uses it. Screenshots are saved in outputs/screenshots."""

import importlib.util
import io
import json
import os
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from svqvae_hf import DEFAULT_MODEL, SVQVAE
from svqvae_hf.demo.previews import draw_codes
from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.tokens.image_tokens import decode_image, encode_image, image_tokens
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

pytestmark = pytest.mark.slow

SCREENSHOTS = ROOT / "outputs" / "screenshots"
SCALES = (0.25, 0.5, 1.0)  # the defaults of the page
SETTINGS = {
    "#scales": "Side of each result over side of the photograph",
    "#scale_from": "one encoding per scale",
    "#model": "Folder, or Hub id",
}  # and words of their explanations


def skip_or_fail(reason):
    """Skips, but fails in CI, which requires a browser."""
    (pytest.fail if os.environ.get("SVQVAE_BROWSER_TESTS") == "required" else pytest.skip)(
        f"{reason}: run `make browser`"
    )


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        skip_or_fail("the package playwright is missing")
    import demo_pictures

    if demo_pictures.find_browser() is None:
        skip_or_fail(f"none of {', '.join(demo_pictures.BROWSERS)} is installed")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with demo_pictures.open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(browser):
    from demo_pictures import serve_demo

    with serve_demo() as address:
        yield address


@pytest.fixture
def viewport():
    return {"width": 1200, "height": 900}


@pytest.fixture
def page(browser, address, viewport):
    from demo_pictures import PATIENCE

    page = browser.new_page(viewport=viewport)
    page.set_default_timeout(PATIENCE)
    elsewhere, errors = [], []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#settings").wait_for()
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture(scope="module")
def model():
    return SVQVAE.from_pretrained(DEFAULT_MODEL).eval()


@pytest.fixture
def picture(photo):
    return photo.crop((150, 70, 310, 190))  # 160 x 120


@pytest.fixture
def photograph(picture, tmp_path):
    path = tmp_path / "cat.png"
    picture.save(path)
    return path


def choose(page, button, path):
    """Chooses a file in the dialog of a button."""
    with page.expect_file_chooser() as chooser:
        page.locator(button).click()
    chooser.value.set_files(path)


def wait_for(page, text):
    page.locator("#summary p:not(.empty)", has_text=text).wait_for()


def fetched(page, locator):
    """Image of an element, as the server sent it."""
    url = page.locator(f"{locator}:visible").get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(url).body())) as image:
        return np.asarray(image.convert("RGB"))


def seen(locator, size):
    """Image as drawn in the page, without its margins."""
    with Image.open(io.BytesIO(locator.screenshot())) as shown:
        factor = min(shown.width / size[0], shown.height / size[1])
        margins = [(side - factor * inner) / 2 for side, inner in zip(shown.size, size, strict=True)]
        inside = (*margins, shown.width - margins[0], shown.height - margins[1])
        return shown.convert("RGB").resize(size, Image.Resampling.BOX, inside)


def difference(image, other):
    """Mean absolute difference over the middle of two images of one size."""
    width, height = image.size
    middle = (width // 5, height // 5, width - width // 5, height - height // 5)
    return np.abs(np.asarray(image.crop(middle), float) - np.asarray(other.crop(middle), float)).mean()


def drag_slider(page, slider, fraction):
    """Moves the slider to a fraction of the width."""
    box = slider.bounding_box()
    handle = slider.locator(".slider-wrap .inner").bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + fraction * box["width"], handle["y"] + handle["height"] / 2, steps=4)
    page.mouse.up()


def figures(page):
    names, values = (page.locator(f".figures:visible {tag}").all_inner_texts() for tag in ("dt", "dd:not(.note)"))
    return dict(zip(names, values, strict=True))


def test_photograph_to_ids_and_back(page, model, picture, photograph, tmp_path):
    model.enable_tiling(256, 32)
    tokens = encode_image(model, picture, SCALES, "image")
    images = decode_image(model, tokens)
    results = measure_reconstructions(picture, tokens, images)

    choose(page, "#photograph button", photograph)
    wait_for(page, "cat.png 160 × 120 pixels, encoded in")
    assert page.get_by_role("tab", selected=True).inner_text() == "scale 1"
    for scale, ids, image, result in zip(SCALES, tokens.ids, images, results, strict=True):
        page.get_by_role("tab", name=f"scale {scale:g}", exact=True).click()
        slider = page.locator(".compared:visible")
        slider.locator("img.fixed").wait_for()
        np.testing.assert_array_equal(fetched(page, ".compared img:not(.fixed)"), picture)
        np.testing.assert_array_equal(fetched(page, ".compared img.fixed"), image)
        compared = slider.locator("img:not(.fixed)")
        drag_slider(page, slider, 0.02)
        shown = seen(compared, picture.size)
        assert difference(shown, image.resize(picture.size)) < 0.5 * difference(shown, picture)
        drag_slider(page, slider, 0.98)
        shown = seen(compared, picture.size)
        assert difference(shown, picture) < 0.5 * difference(shown, image.resize(picture.size))
        assert figures(page)["PSNR"] == f"{result.psnr:.2f} dB"
        assert figures(page)["tokens"] == f"{ids.shape[1]} × {ids.shape[0]} = {ids.numel()}"
        page.screenshot(path=SCREENSHOTS / f"scale_{scale:g}.png", full_page=True)
        check_codes(page, model, ids)

    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "cat.safetensors"
    token_file = tmp_path / "again.safetensors"
    download.value.save_as(token_file)
    assert all((ids == other).all() for ids, other in zip(load_tokens(token_file).ids, tokens.ids, strict=True))
    choose(page, "#upload", token_file)
    wait_for(page, "again.safetensors 160 × 120 pixels, decoded from ids alone")
    assert page.locator("#photograph").get_by_text("cat.png").count() == 0
    for scale, image in zip(SCALES, images, strict=True):
        page.get_by_role("tab", name=f"scale {scale:g}", exact=True).click()
        page.locator(".alone img:visible").wait_for()
        np.testing.assert_array_equal(fetched(page, ".alone img"), image)
        assert "PSNR" not in figures(page)
    page.screenshot(path=SCREENSHOTS / "token_file.png", full_page=True)


def check_codes(page, model, ids):
    """Points at a cell of the grid, holds another with a click, and moves with an arrow key."""
    grid = page.locator(".code-grid:visible")
    cells = grid.locator(".cells")
    box = cells.bounding_box()
    side = min(box["width"] / ids.shape[1], box["height"] / ids.shape[0])
    left, top = ((box[name] - side * count) / 2 for name, count in (("width", ids.shape[1]), ("height", ids.shape[0])))

    def check(row, column):
        code = ids[row, column]
        grid.locator(".position", has_text=f"row {row + 1}, column {column + 1}").wait_for()
        assert grid.locator(".name").inner_text() == f"code {code}"
        assert grid.locator(".uses").inner_text() == f"in {(ids == code).sum()} of {ids.numel()} cells"
        look = np.asarray(seen(grid.locator(".look"), (model.f, model.f)), float)
        assert np.abs(look - draw_codes(model, code[None])[0])[1:-1, 1:-1].mean() < 2  # without its round corners

    def centre(row, column):
        return {"x": left + (column + 0.5) * side, "y": top + (row + 0.5) * side}

    cells.hover(position=centre(0, 1))
    check(0, 1)
    cells.click(position=centre(2, 3))
    cells.hover(position=centre(0, 0))
    check(2, 3)
    page.keyboard.press("ArrowLeft")
    check(2, 2)


def open_ids(page, model, ids, folder):
    """Opens a token file with these ids."""
    model.disable_tiling()
    height, width = ids.shape
    path = folder / f"{height}_{width}.safetensors"
    save_tokens(path, image_tokens(model, [ids], height * model.f, width * model.f, [1.0]))
    choose(page, "#upload", path)
    wait_for(page, f"{path.name} {width * model.f} × {height * model.f} pixels")
    page.locator(".alone img:visible").wait_for()


def test_grids_of_any_shape_are_drawn_or_reported(page, model, tmp_path):
    codes = model.config["codebook_size"]
    open_ids(page, model, torch.arange(120).view(30, 4) % codes, tmp_path)
    check_codes(page, model, torch.arange(120).view(30, 4) % codes)
    open_ids(page, model, torch.arange(3000).view(3000, 1) % 7, tmp_path)
    cells = page.locator(".code-grid:visible .cells")
    page.locator(".position:visible", has_text="row 1501, column 1").wait_for()
    read = "canvas => [canvas.height, ...canvas.getContext('2d').getImageData(0, 0, 1, canvas.height).data]"
    height, *colours = cells.evaluate(read)
    assert height % 3000 == 0
    assert min(colours[3::4]) == 255
    open_ids(page, model, torch.zeros(16385, 1, dtype=torch.int64), tmp_path)
    page.locator(".undrawn:visible").wait_for()
    assert not cells.is_visible()
    open_ids(page, model, torch.zeros(2, 2, dtype=torch.int64), tmp_path)
    cells.wait_for()
    assert not page.locator(".undrawn").is_visible()


def test_errors_are_shown_in_the_page(page, photograph, tmp_path):
    for name in ("broken.png", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"neither a picture nor tokens")

    def wait_for_error(text):
        page.get_by_role("alert").filter(has_text=text).wait_for()
        assert not page.locator("#results").is_visible()
        assert not page.locator("#download").is_visible()
        assert "Traceback" not in page.content()

    page.locator("#run").click()
    wait_for_error("There is no photograph yet")
    choose(page, "#upload", tmp_path / "broken.safetensors")
    wait_for_error("`broken.safetensors` must be a safetensors file")
    choose(page, "#photograph button", tmp_path / "broken.png")
    wait_for_error("`broken.png` (28 bytes) is not a readable image")
    page.screenshot(path=SCREENSHOTS / "mistake.png")
    page.get_by_label("Model").fill("nowhere/to be found")
    page.locator("#example img").click()
    wait_for_error("there is no file or folder `nowhere/to be found`")
    page.get_by_label("Model").fill("")
    states = watch_summary(page)
    page.locator("#run").click()
    wait_for(page, "example.webp 451 × 300 pixels, encoded in")
    assert ["Working …", False] in states()
    page.locator(".compared img.fixed:visible").wait_for()
    page.locator(".code-grid:visible .name", has_text="code").wait_for()
    page.screenshot(path=SCREENSHOTS / "demo.png", full_page=True)


def watch_summary(page):
    """Records what the summary says, and whether results are visible, each time that the summary changes."""
    page.evaluate("""() => {
        window.states = [];
        const summary = document.querySelector("#summary");
        const paragraph = () => summary.querySelector("p")?.innerText;
        const isVisible = () => document.querySelector("#results")?.offsetParent != null;
        const note = () => setTimeout(() => window.states.push([paragraph(), isVisible()]), 50);
        new MutationObserver(note).observe(summary, {subtree: true, childList: true, characterData: true});
    }""")
    return lambda: page.evaluate("() => window.states")


def test_nothing_of_an_earlier_run_stays(page, model, picture, photograph, tmp_path):
    save_tokens(tmp_path / "other.safetensors", encode_image(model, picture, 0.5))
    choose(page, "#photograph button", photograph)
    wait_for(page, "cat.png 160 × 120 pixels, encoded in")
    page.locator("#results").wait_for()
    states = watch_summary(page)
    choose(page, "#upload", tmp_path / "other.safetensors")
    wait_for(page, "other.safetensors 160 × 120 pixels, decoded from ids alone")
    assert ["Working …", False] in states()
    assert page.locator("#photograph").get_by_text("cat.png").count() == 0
    states = watch_summary(page)
    page.locator("#run").click()  # decodes the token file again
    for _ in range(1200):
        if ["Working …", False] in states():
            break
        page.wait_for_timeout(50)
    wait_for(page, "other.safetensors 160 × 120 pixels, decoded from ids alone")
    assert page.get_by_role("tab").all_inner_texts() == ["scale 0.5"]
    choose(page, "#photograph button", photograph)
    wait_for(page, "cat.png 160 × 120 pixels, encoded in")
    page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    page.locator("#summary .empty").wait_for()
    assert not page.locator("#results").is_visible()
    assert not page.locator("#download").is_visible()


def test_settings_are_explained(page):
    for name, words in SETTINGS.items():
        assert words in page.locator(name).inner_text()


@pytest.mark.parametrize("viewport", [{"width": 390, "height": 844}])
def test_on_a_phone_the_picture_is_on_the_first_screen(page, viewport, photo, tmp_path):
    for name in SETTINGS:
        assert not page.locator(name).is_visible()
    photo.resize((300, 300)).save(tmp_path / "square.png")
    choose(page, "#photograph button", tmp_path / "square.png")
    wait_for(page, "square.png 300 × 300 pixels, encoded in")
    page.locator(".compared img.fixed:visible").wait_for()
    page.screenshot(path=SCREENSHOTS / "phone.png")
    box = page.locator(".compared:visible").bounding_box()
    assert page.evaluate("[scrollY, document.documentElement.scrollWidth]") == [0, viewport["width"]]
    assert box["y"] + box["height"] < viewport["height"]
    page.locator("#settings button").first.click()
    page.locator("#scales").wait_for()


def test_no_analytics_and_no_public_api(address):
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    assert not config["analytics_enabled"]
    assert {function["api_visibility"] for function in config["dependencies"]} == {"private"}
