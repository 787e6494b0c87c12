"""Bytes, seconds and memory of the page of `svqvae export scenes bundled --web`, beside the library in the same run.

svqvae export scenes bundled --web --output outputs/page
python benchmarks/browser.py outputs/page
"""

import functools
import gzip
import http.server
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from PIL import Image

from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, SVQVAE, decode_image, encode_image
from svqvae_hf.language.image_language_model import ImageLanguageModel

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from demo_pictures import DESKTOP, open_browser

PHOTOGRAPH = Path(__file__).parents[1] / "docs" / "images" / "chelsea.png"
CAPTIONS = ("a whale above a guitar on pink", "three foxes on white", "a tiny teapot next to a pear", "two airplanes")
PATIENCE = 300_000  # milliseconds
MEGABYTE = 10**6


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without logging."""

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def main(folder: Path) -> None:
    """Prints a table for the page and one for the library."""
    torch.set_num_threads(1)
    print_sizes(folder)
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, open_browser() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport=DESKTOP)
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("#photographs").wait_for()
        measure_page(page)
        server.shutdown()
    measure_library()


def print_sizes(folder: Path) -> None:
    """Prints the bytes to the first picture and to the first photograph, as they are and compressed."""
    common_files = [folder / "index.html", folder / "settings.json"]
    for pattern in ("*.js", "*.css", "runtime/*"):
        common_files += folder.glob(pattern)
    for name in ("drawing", "photographs"):
        size = 0
        compressed_size = 0
        for path in common_files + list(folder.glob(f"{name}/*")):
            content = path.read_bytes()
            size += len(content)
            compressed_size += len(gzip.compress(content, 6))
        megabytes = f"{size / MEGABYTE:.1f} MB, gzip {compressed_size / MEGABYTE:.1f} MB"
        print(f"bytes to the first result, {name}: {megabytes}")
    size_of_folder = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"whole folder: {size_of_folder / MEGABYTE:.1f} MB")


def measure_page(page) -> None:  # type: ignore[no-untyped-def]
    """Prints seconds and memory of the page."""
    page.locator("#caption").fill(CAPTIONS[0])
    with Stopwatch("page, first picture, with loading"):
        draw(page, CAPTIONS[0])
    with Stopwatch("page, a picture", len(CAPTIONS)):
        for caption in CAPTIONS:
            draw(page, caption)
    print(f"page, largest process after pictures: {largest_process() / 2**20:.0f} MiB")
    with Stopwatch("page, first photograph, with loading"):
        reconstruct(page)
    with Stopwatch("page, a photograph"):
        reconstruct(page)
    print(f"page, largest process after photographs: {largest_process() / 2**20:.0f} MiB")


def measure_library() -> None:
    """Prints seconds of the library, with one thread."""
    language_model = ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype="float32")
    tokenizer = SVQVAE.from_pretrained(DEFAULT_MODEL).eval()
    language_model.draw([CAPTIONS[0]])
    with Stopwatch("library, a picture", len(CAPTIONS)):
        for caption in CAPTIONS:
            language_model.draw([caption])
    with Image.open(PHOTOGRAPH) as file:
        photograph = file.convert("RGB")
    decode_image(tokenizer, encode_image(tokenizer, photograph))
    with Stopwatch("library, a photograph"):
        decode_image(tokenizer, encode_image(tokenizer, photograph))


def draw(page, caption: str) -> None:  # type: ignore[no-untyped-def]
    """Draws a caption."""
    page.locator("#caption").fill(caption)
    page.locator("#caption").press("Enter")
    page.locator("#drawing-result .note", has_text="Drawn in").wait_for()


def reconstruct(page) -> None:  # type: ignore[no-untyped-def]
    """Encodes and decodes the photograph."""
    page.locator("#photograph").set_input_files(PHOTOGRAPH)
    note = page.locator("#photograph-result .note")
    note.filter(has_not_text="slide").wait_for()
    note.filter(has_text="slide over").wait_for()


class Stopwatch:
    """Prints seconds, and CPU seconds of this process and its children.

    Args:
        title (`str`): Start of the line.
        count (`int`, defaults to 1): Number of things between which the seconds are divided.
    """

    def __init__(self, title: str, count: int = 1):
        self.title = title
        self.count = count

    def __enter__(self) -> None:
        self.began = time.perf_counter()
        self.cpu_began = cpu_seconds()

    def __exit__(self, *_: object) -> None:
        seconds = (time.perf_counter() - self.began) / self.count
        cpu = (cpu_seconds() - self.cpu_began) / self.count
        print(f"{self.title}: {seconds:.2f} s, {cpu:.2f} CPU s", flush=True)


def cpu_seconds() -> float:
    """CPU seconds of this process and its children, without ended ones."""
    total = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def largest_process() -> int:
    """Largest peak of resident memory among the browser's processes, in bytes."""
    peaks = []
    for process in psutil.Process().children(recursive=True):
        status = Path(f"/proc/{process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                peaks.append(1024 * int(line.split()[1]))
    return max(peaks)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python benchmarks/browser.py PAGE")
    main(Path(sys.argv[1]))
