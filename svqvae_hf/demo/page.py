"""The page of `svqvae demo`: a visitor encodes a photograph and compares it with its reconstructions."""

import html
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from svqvae_hf.demo.previews import ScalePreview, preview_scales
from svqvae_hf.models.image_files import IMAGE_FORMATS, IMAGE_SUFFIXES, load_image, opened_image
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import choose_tiles, encode_image, is_out_of_memory

STATIC = Path(__file__).parent / "static"
EXAMPLE = STATIC / "example.webp"
CACHE = get_upload_folder()  # Gradio serves files from here
CACHE_SECONDS = 3600  # minimum time that Gradio keeps the files of a visit
UPLOAD_LIMIT = "100mb"
MAX_PIXELS = 2**24  # browsers show this size with ease
SCALES = (0.25, 0.5, 1.0)
VISITORS_AT_ONCE = 4  # number of visitors whose photographs are encoded at the same time; the others wait
PROGRESS = gr.Progress()  # Gradio passes the progress bar of the call to a handler with this default argument

# Gradio brings these fonts. Its theme draws bold text at weight 600, but the file of that weight lacks most letters.
FONTS = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")

HEADING = (
    "<h1>SVQVAE</h1><p>Drop a photograph, or choose the example. It becomes a grid of tokens, each the id of one code "
    "in a codebook, and the tokens become an image again, at several scales.</p>"
)
EMPTY = "<p class='empty'>Drop a photograph, or choose the example.</p>"
BUSY = "<p class='empty'>Working …</p>"
FIGURE_NOTES = {
    "size": "pixels of this result",
    "tokens": "columns × rows, one id each",
    "bits per pixel": "of the photograph, if all codes are equally likely",
    "PSNR": "against the photograph at this size, higher is closer",
}


class Page:
    """The handler behind the page.

    Args:
        model ([`SVQVAE`]): Model of the page. Visitors cannot choose another.
    """

    def __init__(self, model: SVQVAE) -> None:
        self.model = model

    def encode(self, photograph: str, progress: gr.Progress = PROGRESS) -> list[Any]:
        """Encodes a photograph and shows it beside its reconstructions, or an error that the visitor can correct."""
        try:
            _check_size(photograph)
            original = load_image(photograph)
            tiles = choose_tiles(self.model, original.height, original.width, SCALES)
            progress(0, desc="encoding")
            start = time.perf_counter()
            tokens = encode_image(self.model, original, SCALES, tiles=tiles)
            seconds = time.perf_counter() - start
            decoding = preview_scales(self.model, tokens, original)
            previews = list(progress.tqdm(decoding, "decoding", len(SCALES), "scales"))
        except (ValueError, OSError) as error:
            return _error_values(_without_folders(error, photograph))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _error_values("Out of memory. Use a smaller image.")
        name = html.escape(Path(photograph).name)
        size = f"{original.width} × {original.height} pixels"
        return _result_values(f"<p><b>{name}</b> {size}, encoded in {seconds:.2f} s</p>", previews, original)

    def reconstruct(self, photograph: str) -> list[Image.Image]:
        """Reconstructions of a photograph, one per scale, for programs that call the page."""
        try:
            _check_size(photograph)
            original = load_image(photograph)
            tiles = choose_tiles(self.model, original.height, original.width, SCALES)
            tokens = encode_image(self.model, original, SCALES, tiles=tiles)
            return [preview.image for preview in preview_scales(self.model, tokens, original)]
        except (ValueError, OSError) as error:
            raise gr.Error(_without_folders(error, photograph), print_exception=False) from error


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
            with gr.Column(scale=3, min_width=560):
                summary = gr.HTML(EMPTY, elem_id="summary")
                with gr.Tabs(visible=False, selected="1", elem_id="results") as tabs:
                    scale_tabs = [_scale_tab(scale) for scale in SCALES]
        cleared_outputs = [summary, tabs]
        outputs = list(cleared_outputs)
        for slider, figures, code_grid in scale_tabs:
            outputs += [slider, figures, code_grid]
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        show_example = example.click(lambda _: str(EXAMPLE), example, photograph, **at_once)
        for start in (photograph.upload, show_example.then):
            busy = start(lambda: _cleared_values(BUSY), None, cleared_outputs, **at_once)
            busy.then(
                page.encode,
                photograph,
                outputs,
                show_progress_on=summary,
                concurrency_limit=VISITORS_AT_ONCE,
                api_visibility="private",
            )
        photograph.clear(lambda: _cleared_values(EMPTY), None, cleared_outputs, **at_once)
        _add_api(page)
    return blocks


def _add_api(page: Page) -> None:
    """Adds an endpoint for programs, whose parts the page does not show."""
    photograph = gr.File(visible=False)
    images = [gr.Image(label=f"scale {scale:g}", visible=False, format="png") for scale in SCALES]
    button = gr.Button(visible=False)
    button.click(page.reconstruct, photograph, images, api_name="reconstruct", concurrency_limit=VISITORS_AT_ONCE)


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
    try:
        yield address
    finally:
        blocks.close()


def _scale_tab(scale: float) -> tuple[gr.ImageSlider, gr.HTML, gr.HTML]:
    """Tab for one scale, with its outputs."""
    with gr.Tab(f"scale {scale:g}", id=f"{scale:g}"):
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
    return slider, figures, code_grid


def _result_values(summary: str, previews: Sequence[ScalePreview], original: Image.Image) -> list[Any]:
    """Values of the page's outputs after a success."""
    values = [summary, gr.Tabs(visible=True)]
    original_file = save_pil_to_cache(original, CACHE, name="original", format="png")
    for preview in previews:
        preview_file = save_pil_to_cache(preview.image, CACHE, name=f"scale_{preview.scale:g}", format="png")
        values += [(original_file, preview_file), _figures_html(preview.figures), preview.code_grid]
    return values


def _cleared_values(summary: str) -> list[Any]:
    """Values of summary and results without a result."""
    return [summary, gr.Tabs(visible=False)]


def _error_values(message: str) -> list[Any]:
    """Values of the page's outputs after an error."""
    alert = f"<p class='error' role='alert'>{html.escape(message)}</p>"
    values = _cleared_values(alert)
    for _ in SCALES:
        values += [gr.skip(), gr.skip(), gr.skip()]
    return values


def _figures_html(figures: dict[str, str]) -> str:
    """Figures of a reconstruction in HTML, each with a note that explains it."""
    cells = ""
    for name, value in figures.items():
        cells += f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{FIGURE_NOTES[name]}</dd></div>"
    return f"<dl class='figures'>{cells}</dl>"


def _without_folders(error: Exception, photograph: str) -> str:
    """Message of an error without the folder of the photograph, because visitors must not see it."""
    name = Path(photograph).name
    return str(error).replace(photograph, name)


def _check_size(path: str) -> None:
    """Raises for an image with too many pixels, before it is decoded."""
    with open(path, "rb") as file, opened_image(file, f"`{path}`", tuple(IMAGE_FORMATS)) as image:
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"An image must have at most {MAX_PIXELS / 1e6:.0f} million pixels on this page, got "
            f"{width * height / 1e6:.0f} million. Choose a smaller one, or use `svqvae reconstruct`."
        )
