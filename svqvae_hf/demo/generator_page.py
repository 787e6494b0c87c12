"""The page of `svqvae demo --generator`: images grow scale by scale or row by row, and parts are painted anew.

A language model also describes images.
"""

import html
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

import gradio as gr
import torch
from PIL import Image

from svqvae_hf.demo.page import CACHE_SECONDS
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.captions import say_unknown, unknown_words
from svqvae_hf.pipelines.pipeline_next_scale import SVQVAENextScalePipeline
from svqvae_hf.tokens.image_tokens import is_out_of_memory

NO_CLASS = -1
GUIDANCE = 3.0  # of generators without their own
TOP_P = 0.95  # pipelines draw from the likeliest tokens that add up to this probability
VISITORS = 4  # served at once
MAX_SEED = 2**62
EDITOR_PX = 512  # longer side of the picture to paint on
PAPER = (128, 128, 128)  # colour of rows that are still to come
BRUSH = "#ff2d6f"
HEADING = "<h1>SVQVAE</h1><p>{}</p>"
BY_SCALE = "An image is generated from coarse to fine. Each step predicts all tokens of one scale at once."
BY_ROW = "An image is generated token by token, row by row, as a language model writes text."
EMPTY = "<p class='empty'>Click Generate. The picture appears here while it grows.</p>"
PAINT_HINT = "Paint over a part of the picture. It is generated anew, and all other tokens stay."


Step = tuple[Image.Image, str]  # what the ids so far decode to, as large as the result, and the title of the step


class GeneratorPage:
    """The handlers behind the page. They change nothing in the generator, which serves several visitors at once.

    Args:
        pipeline ([`SVQVAEAutoregressivePipeline`], [`SVQVAENextScalePipeline`] or [`ImageLanguageModel`]): Generator
            of the page. Visitors cannot choose another.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.next_scale = isinstance(pipeline, SVQVAENextScalePipeline)
        self.draws = isinstance(pipeline, ImageLanguageModel)
        self.edits = self.next_scale or self.draws
        self.unit = "step" if self.next_scale else "row"
        self.reads_prompts = self.draws or pipeline.tokenizer is not None
        self.num_classes = 0 if self.reads_prompts else pipeline.num_classes
        if self.draws:
            self.guidance, grid = pipeline.sampling["guidance_scale"], pipeline.processor.vocabulary.grids[0]
        else:
            self.guidance, grid = GUIDANCE, pipeline.trained_schedule[-1] if self.next_scale else pipeline.grid
            pipeline.set_progress_bar_config(disable=True)
        rows, columns = grid
        self.size = columns * pipeline.vqvae.f, rows * pipeline.vqvae.f
        self.total = len(pipeline.trained_schedule) if self.next_scale else rows

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Names and numbers of the classes, and of no class."""
        names: Iterable[str] = map(str, range(self.num_classes))
        if self.num_classes:
            names = self.pipeline.config["class_names"] or names
        return [*((name, number) for number, name in enumerate(names)), ("no class", NO_CLASS)]

    def generate(self, label: int, prompt: str, seed: float, guidance: float, **edited: Any) -> Iterator[list[Any]]:
        """Generates an image, and yields the values of the page's outputs after each step."""
        seed = int(seed or 0)
        if abs(seed) > MAX_SEED:
            yield _error_values(f"The seed must be at most {MAX_SEED}. Choose another.")
            return
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), **edited}
        facts = f"seed {seed}"
        if self.reads_prompts or label != NO_CLASS:
            options["guidance_scale"] = guidance
        if self.reads_prompts:
            options["prompts" if self.draws else "prompt"] = prompt or (None if self.draws else "")
            facts = f"“{html.escape(prompt)}”, {facts}"
            leaves_out = not hasattr(self.pipeline, "text_encoder")  # T5 reads any word
            if leaves_out and (unknown := unknown_words(self.pipeline.tokenizer, [prompt])):
                facts += f", {html.escape(say_unknown(unknown))}"
        elif label != NO_CLASS:
            options["class_labels"] = int(label)
            facts = f"class {html.escape(self.classes[int(label)][0])}, {facts}"
        if not self.draws:  # a language model has its own sampling
            options["top_p"] = TOP_P
        try:
            for image, title in self._steps(options):
                yield _values(f"<p>{title}. {facts}</p>", image)
        except (ValueError, OSError) as error:
            yield _error_values(str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            yield _error_values("Out of memory.")
        else:
            size = f"<b>{self.size[0]} × {self.size[1]} pixels</b> in {self.total} {self.unit}s"
            yield _values(f"<p>{size}. {facts}</p>", image, editable=self.edits)

    def repaint(
        self, picture: Image.Image | None, drawing: dict[str, Any] | None, *settings: Any
    ) -> Iterator[list[Any]]:
        """Generates the painted part of a picture anew, as [`generate`] does."""
        mask = _painted(drawing, self.size)
        if picture is None or mask is None:
            alert, *_ = _error_values("Nothing is painted yet. Paint over a part of the picture.")
            yield [alert, *[gr.skip()] * 4]
        else:
            edited: dict[str, Any] = {"image": picture, "mask_image": mask}
            if self.draws:
                edited = {name: [value] for name, value in edited.items()}
            yield from self.generate(*settings, **edited)

    def describe(self, picture: Image.Image | None) -> str:
        """Caption of a picture, by the language model."""
        return "" if picture is None else self.pipeline.caption([picture])[0]

    def _steps(self, options: dict[str, Any]) -> Iterator[Step]:
        """Runs the pipeline in a thread, and yields each step as soon as it is done, the last one with the result."""
        previews: SimpleQueue[Step | None] = SimpleQueue()
        left = Event()

        def note(_: Any, step: int, at: tuple[int, int], tensors: dict[str, torch.Tensor]) -> None:
            if left.is_set():
                raise CancelledError
            previews.put(self._preview(step, at, tensors["ids"]))

        with ThreadPoolExecutor(1) as pool:
            generate = self.pipeline.draw if self.draws else self.pipeline
            running = pool.submit(generate, callback_on_step_end=note, **options)
            running.add_done_callback(lambda _: previews.put(None))
            try:
                while (preview := previews.get()) is not None:
                    _, title = preview
                    yield preview
            finally:
                left.set()  # the visitor may have gone
            image = running.result()[0]
            yield image if self.draws else image[0], title

    def _preview(self, step: int, at: tuple[int, int], ids: torch.Tensor) -> Step:
        """Decodes the ids of a scale or of the first rows of an image, given the grid of the whole."""
        rows, columns = at
        f = self.pipeline.vqvae.f
        image = Image.new("RGB", (columns * f, rows * f), PAPER)
        image.paste(self.pipeline.image_processor.postprocess(self.pipeline.vqvae.decode_tokens(ids))[0])
        title = f"{self.unit.capitalize()} {step + 1} of {self.total}: {columns} × {rows} tokens"
        return image.resize(self.size, Image.Resampling.BICUBIC), title


def build(page: GeneratorPage) -> gr.Blocks:
    """Builds the layout of the page and connects it with its handlers.

    Args:
        page ([`GeneratorPage`]): Handlers.
    """
    with gr.Blocks(
        title="SVQVAE", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as blocks:
        gr.HTML(HEADING.format(BY_SCALE if page.next_scale else BY_ROW), elem_classes="heading")
        picture = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                condition = _condition(page)
                run = gr.Button("Generate", variant="primary", elem_id="run")
                settings = [*condition, *_sampling(page)]
                with gr.Accordion("Describe a picture", open=False, visible=page.draws):
                    upload = gr.Image(type="pil", show_label=False, sources=("upload", "clipboard"), elem_id="upload")
                    told = gr.Textbox(label="Caption", interactive=False, elem_id="told")
            with gr.Column(scale=3, min_width=560):
                summary = gr.HTML(EMPTY, elem_id="summary")
                with gr.Row():
                    image = gr.Image(
                        show_label=False,
                        interactive=False,
                        visible=False,
                        format="png",
                        buttons=["fullscreen", "download"],
                        elem_id="result",
                        elem_classes="alone",
                    )
                    with gr.Column(visible=False, elem_classes="explained", elem_id="painting") as painting:
                        canvas = gr.ImageEditor(
                            show_label=False,
                            type="pil",
                            sources=(),
                            transforms=(),
                            layers=False,
                            brush=gr.Brush(default_size=40, colors=[BRUSH], color_mode="fixed"),
                            canvas_size=(EDITOR_PX, EDITOR_PX),
                            elem_id="canvas",
                        )
                        gr.HTML(PAINT_HINT)
                        repaint = gr.Button("Generate the painted part anew", elem_id="repaint")
        event: dict[str, Any] = {
            "outputs": [summary, image, picture, painting, canvas],
            "show_progress": "hidden",  # the picture itself shows it
            "concurrency_id": "model",
            "concurrency_limit": VISITORS,
            "trigger_mode": "always_last",  # a button that is pressed again waits, and then reads the new prompt
            "api_visibility": "private",
        }
        run.click(page.generate, settings, **event)
        repaint.click(page.repaint, [picture, canvas, *settings], **event)
        upload.change(page.describe, upload, **{**event, "outputs": told})
    return blocks


def _condition(page: GeneratorPage) -> tuple[gr.Component, ...]:
    """Class and caption."""
    label = gr.Dropdown(
        page.classes,
        value=page.classes[0][1],
        label="Class",
        info="What the picture shows",
        visible=page.num_classes > 0,
    )
    prompt = gr.Textbox(
        label="Prompt",
        info="What the picture shows, as a caption",
        lines=3,
        visible=page.reads_prompts,
        elem_id="prompt",
    )
    return label, prompt


def _sampling(page: GeneratorPage) -> tuple[gr.Component, ...]:
    """Seed and guidance."""
    guided = page.reads_prompts or page.num_classes > 0
    seed = gr.Number(0, precision=0, label="Seed", info="Another number makes another picture", elem_id="seed")
    info, first = "How closely the picture follows its class or prompt; 1 is off", page.guidance if guided else 1
    guidance = gr.Slider(1, 10, value=first, step=0.5, label="Guidance", info=info, visible=guided, elem_id="guidance")
    return seed, guidance


def _painted(drawing: dict[str, Any] | None, size: tuple[int, int]) -> Image.Image | None:
    """Mask of what a visitor painted, white where there is any paint; None without paint."""
    layers = (drawing or {}).get("layers") or []
    if not layers or layers[0].getchannel("A").getextrema()[1] == 0:
        return None
    return layers[0].getchannel("A").resize(size, Image.Resampling.BOX).point(lambda paint: 255 * (paint > 0))


def _values(summary: str, image: Image.Image, editable: bool = False) -> list[Any]:
    """Values of the page's outputs; with an editable result, also of the canvas."""
    values = [summary, gr.update(value=image, visible=True)]
    if not editable:
        return [*values, None, gr.skip(), gr.skip()]
    factor = EDITOR_PX / max(image.size)
    enlarged = image.resize([round(factor * side) for side in image.size], Image.Resampling.BICUBIC)
    drawing = {"background": enlarged, "layers": [], "composite": None}
    return [*values, image, gr.Column(visible=True), drawing]


def _error_values(message: str) -> list[Any]:
    """Values of the page's outputs after an error."""
    alert = f"<p class='error' role='alert'>{html.escape(message)}</p>"
    return [alert, gr.Image(visible=False), None, gr.Column(visible=False), gr.skip()]
