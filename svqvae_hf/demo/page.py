"""The page of `svqvae demo`: a photograph to ids and back, to look at."""

import functools
import html
import ipaddress
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from svqvae_hf.demo.previews import View, views
from svqvae_hf.hub.repositories import REPO_ID
from svqvae_hf.models.image_processing_svqvae import IMAGE_FORMATS, IMAGE_SUFFIXES, load_image
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import check_memory, check_model, configure_tiling, encode_image, is_out_of_memory
from svqvae_hf.tokens.token_files import ImageTokens, load_tokens, save_tokens

FOLDER = Path(__file__).parent / "static"
EXAMPLE = FOLDER / "example.webp"
CACHE = get_upload_folder()  # from where Gradio serves files
KEPT = 3600  # seconds that it keeps those of a visit, at least
FILE_SIZE = "100mb"  # of an upload
MAX_PIXELS = 2**24  # of an image, before and after: what browsers show with ease
MAX_SCALES = 8  # of a token file: tabs of the page
SCALES = (0.25, 0.5, 1.0, 2.0)
FIRST_SCALES = [0.25, 0.5, 1.0]
TILE_SIZES = [("none", 0), ("128", 128), ("256", 256), ("512", 512), ("1024", 1024)]
OVERLAPS = [0, 16, 32, 48]  # each fits the smallest tile at f = 4, 8 and 16
PROGRESS = gr.Progress()  # as a default, it asks Gradio for the progress of a call

# Of the fonts that Gradio brings; its file of the weight that its theme takes for bold, 600, lacks most letters.
FONTS = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")

HEADING = "<h1>SVQVAE</h1><p>An image to ids of one codebook and back, at several scales.</p>"
EMPTY = "<p class='empty'>Drop a photograph, or choose the example.</p>"


def _answering(work: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Says what a visitor can mend in the page, without the folders of this machine."""

    @functools.wraps(work)  # Gradio reads its signature
    def answer(page: "Page", path: str | None, *args: Any) -> list[Any]:
        try:
            return work(page, path, *args)
        except (ValueError, OSError) as error:
            return _refusal(str(error).replace(path, Path(path).name) if path else str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _refusal("there is not enough memory. Use smaller scales, smaller tiles or a smaller image.")

    return answer


class Page:
    """What the page does for those who visit it.

    Args:
        load (`Callable[..., SVQVAE]`): Gives the model of a folder or a Hub id, the default of an empty string; passes
            keyword arguments on to `from_pretrained`.
        source (`str`, defaults to the default model): Model that the page opens with.
        public (`bool`, defaults to `False`): Whether its visitors are others than the user of this machine. Beside the
            default model and that of `source` they get those that anyone gets from the Hub, and nothing of this
            machine: no file, no token, no download of before.
    """

    def __init__(self, load: Callable[..., SVQVAE], source: str = "", public: bool = False) -> None:
        self.source, self.public = source.strip(), public
        self._load = load
        self._models: dict[str, SVQVAE] = {}  # the one at work

    def model(self, source: str) -> SVQVAE:
        """Gives the model of a source, after it drops the one before: memory may not hold both.

        Args:
            source (`str`): As visitors write it.

        Raises:
            OSError: It cannot be loaded.
            ValueError: It is not there, or not for visitors of a public page.
        """
        source = source.strip()
        if source not in self._models:
            foreign = self.public and source not in ("", self.source)
            if foreign and (not re.fullmatch(REPO_ID, source) or Path(source).exists()):
                raise ValueError("a model must be a public one of the Hub on this page. Write its name, `org/name`.")
            self._models.clear()
            self._models[source] = self._load_foreign(source) if foreign else self._load(source)
        return self._models[source]

    def _load_foreign(self, source: str) -> SVQVAE:
        with tempfile.TemporaryDirectory() as empty:  # the cache of this machine may hold private models
            return self._load(source, token=False, cache_dir=empty)

    @_answering
    def encode(
        self,
        photograph: str | None,
        scales: Sequence[float],
        tile_size: int,
        overlap: int,
        source: str,
        progress: gr.Progress = PROGRESS,
    ) -> list[Any]:
        """Encodes a photograph and shows what its ids decode to beside it."""
        if photograph is None:
            raise ValueError("there is no photograph yet. Drop one, or choose the example.")
        if not scales:
            raise ValueError("at least one scale must be chosen, but none is.")
        if not Path(photograph).exists():
            raise ValueError("the photograph is no longer kept here. Drop it again.")
        _check_header(photograph, scales)
        original = load_image(photograph)
        model = self.model(source)
        configure_tiling(model, tile_size or None, overlap if tile_size else None, _counting_tiles(progress))
        check_memory(model, original.height, original.width, scales)
        progress(0, desc="encoding")
        start = time.perf_counter()
        tokens = encode_image(model, original, sorted(scales))
        seconds = time.perf_counter() - start
        shown = _show(model, tokens, original, progress)
        facts = f"{original.width} × {original.height} pixels, encoded in {seconds:.2f} s"
        return _results(Path(photograph).name, facts, tokens, shown, original)

    @_answering
    def decode(self, token_file: str, source: str, progress: gr.Progress = PROGRESS) -> list[Any]:
        """Shows what the ids of a token file decode to."""
        tokens = load_tokens(token_file)
        if len(tokens.scales) > MAX_SCALES:
            raise ValueError(f"this page shows at most {MAX_SCALES} scales, but the file has {len(tokens.scales)}.")
        _check_size(tokens.width, tokens.height, tokens.scales)
        model = self.model(source)
        check_model(model, tokens)
        configure_tiling(model, tokens.tile_size, tokens.overlap, _counting_tiles(progress))
        check_memory(model, tokens.height, tokens.width, tokens.scales, encodes=False)
        shown = _show(model, tokens, None, progress)
        facts = f"{tokens.width} × {tokens.height} pixels, decoded from ids alone"
        return _results(Path(token_file).name, facts, tokens, shown, None)


def build(page: Page) -> gr.Blocks:
    """Lays the page out.

    Args:
        page ([`Page`]): What it does.
    """
    with gr.Blocks(title="SVQVAE", analytics_enabled=False, fill_width=True, delete_cache=(KEPT, KEPT)) as blocks:
        gr.HTML(HEADING, elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photograph = gr.File(
                    label="Photograph", file_types=list(IMAGE_SUFFIXES), height=130, elem_id="photograph"
                )
                example = gr.Dataset(
                    label="Example", components=["image"], samples=[[str(EXAMPLE)]], type="index", elem_id="example"
                )
                scales = gr.CheckboxGroup(
                    [(f"{scale:g}", scale) for scale in SCALES], value=FIRST_SCALES, label="Scales", elem_id="scales"
                )
                with gr.Row():
                    tile_size = gr.Dropdown(TILE_SIZES, value=256, label="Tile, pixels", min_width=100)
                    overlap = gr.Dropdown(OVERLAPS, value=32, label="Overlap, pixels", min_width=100)
                model = gr.Textbox(
                    page.source,
                    label="Model",
                    placeholder="the small bundled one",
                    info="org/name on the Hub" if page.public else "Folder or Hub id",
                    elem_id="model",
                )
                run = gr.Button("Encode and decode", variant="primary", elem_id="run")
                download = gr.DownloadButton("Download token file", interactive=False, elem_id="download")
                upload = gr.UploadButton("Open token file", file_types=[".safetensors"], elem_id="upload")
            with gr.Column(scale=3, min_width=560):
                summary = gr.HTML(EMPTY, elem_id="summary")
                with gr.Tabs(visible=False, elem_id="results") as tabs:
                    slots = [_slot(index) for index in range(MAX_SCALES)]
        job = {
            "outputs": [summary, download, tabs, *(component for slot in slots for component in slot)],
            "show_progress_on": summary,
            "concurrency_id": "model",  # one job at a time: they share its tiles
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        encode = {"fn": page.encode, "inputs": [photograph, scales, tile_size, overlap, model], **job}
        run.click(**encode)
        photograph.upload(**encode)
        example.click(lambda _: str(EXAMPLE), example, photograph, api_visibility="private").then(**encode)
        upload.upload(page.decode, [upload, model], **job)
    return blocks


@contextmanager
def serving(load: Callable[..., SVQVAE], source: str, host: str, port: int | None) -> Iterator[str]:
    """Serves the page while the context lasts.

    Args:
        load (`Callable[..., SVQVAE]`): As of [`Page`].
        source (`str`): Model that the page opens with; empty for the default.
        host (`str`): Address to listen at. Unless it is one of loopback, the page is public, see [`Page`].
        port (`int`, *optional*): Port to listen at; the first free one from 7860 if not given.

    Yields:
        `str`: Where the page is.

    Raises:
        OSError: The model cannot be loaded, or the port is taken.
        ValueError: The model is not there.
    """
    page = Page(load, source, public=not _is_loopback(host))
    page.model(source)  # its faults are said before the page opens
    blocks = build(page)
    try:
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=FILE_SIZE,
                enable_monitoring=False,
                run_history=False,
                ssr_mode=False,
                footer_links=[],
                theme=gr.themes.Default(primary_hue="teal", font=FONTS),
                css_paths=FOLDER / "page.css",
                allowed_paths=[str(EXAMPLE)],
            )
        except OSError as error:
            place = f"`{host}`, port {port or 'from 7860'}"
            raise OSError(f"the page cannot be served at {place}. Choose another --host or --port.") from error
        yield address
    finally:
        blocks.close()


def _slot(index: int) -> tuple[gr.Tab, gr.ImageSlider, gr.Image, gr.HTML, gr.HTML]:
    """A tab for one scale."""
    buttons = ["fullscreen", "download"]
    with gr.Tab(visible=False, id=index) as tab:
        slider = gr.ImageSlider(
            show_label=False, interactive=False, max_height=600, buttons=buttons, elem_classes="compared"
        )
        image = gr.Image(show_label=False, interactive=False, buttons=buttons, elem_classes="alone")
        figures = gr.HTML()
        code_grid = gr.HTML(
            html_template=(FOLDER / "code_grid.html").read_text(), js_on_load=(FOLDER / "code_grid.js").read_text()
        )
    return tab, slider, image, figures, code_grid


def _show(model: SVQVAE, tokens: ImageTokens, original: Image.Image | None, progress: gr.Progress) -> list[View]:
    return list(progress.tqdm(views(model, tokens, original), "decoding", len(tokens.scales), "scales"))


def _results(
    name: str, facts: str, tokens: ImageTokens, shown: Sequence[View], original: Image.Image | None
) -> list[Any]:
    """Values of the page's outputs."""
    values = [
        f"<p><b>{html.escape(name)}</b> {facts}</p>",
        gr.DownloadButton(value=_cached(tokens, Path(name).stem), interactive=True),
        gr.Tabs(visible=True, selected=tokens.scales.index(1) if 1 in tokens.scales else 0),
    ]
    left = original and save_pil_to_cache(original, CACHE, name="original", format="png")
    for view in shown:
        right = save_pil_to_cache(view.image, CACHE, name=f"scale_{view.scale:g}", format="png")
        values += [
            gr.Tab(label=f"scale {view.scale:g}", visible=True),
            gr.ImageSlider(value=left and (left, right), visible=original is not None),
            gr.Image(value=None if left else right, visible=original is None),
            _figures(view.figures),
            view.code_grid,
        ]
    for _ in range(MAX_SCALES - len(shown)):
        values += [gr.Tab(visible=False), None, None, "", None]
    return values


def _refusal(message: str) -> list[Any]:
    """Values of the page's outputs after a mistake."""
    return [
        f"<p class='fault' role='alert'>{html.escape(message)}</p>",
        gr.DownloadButton(interactive=False),
        gr.Tabs(visible=False),
        *[gr.skip()] * (5 * MAX_SCALES),
    ]


def _cached(tokens: ImageTokens, stem: str) -> str:
    """A token file where Gradio can serve it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{stem}.safetensors"
        save_tokens(path, tokens)
        return save_bytes_to_cache(path.read_bytes(), path.name, CACHE)


def _figures(figures: dict[str, str]) -> str:
    cells = [f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()]
    return f"<dl class='figures'>{''.join(cells)}</dl>"


def _counting_tiles(progress: gr.Progress) -> Callable[[int, int], None]:
    return lambda *done_and_total: progress(done_and_total, "tiles", unit="tiles")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_header(path: str, scales: Sequence[float]) -> None:
    """Refuses an image before its pixels are read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=tuple(IMAGE_FORMATS)) as image:
                width, height = image.size
    except Exception:  # Pillow raises almost anything; `load_image` says what is wrong
        return
    _check_size(width, height, scales)


def _check_size(width: int, height: int, scales: Sequence[float]) -> None:
    largest = max(1, *scales)
    if width * height * largest**2 > MAX_PIXELS:
        raise ValueError(
            f"an image on this page must have at most {MAX_PIXELS / 1e6:.0f} million pixels, before and after, but "
            f"{width} x {height} at scale {largest:g} has {width * height * largest**2 / 1e6:.0f}. Choose smaller "
            "scales or a smaller image, or use `svqvae reconstruct`."
        )
