"""`svqvae demo --generator` in headless Chromium, as a visitor uses it. Screenshots go to outputs/screenshots."""

import io

import numpy as np
import pytest
from conftest import make_tiny
from next_scale_golden import make_transformer
from PIL import Image
from test_page_in_browser import SCREENSHOTS, browser, watch_summary  # noqa: F401 # a fixture

from svqvae_hf import SVQVAENextScalePipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser, tmp_path):  # noqa: F811
    from demo_pictures import DESKTOP, PATIENCE, serve_demo

    pipeline = SVQVAENextScalePipeline(make_tiny(), make_transformer(), schedule=[1, 2, 3, 4, 6, 8])
    pipeline.save_pretrained(tmp_path / "pipeline")
    with serve_demo("--generator", str(tmp_path / "pipeline")) as address:
        page = browser.new_page(viewport=DESKTOP)
        page.set_default_timeout(PATIENCE)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page
        page.close()
    assert errors == []


def result(page):
    url = page.locator("#result img").get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(url).body())) as image:
        return np.asarray(image.convert("RGB"), int)


def test_image_grows_and_a_painted_part_is_generated_anew(page):
    from demo_pictures import PHONE, generate, paint

    page.locator("#run").wait_for()
    states = watch_summary(page)
    generate(page)
    texts = [text for text, _ in states()]
    assert texts[-1].split() == "32 × 32 pixels in 6 steps".split()
    assert any("of 6:" in text for text in texts)
    before, url = result(page), page.locator("#result img").get_attribute("src")
    paint(page)
    page.screenshot(path=SCREENSHOTS / "painted.png", full_page=True)
    page.get_by_label("Seed").fill("1")
    page.locator("#repaint").click()
    page.wait_for_function("url => document.querySelector('#result img')?.src !== url", arg=url)
    page.locator("#summary b").wait_for()
    changed = np.abs(result(page) - before).mean(-1)
    page.screenshot(path=SCREENSHOTS / "repainted.png", full_page=True)
    assert changed[12:20, 12:20].mean() > 3 * changed[:, :4].mean()
    page.set_viewport_size(PHONE)
    page.screenshot(path=SCREENSHOTS / "generator_on_a_phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
