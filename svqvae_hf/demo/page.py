"""The page of `svqvae demo`: a visitor encodes a photograph and compares it with its reconstructions."""

import html
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from svqvae_hf.demo.previews import ScalePreview, preview_scales
from svqvae_hf.models.image_processing_svqvae import IMAGE_FORMATS, IMAGE_SUFFIXES, load_image
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import check_memory, encode_image, is_out_of_memory

STATIC = Path(__file__).parent / "static"
EXAMPLE = STATIC / "example.webp"
CACHE = get_upload_folder()  # Gradio serves files from here
CACHE_SECONDS = 3600  # minimum time that Gradio keeps the files of a visit
UPLOAD_LIMIT = "100mb"
MAX_PIXELS = 2**24  # largest image and largest reconstruction; browsers show this size with ease
SCALES = (0.25, 0.5, 1.0, 2.0)
DEFAULT_SCALES = [0.25, 0.5, 1.0]
PROGRESS = gr.Progress()  # as a default argument, it makes Gradio pass the progress bar of the call

# Gradio brings these fonts. Its theme draws bold text at weight 600, but the file of that weight lacks most letters.
FONTS = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")

HEADING = (
    "<h1>SVQVAE</h1><p>An image becomes a grid of tokens, each the id of one code in a codebook. "
    "Tokens become an image again, at several scales.</p>"
)
EMPTY = "<p class='empty'>Drop a photograph, or choose the example.</p>"
BUSY = "<p class='empty'>Working …</p>"
SCALES_INFO = "Side of each result over side of the photograph"
SCALE_FROM_INFO = "The image: one encoding per scale. The latents: one for all scales. The same at scale 1"
RUN_HINT = "Runs again with these settings. A new photograph runs by itself."
FIGURE_NOTES = {
    "size": "pixels of this result",
    "tokens": "columns × rows, one id each",
    "bits per pixel": "of the photograph, if all codes are equally likely",
    "PSNR": "against the photograph at this size, higher is closer",
    "SSIM": "against the photograph at this size, 1 is equal",
    "decoded in": "this scale alone",
}
# Folds the settings on a phone, where they would push the result off the screen.
FOLD_ON_PHONES = "() => ({__type__: 'update', open: !matchMedia('(max-width: 640px)').matches})"


class Page:
    """The handler behind the page.

    Args:
        model ([`SVQVAE`]): Model of the page. Visitors cannot choose another.
    """

    def __init__(self, model: SVQVAE) -> None:
        self.model = model

    def encode(
        self, photograph: str | None, scales: Sequence[float], scale_from: str, progress: gr.Progress = PROGRESS
    ) -> list[Any]:
        """Encodes a photograph and shows it beside its reconstructions, or an error that the visitor can correct."""
        try:
            return self._encode(photograph, scales, scale_from, progress)
        except (ValueError, OSError) as error:  # without the folders of this machine
            return _error_values(str(error).replace(photograph, Path(photograph).name) if photograph else str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _error_values("Out of memory. Use smaller scales or a smaller image.")

    def _encode(
        self, photograph: str | None, scales: Sequence[float], scale_from: str, progress: gr.Progress
    ) -> list[Any]:
        if photograph is None:
            raise ValueError("There is no photograph yet. Drop one, or choose the example.")
        if not scales:
            raise ValueError("No scale is chosen. Choose at least one.")
        if not Path(photograph).exists():
            raise ValueError("The photograph is no longer stored here. Drop it again.")
        largest = max(1, *scales)
        _check_size(photograph, largest)
        original = load_image(photograph)
        self.model.tile_if_large(largest * original.height, largest * original.width)
        check_memory(self.model, largest * original.height, largest * original.width)
        progress(0, desc="encoding")
        start = time.perf_counter()
        tokens = encode_image(self.model, original, sorted(scales), scale_from)
        seconds = time.perf_counter() - start
        previews = preview_scales(self.model, tokens, original)
        shown = list(progress.tqdm(previews, "decoding", len(scales), "scales"))
        facts = f"{original.width} × {original.height} pixels, encoded in {seconds:.2f} s"
        return _result_values(f"<p><b>{html.escape(Path(photograph).name)}</b> {facts}</p>", shown, original)


def build(page: Page) -> gr.Blocks:
    """Builds the layout of the page and connects it with its handlers.

    Args:
        page ([`Page`]): Handlers.
    """
    with gr.Blocks(
        title="SVQVAE", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as blocks:
        gr.HTML(HEADING, elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photograph = gr.File(
                    label="Photograph: JPEG, PNG, WebP and others",
                    file_types=list(IMAGE_SUFFIXES),
                    height=180,
                    elem_id="photograph",
                )
                example = gr.Dataset(
                    label="Or an example",
                    components=["image"],
                    samples=[[str(EXAMPLE)]],
                    type="index",
                    elem_id="example",
                )
                with gr.Accordion("Settings", elem_id="settings") as settings:
                    scales, scale_from, run = _settings()
            with gr.Column(scale=3, min_width=560):
                summary = gr.HTML(EMPTY, elem_id="summary")
                with gr.Tabs(visible=False, elem_id="results") as tabs:
                    scale_tabs = [_scale_tab(index) for index in range(len(SCALES))]
        cleared = [summary, tabs]
        event = {
            "outputs": [*cleared, *(component for tab in scale_tabs for component in tab)],
            "show_progress_on": summary,
            "concurrency_id": "model",  # one event at a time, because tiling is a state of the model
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        encode = {"fn": page.encode, "inputs": [photograph, scales, scale_from], **event}
        show_example = example.click(lambda _: str(EXAMPLE), example, photograph, **at_once)
        for start in (run.click, photograph.upload, show_example.then):
            start(lambda: _cleared_values(BUSY), None, cleared, **at_once).then(**encode)
        photograph.clear(lambda: _cleared_values(EMPTY), None, cleared, **at_once)
        blocks.load(None, None, settings, js=FOLD_ON_PHONES, api_visibility="private")
    return blocks


@contextmanager
def serving(blocks: gr.Blocks, host: str, port: int | None) -> Iterator[str]:
    """Serves a page while the context lasts.

    Args:
        blocks (`gr.Blocks`): The page.
        host (`str`): Address to listen on.
        port (`int`, *optional*): Port to listen on; by default the first free one from 7860.

    Yields:
        `str`: Address of the page.

    Raises:
        OSError: If the port is taken.
    """
    try:
        yield _launch(blocks, host, port)
    finally:
        blocks.close()


def _launch(blocks: gr.Blocks, host: str, port: int | None) -> str:
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=UPLOAD_LIMIT,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(primary_hue="teal", font=FONTS),
            css_paths=STATIC / "page.css",
            allowed_paths=[str(EXAMPLE)],
        )
    except OSError as error:
        raise OSError(
            f"Could not serve the page at `{host}`, port {port or 'from 7860'}. Choose another --host or --port."
        ) from error
    return address


def _settings() -> tuple[gr.Component, ...]:
    """Scales, the choice between image and latents, and the button that encodes and decodes with them."""
    scales = gr.CheckboxGroup(
        [(f"{scale:g}", scale) for scale in SCALES],
        value=DEFAULT_SCALES,
        label="Scales",
        info=SCALES_INFO,
        elem_id="scales",
    )
    scale_from = gr.Radio(
        [("the image", "image"), ("the latents", "latents")],
        value="image",
        label="Resized to each scale",
        info=SCALE_FROM_INFO,
        elem_id="scale_from",
    )
    with gr.Column(elem_classes="explained"):
        run = gr.Button("Encode and decode", variant="primary", elem_id="run")
        gr.HTML(RUN_HINT)
    return scales, scale_from, run


def _scale_tab(index: int) -> tuple[gr.Tab, gr.ImageSlider, gr.HTML, gr.HTML]:
    """Tab for one scale."""
    with gr.Tab(visible=False, id=index) as tab:
        slider = gr.ImageSlider(
            show_label=False,
            interactive=False,
            max_height=600,
            buttons=["fullscreen", "download"],
            elem_classes="compared",
        )
        figures = gr.HTML()
        code_grid = gr.HTML(
            html_template=(STATIC / "code_grid.html").read_text(), js_on_load=(STATIC / "code_grid.js").read_text()
        )
    return tab, slider, figures, code_grid


def _result_values(summary: str, previews: Sequence[ScalePreview], original: Image.Image) -> list[Any]:
    """Values of the page's outputs after a success."""
    scales = [preview.scale for preview in previews]
    values = [summary, gr.Tabs(visible=True, selected=scales.index(1) if 1 in scales else 0)]
    left = save_pil_to_cache(original, CACHE, name="original", format="png")
    for preview in previews:
        right = save_pil_to_cache(preview.image, CACHE, name=f"scale_{preview.scale:g}", format="png")
        values += [
            gr.Tab(label=f"scale {preview.scale:g}", visible=True),
            (left, right),
            _figures_html(preview.figures),
            preview.code_grid,
        ]
    for _ in range(len(SCALES) - len(previews)):
        values += [gr.Tab(visible=False), None, "", None]
    return values


def _cleared_values(summary: str) -> list[Any]:
    """Values of summary and results without a result."""
    return [summary, gr.Tabs(visible=False)]


def _error_values(message: str) -> list[Any]:
    """Values of the page's outputs after an error."""
    alert = f"<p class='error' role='alert'>{html.escape(message)}</p>"
    return [*_cleared_values(alert), *[gr.skip()] * (4 * len(SCALES))]


def _figures_html(figures: dict[str, str]) -> str:
    cells = [
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{FIGURE_NOTES[name]}</dd></div>"
        for name, value in figures.items()
    ]
    return f"<dl class='figures'>{''.join(cells)}</dl>"


def _check_size(path: str, largest: float) -> None:
    """Raises for an image of too many pixels, before they are decoded. Leaves unreadable files to [`load_image`]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=tuple(IMAGE_FORMATS)) as image:
                width, height = image.size
    except Exception:  # Pillow raises almost any type
        return
    if width * height * largest**2 > MAX_PIXELS:
        raise ValueError(
            f"An image and its reconstructions must have at most {MAX_PIXELS / 1e6:.0f} million pixels on this page, "
            f"got {width * height * largest**2 / 1e6:.0f} million for {width} x {height} at scale {largest:g}. Choose "
            "smaller scales or a smaller image, or use `svqvae reconstruct`."
        )
