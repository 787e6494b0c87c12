"""Takes the picture of the web page: `python docs/browser_picture.py PAGE`. Needs Chromium: `make browser`.

PAGE is the folder that `svqvae export scenes bundled --web --output PAGE` wrote.
"""

import functools
import http.server
import sys
import threading

from demo_pictures import IMAGES, PATIENCE, open_browser

VIEWPORT = {"width": 1180, "height": 1078}


def main(folder: str) -> None:
    """Writes `browser.jpg`, the drawing of a caption with its ids."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, open_browser() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport=VIEWPORT, device_scale_factor=0.75)
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("#caption").fill("a whale above a guitar on pink")
        page.locator("#caption").press("Enter")
        page.locator("#drawing-result .note", has_text="Drawn in").wait_for()
        page.locator("h1").click()  # leaves the text field
        page.mouse.move(0, 0)
        page.screenshot(path=IMAGES / "browser.jpg", type="jpeg", quality=70)
        page.close()
        server.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python docs/browser_picture.py PAGE")
    main(sys.argv[1])
