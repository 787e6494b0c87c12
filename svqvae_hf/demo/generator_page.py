"""The page of `svqvae demo --generator`: images grow scale by scale or row by row, and parts are painted anew.

A language model also describes images.
"""

import html
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from svqvae_hf.demo.hints import PromptHints
from svqvae_hf.demo.page import CACHE_SECONDS
from svqvae_hf.demo.page_generators import NO_CLASS, Request, page_generator
from svqvae_hf.tokens.image_tokens import is_out_of_memory

VISITORS = 4  # number of visitors served at the same time
EDITOR_PX = 512  # longer side of the picture to paint on
PAPER = (128, 128, 128)  # colour of rows that are not generated yet
BRUSH = "#ff2d6f"
HEADING = "<h1>SVQVAE</h1><p>{} {}</p>"
EMPTY = "<p class='empty'>Click Generate. The picture appears here while it grows.</p>"
PAINT_HINT = "Paint over a part of the picture. It is generated anew, and all other tokens stay."
TEMPERATURE_NOTE = "Pictures of different seeds differ more at a higher value, and more of them are wrong"


@dataclass(frozen=True)
class Step:
    """A step of an image that grows.

    Args:
        image (`PIL.Image.Image`): The ids so far, decoded, as large as the result.
        title (`str`): Title of the step.
    """

    image: Image.Image
    title: str


class GeneratorPage:
    """The handlers behind the page. They change nothing in the generator, which serves several visitors at once.

    Args:
        pipeline ([`SVQVAEAutoregressivePipeline`], [`SVQVAENextScalePipeline`] or [`ImageLanguageModel`]): Generator
            of the page. Visitors cannot choose another.
        hints ([`PromptHints`], *optional*): Hints for prompts.
    """

    def __init__(self, pipeline: Any, hints: PromptHints | None = None) -> None:
        self.generator = page_generator(pipeline)
        self.hints = hints

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Names and numbers of the classes, and of no class."""
        choices = []
        for number, name in enumerate(self.generator.class_names):
            choices.append((name, number))
        choices.append(("no class", NO_CLASS))
        return choices

    @property
    def invitation(self) -> str:
        """Sentence that says what a visitor does first."""
        if self.hints is not None:
            return "Press an example, or type what to draw and click Generate."
        if self.generator.reads_prompts:
            return "Type what to draw, and click Generate."
        if self.generator.class_names:
            return "Choose a class, and click Generate."
        return "Click Generate."

    def generate(
        self, label: int, prompt: str, seed: float | None, guidance: float, temperature: float
    ) -> Iterator[list[Any]]:
        """Generates an image, and yields the values of the page's outputs after each step."""
        request = Request(label=label, prompt=prompt, seed=seed, guidance=guidance, temperature=temperature)
        yield from self._generate(request)

    def repaint(
        self,
        picture: Image.Image | None,
        drawing: dict[str, Any] | None,
        label: int,
        prompt: str,
        seed: float | None,
        guidance: float,
        temperature: float,
    ) -> Iterator[list[Any]]:
        """Generates the painted part of a picture anew, as [`generate`] does."""
        mask = painted_mask(drawing, self.generator.size)
        if picture is None or mask is None:
            yield _summary_values(_alert("Nothing is painted yet. Paint over a part of the picture."))
            return
        request = Request(
            label=label,
            prompt=prompt,
            seed=seed,
            guidance=guidance,
            temperature=temperature,
            picture=picture,
            mask=mask,
        )
        yield from self._generate(request)

    def draw(
        self, label: int, prompt: str, seed: float | None, guidance: float, temperature: float
    ) -> tuple[Image.Image, str]:
        """Generates an image for a program that calls the page, which gets no previews, with notes on the prompt."""
        request = Request(label=label, prompt=prompt, seed=seed, guidance=guidance, temperature=temperature)
        try:
            image = self.generator.draw(request, _ignore_step)
            return image, ", ".join(self.generator.prompt_notes(prompt))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def describe(self, picture: Image.Image | None) -> str:
        """Caption of a picture, by the language model."""
        if picture is None:
            return ""
        return self.generator.describe(picture)

    def _generate(self, request: Request) -> Iterator[list[Any]]:
        """Yields the values of the page's outputs after each step, or an error that the visitor can correct."""
        generator = self.generator
        try:
            request.random_generator()  # raises for a wrong seed
            facts = generator.facts(request)
            for step in self._steps(request):
                yield _values(f"<p>{step.title}. {facts}</p>", step.image)
        except (ValueError, OSError) as error:
            yield _error_values(str(error))
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            yield _error_values("Out of memory.")
            return
        # All steps are done, because each error has returned above. The last step has the result.
        result = step.image
        width, height = generator.size
        summary = f"<p><b>{width} × {height} pixels</b> in {generator.total} {generator.unit}s. {facts}</p>"
        if generator.edits:
            yield _editable_values(summary, result)
        else:
            yield _values(summary, result)

    def _steps(self, request: Request) -> Iterator[Step]:
        """Runs the generator in a thread. Yields each step as soon as it is done, and then a step with the result."""
        previews: SimpleQueue[Step | None] = SimpleQueue()  # `None` follows the last preview
        visitor_has_left = Event()

        def show(_: Any, number: int, grid: tuple[int, int], tensors: dict[str, torch.Tensor]) -> None:
            """Called by the generator after each step, in the thread."""
            if visitor_has_left.is_set():
                raise CancelledError  # ends the thread
            preview = self._preview(number, grid, tensors["ids"])
            previews.put(preview)

        def draw() -> Image.Image:
            """Runs the generator, in the thread."""
            try:
                return self.generator.draw(request, show)
            finally:  # also after an error
                previews.put(None)

        title_of_last_step = ""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(draw)
            try:
                for preview in _until_none(previews):
                    title_of_last_step = preview.title
                    yield preview
            finally:
                # If the visitor leaves, gradio closes this iterator at its `yield`. The thread must stop, too.
                visitor_has_left.set()
            yield Step(future.result(), title_of_last_step)  # `result` raises the error of the thread, if any

    def _preview(self, number: int, grid: tuple[int, int], ids: torch.Tensor) -> Step:
        """Decodes the ids of a scale, or of the first rows of an image with `grid` rows and columns."""
        generator = self.generator
        vqvae = generator.model.vqvae
        rows, columns = grid
        size = (columns * vqvae.f, rows * vqvae.f)  # width and height in pixels
        image = Image.new("RGB", size, PAPER)
        sample = vqvae.decode_tokens(ids)
        (decoded,) = generator.model.image_processor.postprocess(sample)
        image.paste(decoded)  # at the top left
        title = f"{generator.unit.capitalize()} {number + 1} of {generator.total}: {columns} × {rows} tokens"
        return Step(image.resize(generator.size, Image.Resampling.BICUBIC), title)


def _ignore_step(*_: Any) -> None:
    """Does nothing after a step of a generator."""


def _until_none(steps: SimpleQueue[Step | None]) -> Iterator[Step]:
    """Takes steps from a queue as soon as another thread puts them there, until it puts `None`."""
    step = steps.get()
    while step is not None:
        yield step
        step = steps.get()


def build(page: GeneratorPage) -> gr.Blocks:
    """Builds the layout of the page and connects it with its handlers.

    Args:
        page ([`GeneratorPage`]): Handlers.
    """
    with gr.Blocks(
        title="SVQVAE", analytics_enabled=False, fill_width=True, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as blocks:
        gr.HTML(HEADING.format(page.invitation, page.generator.heading), elem_classes="heading")
        picture = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                label = _class_choice(page)
                prompt = _prompt_box(page)
                examples = _example_list(page.hints)
                run = gr.Button("Generate", variant="primary", elem_id="run")
                seed = _seed_box(page)
                guidance = _guidance_slider(page)
                temperature = _temperature_slider(page)
                _object_list(page.hints)
                with gr.Accordion("Describe a picture", open=False, visible=page.generator.describes):
                    upload = gr.Image(type="pil", show_label=False, sources=("upload", "clipboard"), elem_id="upload")
                    caption = gr.Textbox(label="Caption", interactive=False, elem_id="told")
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
        settings = [label, prompt, seed, guidance, temperature]
        outputs = [summary, image, picture, painting, canvas]  # in the order of `_values`
        event: dict[str, Any] = {
            "show_progress": "hidden",  # the picture itself shows it
            "concurrency_id": "model",
            "concurrency_limit": VISITORS,
            "trigger_mode": "always_last",  # a button that is pressed again waits, and then reads the new prompt
            "api_visibility": "private",
        }
        run.click(page.generate, settings, outputs, **event)
        repaint.click(page.repaint, [picture, canvas, *settings], outputs, **event)
        upload.change(page.describe, upload, caption, **event)
        if examples is not None:
            at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            example = examples.click(lambda row: row[0], examples, prompt, **at_once)
            example.then(page.generate, settings, outputs, **event)
        _add_api(page, settings)
    return blocks


def _add_api(page: GeneratorPage, settings: list[Any]) -> None:
    """Adds endpoints for programs, whose parts the page does not show."""
    of_model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": VISITORS}
    button = gr.Button(visible=False)
    image = gr.Image(label="image", visible=False, format="png")
    notes = gr.Textbox(label="notes", visible=False)
    if not page.generator.class_names:
        # gr.State is not an argument of the endpoint, so programs see no class if there is only the choice "no class".
        settings = [gr.State(NO_CLASS), *settings[1:]]
    button.click(page.draw, settings, [image, notes], api_name="draw", **of_model)
    if page.generator.describes:
        picture = gr.Image(type="pil", visible=False)
        caption = gr.Textbox(label="caption", visible=False)
        button.click(page.describe, picture, caption, api_name="caption", **of_model)


def _class_choice(page: GeneratorPage) -> gr.Dropdown:
    """List of the classes to choose from; hidden if there is only the choice "no class"."""
    choices = page.classes  # pairs of name and number, at least "no class"
    _, number_of_first_choice = choices[0]
    return gr.Dropdown(
        choices,
        value=number_of_first_choice,
        label="Class",
        info="What the picture shows",
        visible=len(page.generator.class_names) > 0,
    )


def _prompt_box(page: GeneratorPage) -> gr.Textbox:
    """Box for a prompt; hidden if the generator reads none."""
    return gr.Textbox(
        label="Prompt",
        info="What the picture shows, as a caption",
        lines=3,
        visible=page.generator.reads_prompts,
        elem_id="prompt",
    )


def _example_list(hints: PromptHints | None) -> gr.Dataset | None:
    """Prompts to press, if there are hints."""
    if hints is None:
        return None
    return gr.Dataset(
        label="Or an example",
        components=["textbox"],
        samples=[[prompt] for prompt in hints.examples],
        type="values",
        elem_id="examples",
    )


def _object_list(hints: PromptHints | None) -> None:
    """List of what the generator can draw, if there are hints."""
    if hints is None:
        return
    objects = html.escape(", ".join(hints.objects))
    advice = html.escape(hints.advice)
    backgrounds = html.escape(", ".join(hints.backgrounds))
    with gr.Accordion(f"The {len(hints.objects)} things that it draws", open=False, elem_id="objects"):
        gr.HTML(f"<p>{objects}.</p><p>{advice} Backgrounds: {backgrounds}.</p>", elem_classes="hints")


def _seed_box(page: GeneratorPage) -> gr.Number:
    """Box for a seed."""
    return gr.Number(0, precision=0, label="Seed", info=page.generator.seed_note, elem_id="seed")


def _guidance_slider(page: GeneratorPage) -> gr.Slider:
    """Slider for the guidance scale; hidden if there are neither classes nor prompts."""
    is_guided = page.generator.reads_prompts or len(page.generator.class_names) > 0
    return gr.Slider(
        1,
        10,
        value=page.generator.guidance if is_guided else 1,
        step=0.5,
        label="Guidance",
        info="How closely the picture follows its class or prompt; 1 is off",
        visible=is_guided,
        elem_id="guidance",
    )


def _temperature_slider(page: GeneratorPage) -> gr.Slider:
    """Slider for the temperature; hidden if visitors cannot choose it."""
    temperature = page.generator.temperature
    return gr.Slider(
        0,
        1.5,
        value=1 if temperature is None else temperature,
        step=0.1,
        label="Temperature",
        info=TEMPERATURE_NOTE,
        visible=temperature is not None,
        elem_id="temperature",
    )


def painted_mask(drawing: dict[str, Any] | None, size: tuple[int, int]) -> Image.Image | None:
    """Mask of `size` (width, height), white where a visitor painted anything; None without paint."""
    if drawing is None or not drawing["layers"]:
        return None
    opacity = drawing["layers"][0].getchannel("A")
    _, largest_opacity = opacity.getextrema()
    if largest_opacity == 0:
        return None
    # In floats, because the mean of a pixel with a tiny dot of paint would be rounded to 0.
    mean_opacity = opacity.convert("F").resize(size, Image.Resampling.BOX)
    is_painted = np.asarray(mean_opacity) > 0  # (height, width)
    mask = np.where(is_painted, 255, 0)
    return Image.fromarray(mask.astype(np.uint8))


def _values(summary: str, image: Image.Image) -> list[Any]:
    """Values of the page's outputs for a picture that visitors cannot paint on.

    They are in the order of `outputs` in [`build`]: summary, image, picture, painting, canvas.
    """
    return [summary, gr.update(value=image, visible=True), None, gr.skip(), gr.skip()]


def _editable_values(summary: str, image: Image.Image) -> list[Any]:
    """Values of the page's outputs for a picture that visitors can paint on."""
    factor = EDITOR_PX / max(image.size)
    width = round(factor * image.width)
    height = round(factor * image.height)
    enlarged = image.resize((width, height), Image.Resampling.BICUBIC)
    drawing = {"background": enlarged, "layers": [], "composite": None}
    return [summary, gr.update(value=image, visible=True), image, gr.Column(visible=True), drawing]


def _summary_values(summary: str) -> list[Any]:
    """Values of the page's outputs of which only the summary changes."""
    return [summary, gr.skip(), gr.skip(), gr.skip(), gr.skip()]


def _error_values(message: str) -> list[Any]:
    """Values of the page's outputs after an error."""
    return [_alert(message), gr.Image(visible=False), None, gr.Column(visible=False), gr.skip()]


def _alert(message: str) -> str:
    """An error in HTML."""
    return f"<p class='error' role='alert'>{html.escape(message)}</p>"
