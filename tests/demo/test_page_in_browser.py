"""Both pages of `svqvae demo` in headless Chromium, as visitors use them. Screenshots go to outputs/screenshots."""

import io
import json
import multiprocessing
import os
import urllib.request
from contextlib import ExitStack, contextmanager
from threading import Event

import numpy as np
import pytest
from conftest import SCREENSHOTS, make_tiny
from gradio_client import Client, handle_file
from next_scale_golden import make_transformer
from PIL import Image
from processes import start
from tiny_language_models import load_extended

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAENextScalePipeline
from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.tokens.image_tokens import decode_image, encode_image

pytestmark = pytest.mark.slow


def serve(folder, addresses):
    """Serves the page of photographs, a page that generates and one with prompts, and sends their addresses."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read at import
    from svqvae_cli.loading import load_generator, load_model
    from svqvae_hf.demo.generator_page import GeneratorPage
    from svqvae_hf.demo.generator_page import build as build_generator
    from svqvae_hf.demo.hints import PromptHints
    from svqvae_hf.demo.page import Page, build, serving
    from svqvae_hf.language.image_language_model import ImageLanguageModel

    photographs = build(Page(load_model(None, "cpu", "float32")))
    generator = build_generator(GeneratorPage(load_generator(f"{folder}/pipeline", "cpu", "float32")))
    hints = PromptHints(("a cat", "a red key"), ("cat", "key"), ("red",), "One object.")
    drawing = build_generator(GeneratorPage(ImageLanguageModel(*load_extended()), hints))
    with ExitStack() as stack:
        pages = [stack.enter_context(serving(page, "127.0.0.1", None)) for page in (photographs, generator, drawing)]
        addresses.send(pages)
        Event().wait()


@pytest.fixture(scope="module")
def addresses(browser, tmp_path_factory):
    """Addresses of the page of photographs and of two pages that generate, all from one process."""
    folder = tmp_path_factory.mktemp("demo")
    pipeline = SVQVAENextScalePipeline(make_tiny(), make_transformer(), schedule=[1, 2, 3, 4, 6, 8])
    pipeline.save_pretrained(folder / "pipeline")
    received, sent = multiprocessing.Pipe(duplex=False)
    server = start(serve, folder, sent)
    sent.close()
    yield received.recv()
    server.terminate()
    server.join()


@pytest.fixture
def viewport():
    return {"width": 1200, "height": 900}


@contextmanager
def visit(browser, address, viewport):
    """Opens a page, which must ask no other server for anything and raise no error."""
    from demo_pictures import PATIENCE

    page = browser.new_page(viewport=viewport)
    page.set_default_timeout(PATIENCE)
    elsewhere, errors = [], []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#summary").wait_for()
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def page(browser, addresses, viewport):
    with visit(browser, addresses[0], viewport) as page:
        yield page


@pytest.fixture
def generator_page(browser, addresses, viewport):
    with visit(browser, addresses[1], viewport) as page:
        yield page


@pytest.fixture
def drawing_page(browser, addresses, viewport):
    with visit(browser, addresses[2], viewport) as page:
        yield page


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


def figures(page):
    names, values = (page.locator(f".figures:visible {tag}").all_inner_texts() for tag in ("dt", "dd:not(.note)"))
    return dict(zip(names, values, strict=True))


def test_photograph_to_ids_and_back(page, model, picture, photograph):
    from svqvae_hf.demo.page import SCALES

    model.enable_tiling(256, 32)
    tokens = encode_image(model, picture, SCALES)
    images = decode_image(model, tokens)
    results = measure_reconstructions(picture, tokens, images)

    choose(page, "#photograph button", photograph)
    wait_for(page, "cat.png 160 × 120 pixels, encoded in")
    assert page.get_by_role("tab", selected=True).inner_text() == "scale 1"
    for scale, ids, image, result in zip(SCALES, tokens.ids, images, results, strict=True):
        page.get_by_role("tab", name=f"scale {scale:g}", exact=True).click()
        page.locator(".compared:visible img.fixed").wait_for()
        np.testing.assert_array_equal(fetched(page, ".compared img:not(.fixed)"), picture)
        np.testing.assert_array_equal(fetched(page, ".compared img.fixed"), image)
        assert figures(page)["PSNR"] == f"{result.psnr:.2f} dB"
        assert figures(page)["tokens"] == f"{ids.shape[1]} × {ids.shape[0]} = {ids.numel()}"
        page.screenshot(path=SCREENSHOTS / f"scale_{scale:g}.png", full_page=True)
        check_codes(page, model, ids)


def check_codes(page, model, ids):
    """Points at a cell of the grid, and moves with an arrow key."""
    grid = page.locator(".code-grid:visible")
    cells = grid.locator(".cells")
    box = cells.bounding_box()
    side = min(box["width"] / ids.shape[1], box["height"] / ids.shape[0])
    left, top = ((box[name] - side * count) / 2 for name, count in (("width", ids.shape[1]), ("height", ids.shape[0])))
    cells.click(position={"x": left + 3.5 * side, "y": top + 2.5 * side})
    for column in (3, 2):
        code = ids[2, column]
        grid.locator(".position", has_text=f"row 3, column {column + 1}").wait_for()
        assert grid.locator(".name").inner_text() == f"code {code}"
        assert grid.locator(".uses").inner_text() == f"in {(ids == code).sum()} of {ids.numel()} cells"
        page.keyboard.press("ArrowLeft")


def test_two_visitors_at_once_see_their_own_pictures(browser, addresses, viewport, photo, tmp_path):
    crops = {"small": photo.crop((150, 70, 310, 190)), "large": photo}
    with visit(browser, addresses[0], viewport) as one, visit(browser, addresses[0], viewport) as other:
        pages = dict(zip(crops, (one, other), strict=True))
        for name, page in pages.items():
            crops[name].save(tmp_path / f"{name}.png")
            choose(page, "#photograph button", tmp_path / f"{name}.png")
        for name, page in pages.items():
            wait_for(page, f"{name}.png {crops[name].width} × {crops[name].height} pixels, encoded in")
            page.locator(".compared:visible img.fixed").wait_for()
            np.testing.assert_array_equal(fetched(page, ".compared img:not(.fixed)"), crops[name])
            assert fetched(page, ".compared img.fixed").shape[:2] == crops[name].size[::-1]


def test_errors_are_shown_in_the_page(page, photograph, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"this is not any picture here")

    def wait_for_error(text):
        page.get_by_role("alert").filter(has_text=text).wait_for()
        assert not page.locator("#results").is_visible()
        assert "Traceback" not in page.content()

    choose(page, "#photograph button", tmp_path / "broken.png")
    wait_for_error("`broken.png` (28 bytes) is not a readable image")
    page.screenshot(path=SCREENSHOTS / "mistake.png")
    states = watch_summary(page)
    page.locator("#example img").click()
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


@pytest.mark.parametrize("viewport", [{"width": 390, "height": 844}])
def test_on_a_phone_the_picture_is_on_the_first_screen(page, viewport, photo, tmp_path):
    photo.resize((300, 300)).save(tmp_path / "square.png")
    choose(page, "#photograph button", tmp_path / "square.png")
    wait_for(page, "square.png 300 × 300 pixels, encoded in")
    page.locator(".compared img.fixed:visible").wait_for()
    page.screenshot(path=SCREENSHOTS / "phone.png")
    box = page.locator(".compared:visible").bounding_box()
    assert page.evaluate("[scrollY, document.documentElement.scrollWidth]") == [0, viewport["width"]]
    assert box["y"] + box["height"] < viewport["height"]


def test_no_analytics_and_one_public_endpoint(addresses):
    with urllib.request.urlopen(f"{addresses[0]}config") as answer:
        config = json.load(answer)
    assert not config["analytics_enabled"]
    public = [function["api_name"] for function in config["dependencies"] if function["api_visibility"] == "public"]
    assert public == ["reconstruct"]


def test_a_program_lists_and_calls_the_endpoints(addresses, photo, tmp_path):
    photo.resize((64, 48)).save(tmp_path / "photo.png")
    photographs = Client(addresses[0], verbose=False)
    images = photographs.predict(photograph=handle_file(tmp_path / "photo.png"), api_name="/reconstruct")
    for image, size in zip(images, [(16, 12), (32, 24), (64, 48)], strict=True):
        with Image.open(image) as opened:
            assert opened.size == size
    drawing = Client(addresses[2], verbose=False)
    endpoints = drawing.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/draw", "/caption"]
    arguments = [parameter["parameter_name"] for parameter in endpoints["/draw"]["parameters"]]
    assert arguments == ["prompt", "seed", "guidance", "temperature"]  # no class, because the model has none
    image, notes = drawing.predict(prompt="a cat", api_name="/draw")
    assert isinstance(notes, str)
    assert isinstance(drawing.predict(picture=handle_file(image), api_name="/caption"), str)
    for client in (photographs, drawing):
        client.close()


def generated(page):
    url = page.locator("#result img").get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(url).body())) as image:
        return np.asarray(image.convert("RGB"), int)


def test_image_grows_and_a_painted_part_is_generated_anew(generator_page):
    from demo_pictures import PHONE, generate, paint

    page = generator_page
    page.locator("#run").wait_for()
    states = watch_summary(page)
    generate(page)
    texts = [text for text, _ in states()]
    assert texts[-1] == "32 × 32 pixels in 6 steps. class 0, seed 0"
    assert any("of 6:" in text for text in texts)
    before, url = generated(page), page.locator("#result img").get_attribute("src")
    paint(page)
    page.screenshot(path=SCREENSHOTS / "painted.png", full_page=True)
    page.get_by_label("Seed").fill("1")
    page.locator("#repaint").click()
    page.wait_for_function("url => document.querySelector('#result img')?.src !== url", arg=url)
    page.locator("#summary p", has_text="pixels").wait_for()
    changed = np.abs(generated(page) - before).mean(-1)
    page.screenshot(path=SCREENSHOTS / "repainted.png", full_page=True)
    assert changed[12:20, 12:20].mean() > 3 * changed[:, :4].mean()
    page.set_viewport_size(PHONE)
    page.screenshot(path=SCREENSHOTS / "generator_on_a_phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_a_button_that_is_pressed_again_waits_and_reads_the_new_settings(generator_page):
    page, pictures = generator_page, []
    for seeds in ("45", "4", "5"):
        for seed in seeds:
            page.get_by_label("Seed").fill(seed)
            page.locator("#run").click()
        page.locator("#summary p", has_text=f"32 × 32 pixels in 6 steps. class 0, seed {seed}").wait_for()
        pictures.append(generated(page))
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[0] != pictures[1]).any()


def test_an_example_is_pressed_and_drawn(drawing_page):
    page = drawing_page
    page.locator("#examples button", has_text="a red key").click()
    page.locator("#summary p", has_text="“a red key”, seed 0").filter(has_text="pixels").wait_for()
    assert page.locator("#prompt textarea").input_value() == "a red key"
    page.locator("#objects button").click()
    page.locator("#objects p", has_text="cat, key.").wait_for()
    page.screenshot(path=SCREENSHOTS / "prompts.png", full_page=True)
    page.get_by_label("Seed").fill("1e20")
    page.locator("#run").click()
    page.locator("#summary .error", has_text="The seed must be a whole number from 0 to 4294967295").wait_for()
