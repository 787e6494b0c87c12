"""Generators behind the page of `svqvae demo --generator`: one class for each kind, which all draw from a request."""

import html
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.known_objects import say_rewritten, say_undrawable
from svqvae_hf.pipelines.pipeline_next_scale import SVQVAENextScalePipeline

NO_CLASS = -1
GUIDANCE = 3.0  # of generators without their own
TOP_P = 0.95  # pipelines draw from the likeliest tokens that add up to this probability
VARIED_TEMPERATURE = 0.5  # below, some seeds of the bundled model make equal pictures
MAX_SEED = 2**32 - 1  # the browser holds larger numbers only roughly


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Args:
        label (`int`): Number of a class, or `NO_CLASS`.
        prompt (`str`): Prompt; empty for none.
        seed (`float`, *optional*): Seed, as the visitor typed it; `None` for 0.
        guidance (`float`): Scale of classifier-free guidance.
        temperature (`float`): Sampling temperature of a language model.
        picture (`PIL.Image.Image`, *optional*): Picture to edit.
        mask (`PIL.Image.Image`, *optional*): White where the picture is generated anew.
    """

    label: int
    prompt: str
    seed: float | None
    guidance: float
    temperature: float
    picture: Image.Image | None = None
    mask: Image.Image | None = None

    def random_generator(self) -> torch.Generator:
        """Generator of random numbers for the seed.

        Raises:
            ValueError: The seed is out of range.
        """
        seed = 0 if self.seed is None else self.seed
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}, got {seed:g}.")
        return torch.Generator().manual_seed(int(seed))


class PageGenerator(ABC):
    """A generator as the page sees it.

    Args:
        model: Pipeline or language model. Nothing in it is changed, because it serves several visitors at once.
        grid (`tuple[int, int]`): Rows and columns of ids of a whole image.
        total (`int`): Number of steps of an image.

    Attributes:
        size (`tuple[int, int]`): Width and height of an image in pixels.
    """

    heading = "An image is generated token by token, row by row, as a language model writes text."
    unit = "row"  # word for the part of an image that is generated in one step
    edits = False  # whether parts of a picture can be generated anew
    describes = False  # whether the generator also writes captions
    temperature: float | None = None  # first value on the page; `None` if visitors cannot choose a temperature
    seed_note = "Another number makes another picture"
    guidance = GUIDANCE  # first value on the page

    def __init__(self, model: Any, grid: tuple[int, int], total: int):
        self.model = model
        self.total = total
        rows, columns = grid
        width = columns * model.vqvae.f
        height = rows * model.vqvae.f
        self.size = (width, height)

    @property
    @abstractmethod
    def reads_prompts(self) -> bool:
        """Whether visitors write prompts. Otherwise they choose a class, if there are any."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that visitors choose from."""
        return []

    @abstractmethod
    def draw(self, request: Request, callback: Callable[..., None]) -> Image.Image:
        """Draws an image.

        Args:
            request ([`Request`]): What to draw.
            callback (`Callable`): Called after each step with the model, the number of the step, the grid and
                `{"ids": ...}`.
        """

    def describe(self, picture: Image.Image) -> str:
        """Caption of a picture, by a generator that describes."""
        raise NotImplementedError

    def things_undrawable(self, prompt: str) -> list[str]:
        """Words of a prompt for things that the generator cannot draw; none if it does not tell."""
        return []

    def facts(self, request: Request) -> str:
        """The request in HTML, for the line above the picture."""
        facts = []
        if self.reads_prompts:
            facts.append(f"“{request.prompt}”")
        elif request.label != NO_CLASS:
            facts.append(f"class {self.class_names[request.label]}")
        seed = int(request.seed or 0)
        facts.append(f"seed {seed}")
        if self.reads_prompts:
            facts += self.prompt_notes(request.prompt)
        return html.escape(", ".join(facts))

    def say_rewritten(self, prompt: str) -> str:
        """Text that says how the model understood a prompt; empty if it draws the prompt as it is."""
        return ""

    def prompt_notes(self, prompt: str) -> list[str]:
        """Notes that tell what is drawn in place of the prompt, and which things cannot be drawn."""
        notes = []
        rewritten = self.say_rewritten(prompt)
        if rewritten:
            notes.append(rewritten)
        things = self.things_undrawable(prompt)
        if things:
            notes.append(say_undrawable(things))
        return notes


class PipelineGenerator(PageGenerator):
    """A pipeline, with classes or prompts."""

    def __init__(self, pipeline: Any, grid: tuple[int, int], total: int):
        super().__init__(pipeline, grid, total)
        pipeline.set_progress_bar_config(disable=True)

    @property
    def reads_prompts(self) -> bool:
        """Whether it has a tokenizer."""
        return self.model.tokenizer is not None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the config of the pipeline, or their numbers if it has no names."""
        if self.reads_prompts:
            return []
        names = self.model.config["class_names"]
        if names:
            return list(names)
        return [str(number) for number in range(self.model.num_classes)]

    def draw(self, request: Request, callback: Callable[..., None]) -> Image.Image:
        """Draws an image of a class or prompt, or of neither."""
        options = self._condition(request)
        if request.picture is not None:
            options["image"] = request.picture
            options["mask_image"] = request.mask
        result = self.model(
            generator=request.random_generator(), top_p=TOP_P, callback_on_step_end=callback, **options
        )
        return result.images[0]

    def _condition(self, request: Request) -> dict[str, Any]:
        """Arguments of the pipeline for the prompt or the class; none without either."""
        if self.reads_prompts:
            return {"prompt": request.prompt, "guidance_scale": request.guidance}
        if request.label != NO_CLASS:
            return {"class_labels": request.label, "guidance_scale": request.guidance}
        return {}


class RowPipelineGenerator(PipelineGenerator):
    """An [`SVQVAEAutoregressivePipeline`]."""

    def __init__(self, pipeline: Any):
        rows, _ = pipeline.grid
        super().__init__(pipeline, pipeline.grid, total=rows)  # a step per row


class ScalePipelineGenerator(PipelineGenerator):
    """An [`SVQVAENextScalePipeline`]."""

    heading = "An image is generated from coarse to fine. Each step predicts all tokens of one scale at once."
    unit = "step"
    edits = True

    def __init__(self, pipeline: SVQVAENextScalePipeline):
        schedule = pipeline.trained_schedule
        largest_grid = schedule[-1]
        super().__init__(pipeline, largest_grid, total=len(schedule))  # a step per scale


class LanguageModelGenerator(PageGenerator):
    """An [`ImageLanguageModel`]."""

    edits = True
    describes = True
    reads_prompts = True

    def __init__(self, model: ImageLanguageModel):
        grid = model.processor.vocabulary.grids[0]
        rows, _ = grid
        super().__init__(model, grid, total=rows)  # a step per row
        self.guidance = model.sampling["guidance_scale"]
        self.temperature = model.sampling["temperature"]
        if self.temperature < VARIED_TEMPERATURE:
            self.seed_note = f"At a temperature of {self.temperature:g}, many numbers make the same picture"

    def things_undrawable(self, prompt: str) -> list[str]:
        """Words of a prompt for things that the model cannot draw. Empty if it has no `known_objects`."""
        return self.model.undrawable([prompt])

    def say_rewritten(self, prompt: str) -> str:
        """Text that says how the model understood a prompt; empty if its caption says the same."""
        if not prompt:
            return ""
        (caption,) = self.model.rewrite([prompt])
        return say_rewritten(prompt, caption, self.model.known_objects)

    def draw(self, request: Request, callback: Callable[..., None]) -> Image.Image:
        """Draws an image of a prompt, or of none."""
        edit_options = {}
        if request.picture is not None:
            edit_options = {"image": [request.picture], "mask_image": [request.mask]}
        images = self.model.draw(
            request.prompt or None,
            guidance_scale=request.guidance,
            temperature=request.temperature,
            generator=request.random_generator(),
            callback_on_step_end=callback,
            **edit_options,
        )
        return images[0]

    def describe(self, picture: Image.Image) -> str:
        """Caption of a picture."""
        return self.model.caption([picture])[0]


def page_generator(model: Any) -> PageGenerator:
    """The generator of the page for a pipeline or language model."""
    if isinstance(model, ImageLanguageModel):
        return LanguageModelGenerator(model)
    if isinstance(model, SVQVAENextScalePipeline):
        return ScalePipelineGenerator(model)
    return RowPipelineGenerator(model)
