"""`svqvae demo --generator` in headless Chromium, as a visitor uses it. Screenshots go to outputs/screenshots."""

import io

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


def test_image_grows(page):
    from demo_pictures import PHONE, generate

    page.locator("#run").wait_for()
    states = watch_summary(page)
    generate(page)
    texts = [text for text, _ in states()]
    assert texts[-1].split() == "32 × 32 pixels in 6 steps".split()
    assert any("of 6:" in text for text in texts)
    url = page.locator("#result img").get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(url).body())) as image:
        assert image.size == (32, 32)
    page.set_viewport_size(PHONE)
    page.screenshot(path=SCREENSHOTS / "generator_on_a_phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
