"""The page of `svqvae demo`: a visitor encodes a photograph and compares it with its reconstructions."""

import functools
import html
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

from svqvae_hf.demo.previews import ScalePreview, preview_scales
from svqvae_hf.models.image_processing_svqvae import IMAGE_FORMATS, IMAGE_SUFFIXES, load_image
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import (
    check_memory,
    check_same_codebook,
    encode_image,
    is_out_of_memory,
)
from svqvae_hf.tokens.token_files import ImageTokens, load_tokens, save_tokens

STATIC = Path(__file__).parent / "static"
EXAMPLE = STATIC / "example.webp"
CACHE = get_upload_folder()  # Gradio serves files from here
CACHE_SECONDS = 3600  # minimum time that Gradio keeps the files of a visit
UPLOAD_LIMIT = "100mb"
MAX_PIXELS = 2**24  # largest image and largest reconstruction; browsers show this size with ease
MAX_SCALES = 8  # tabs of the page
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
UPLOAD_HINT = "A token file is decoded without its photograph."
RUN_HINT = "Runs again with these settings. A new photograph or token file runs by itself."
DOWNLOAD_HINT = "The ids of all scales, to open here or with <code>svqvae decode</code>."
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


def _show_errors(handler: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Shows errors that a visitor can correct in the page, without the folders of this machine."""

    @functools.wraps(handler)  # Gradio reads its signature
    def wrapped(page: "Page", path: str | None, *args: Any) -> list[Any]:
        try:
            return handler(page, path, *args)
        except (ValueError, OSError) as error:
            return _error_values(str(error).replace(path, Path(path).name) if path else str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _error_values("Out of memory. Use smaller scales or a smaller image.")

    return wrapped


class Page:
    """The handlers behind the page.

    Args:
        model ([`SVQVAE`]): Model of the page. Visitors cannot choose another.
    """

    def __init__(self, model: SVQVAE) -> None:
        self.model = model

    @_show_errors
    def encode(
        self,
        photograph: str | None,
        token_file: str | None,
        scales: Sequence[float],
        scale_from: str,
        progress: gr.Progress = PROGRESS,
    ) -> list[Any]:
        """Encodes a photograph and shows it beside its reconstructions. Without one, decodes the opened token file."""
        if photograph is None and token_file is not None:
            return self.decode(token_file, progress)
        if photograph is None:
            raise ValueError("There is no photograph yet. Drop one, or choose the example.")
        if not scales:
            raise ValueError("No scale is chosen. Choose at least one.")
        if not Path(photograph).exists():
            raise ValueError("The photograph is no longer stored here. Drop it again.")
        size = _image_size(photograph)
        if size:
            _check_size(*size, scales)
        original = load_image(photograph)
        model, largest = self.model, max(1, *scales)
        model.tile_if_large(largest * original.height, largest * original.width, on_tile=_tile_progress(progress))
        check_memory(model, largest * original.height, largest * original.width)
        progress(0, desc="encoding")
        start = time.perf_counter()
        tokens = encode_image(model, original, sorted(scales), scale_from)
        seconds = time.perf_counter() - start
        previews = _decode(model, tokens, original, progress)
        facts = f"{original.width} × {original.height} pixels, encoded in {seconds:.2f} s"
        return _result_values(Path(photograph).name, facts, tokens, previews, original)

    @_show_errors
    def decode(self, token_file: str, progress: gr.Progress = PROGRESS) -> list[Any]:
        """Decodes a token file and shows its images."""
        tokens = load_tokens(token_file)
        if len(tokens.scales) > MAX_SCALES:
            raise ValueError(
                f"A token file must have at most {MAX_SCALES} scales to be shown here, got {len(tokens.scales)}."
            )
        _check_size(tokens.width, tokens.height, tokens.scales)
        model, largest = self.model, max(1, *tokens.scales)
        check_same_codebook(model, tokens)
        size = largest * tokens.height, largest * tokens.width
        model.tile_if_large(*size, tokens.tile_size, tokens.overlap, _tile_progress(progress))
        check_memory(model, *size)
        previews = _decode(model, tokens, None, progress)
        facts = f"{tokens.width} × {tokens.height} pixels, decoded from ids alone"
        return _result_values(Path(token_file).name, facts, tokens, previews, None)


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
                opened = gr.State()  # token file
                with gr.Row():
                    example = gr.Dataset(
                        label="Or an example",
                        components=["image"],
                        samples=[[str(EXAMPLE)]],
                        type="index",
                        min_width=100,
                        elem_id="example",
                    )
                    with gr.Column(min_width=150, elem_classes="explained"):
                        upload = gr.UploadButton(
                            "Open token file", file_types=[".safetensors"], size="md", elem_id="upload"
                        )
                        gr.HTML(UPLOAD_HINT)
                with gr.Accordion("Settings", elem_id="settings") as settings:
                    scales, scale_from, run = _settings()
            with gr.Column(scale=3, min_width=560):
                summary = gr.HTML(EMPTY, elem_id="summary")
                with gr.Tabs(visible=False, elem_id="results") as tabs:
                    scale_tabs = [_scale_tab(index) for index in range(MAX_SCALES)]
                with gr.Column(visible=False, elem_classes="explained") as saving:
                    download = gr.DownloadButton("Download token file", size="md", elem_id="download")
                    gr.HTML(DOWNLOAD_HINT)
        cleared = [summary, tabs, saving]
        event = {
            "outputs": [*cleared, download, *(component for tab in scale_tabs for component in tab)],
            "show_progress_on": summary,
            "concurrency_id": "model",  # one event at a time, because tiling is a state of the model
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        encode = {"fn": page.encode, "inputs": [photograph, opened, scales, scale_from], **event}
        show_example = example.click(lambda _: str(EXAMPLE), example, photograph, **at_once)
        for start in (run.click, photograph.upload, show_example.then):
            start(lambda: _cleared_values(BUSY), None, cleared, **at_once).then(**encode)
        photograph.clear(lambda: [None, *_cleared_values(EMPTY)], None, [opened, *cleared], **at_once)
        upload.upload(
            lambda path: [None, path, *_cleared_values(BUSY)], upload, [photograph, opened, *cleared], **at_once
        ).then(page.decode, opened, **event)
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


def _scale_tab(index: int) -> tuple[gr.Tab, gr.ImageSlider, gr.Image, gr.HTML, gr.HTML]:
    """Tab for one scale: the slider if there is an original, otherwise the image alone."""
    buttons = ["fullscreen", "download"]
    with gr.Tab(visible=False, id=index) as tab:
        slider = gr.ImageSlider(
            show_label=False, interactive=False, max_height=600, buttons=buttons, elem_classes="compared"
        )
        image = gr.Image(show_label=False, interactive=False, buttons=buttons, elem_classes="alone")
        figures = gr.HTML()
        code_grid = gr.HTML(
            html_template=(STATIC / "code_grid.html").read_text(), js_on_load=(STATIC / "code_grid.js").read_text()
        )
    return tab, slider, image, figures, code_grid


def _decode(
    model: SVQVAE, tokens: ImageTokens, original: Image.Image | None, progress: gr.Progress
) -> list[ScalePreview]:
    return list(progress.tqdm(preview_scales(model, tokens, original), "decoding", len(tokens.scales), "scales"))


def _result_values(
    name: str, facts: str, tokens: ImageTokens, previews: Sequence[ScalePreview], original: Image.Image | None
) -> list[Any]:
    """Values of the page's outputs after a success."""
    values = [
        f"<p><b>{html.escape(name)}</b> {facts}</p>",
        gr.Tabs(visible=True, selected=tokens.scales.index(1) if 1 in tokens.scales else 0),
        gr.Column(visible=True),
        gr.DownloadButton(value=_cache_token_file(tokens, Path(name).stem)),
    ]
    left = original and save_pil_to_cache(original, CACHE, name="original", format="png")
    for preview in previews:
        right = save_pil_to_cache(preview.image, CACHE, name=f"scale_{preview.scale:g}", format="png")
        values += [
            gr.Tab(label=f"scale {preview.scale:g}", visible=True),
            gr.ImageSlider(value=left and (left, right), visible=original is not None),
            gr.Image(value=None if left else right, visible=original is None),
            _figures_html(preview.figures),
            preview.code_grid,
        ]
    for _ in range(MAX_SCALES - len(previews)):
        values += [gr.Tab(visible=False), None, None, "", None]
    return values


def _cleared_values(summary: str) -> list[Any]:
    """Values of summary, results and download without a result."""
    return [summary, gr.Tabs(visible=False), gr.Column(visible=False)]


def _error_values(message: str) -> list[Any]:
    """Values of the page's outputs after an error."""
    alert = f"<p class='error' role='alert'>{html.escape(message)}</p>"
    return [*_cleared_values(alert), *[gr.skip()] * (1 + 5 * MAX_SCALES)]


def _cache_token_file(tokens: ImageTokens, stem: str) -> str:
    """Writes a token file where Gradio can serve it, and returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{stem}.safetensors"
        save_tokens(path, tokens)
        return save_bytes_to_cache(path.read_bytes(), path.name, CACHE)


def _figures_html(figures: dict[str, str]) -> str:
    cells = [
        f"<div><dt>{name}</dt><dd>{value}</dd><dd class='note'>{FIGURE_NOTES[name]}</dd></div>"
        for name, value in figures.items()
    ]
    return f"<dl class='figures'>{''.join(cells)}</dl>"


def _tile_progress(progress: gr.Progress) -> Callable[[int, int], None]:
    return lambda *done_and_total: progress(done_and_total, "tiles", unit="tiles")


def _image_size(path: str) -> tuple[int, int] | None:
    """Width and height in an image's header, before its pixels are decoded; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(path, formats=tuple(IMAGE_FORMATS)) as image:
                return image.size
    except Exception:  # Pillow raises almost any type; `load_image` then explains the error
        return None


def _check_size(width: int, height: int, scales: Sequence[float]) -> None:
    largest = max(1, *scales)
    if width * height * largest**2 > MAX_PIXELS:
        raise ValueError(
            f"An image and its reconstructions must have at most {MAX_PIXELS / 1e6:.0f} million pixels on this page, "
            f"got {width * height * largest**2 / 1e6:.0f} million for {width} x {height} at scale {largest:g}. Choose "
            "smaller scales or a smaller image, or use `svqvae reconstruct`."
        )
