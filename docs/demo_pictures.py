"""Takes the pictures of the demo's pages: `python docs/demo_pictures.py`. Needs Chromium: `make browser`."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 90_000  # milliseconds: the machine may be busy
DESKTOP = {"width": 1200, "height": 900}
PHONE = {"width": 390, "height": 844}


def main() -> None:
    """Writes all pictures."""
    take_demo()
    take_generator()


def take_demo() -> None:
    """Writes `demo.jpg`, the whole page on a desktop, and `demo_phone.jpg`, the first screen of a phone."""
    with open_browser() as browser, serve_demo() as address:
        desktop = open_example(browser, address, DESKTOP, 0.75)
        desktop.screenshot(path=IMAGES / "demo.jpg", type="jpeg", quality=60, full_page=True)
        desktop.close()
        phone = open_example(browser, address, PHONE, 1)
        phone.screenshot(path=IMAGES / "demo_phone.jpg", type="jpeg", quality=60)
        phone.close()


def open_example(browser: Browser, address: str, viewport: dict[str, int], density: float) -> Page:
    """Opens the page and its example."""
    page = browser.new_page(viewport=viewport, device_scale_factor=density)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    show_example(page)
    return page


def take_generator() -> None:
    """Writes `demo_generator.jpg`, the page after a generation, with a stroke of the brush."""
    with open_browser() as browser, serve_demo("--generator") as address:
        page = browser.new_page(viewport=DESKTOP, device_scale_factor=0.75)
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#prompt textarea").fill("a whale above a guitar on pink")
        generate(page)
        paint(page)
        page.screenshot(path=IMAGES / "demo_generator.jpg", type="jpeg", quality=60)
        page.close()


def find_browser() -> str | None:
    """Path of Chromium, if it is installed."""
    for browser in BROWSERS:
        path = shutil.which(browser)
        if path is not None:
            return path
    return None


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Runs Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def serve_demo(*options: str) -> Iterator[str]:
    """Runs `svqvae demo` offline, by default with the bundled model, and yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "svqvae_cli", "demo", "--device", "cpu", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment) as server:
            line = server.stdout.readline()
            if "shows the page" not in line:
                raise OSError("`svqvae demo` did not start, see its error above.")
            yield line.split()[0]
            server.terminate()


def show_example(page: Page) -> None:
    """Chooses the example, and waits until its reconstruction and ids are drawn."""
    page.locator("#example img").click()
    page.locator("#summary p:not(.empty)", has_text="encoded in").wait_for()
    page.locator(".compared img.fixed:visible").wait_for()
    page.locator(".code-grid:visible .name", has_text="code").wait_for()


def generate(page: Page) -> None:
    """Generates a picture, and waits until it can be painted on."""
    page.locator("#run").click()
    page.locator("#summary b").wait_for()
    page.locator("#canvas canvas").first.wait_for()
    page.wait_for_timeout(2000)  # the canvas draws the picture after it appears


def paint(page: Page) -> None:
    """Paints a stroke over the middle of the picture."""
    box = page.locator("#canvas canvas").first.bounding_box()
    x = box["x"] + box["width"] / 2
    y = box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 40, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)


if __name__ == "__main__":
    main()
