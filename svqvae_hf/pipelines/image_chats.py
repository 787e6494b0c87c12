"""Chats about images with a language model that has image tokens: draws, edits and captions images."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from PIL import Image, ImageOps
from transformers import BatchFeature, PreTrainedModel

from .captions import has_words
from .id_sampler import IdSampler
from .known_objects import KnownObjects, say_undrawable
from .sampling import Generators, check_generators, check_sampling, guide, sample

ANSWER = "<|answer|>"  # stands for an answer in a template
PIXEL_DIMENSIONS = (2, 3)  # of the pixels of one image, without and with channels
DEFAULT_SAMPLING = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
REWRITES = "rewrite_captions"  # key in the `generation_kwargs` of the generation config
MAX_REWRITTEN_TOKENS = 64  # of a caption that the model rewrites
LIGHTEST_BLACK = 127  # greys of a mask up to this value count as black, because masks in JPEG files have noise


class ImageChats:
    """A language model with image tokens, and its processor. Its prompts are as in `training/train_language_model.py`.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Language model.
        processor ([`SVQVAEProcessor`]): Its processor.
        known_objects ([`KnownObjects`], *optional*): What the model can draw, for warnings about prompts that name
            something else.

    Raises:
        ValueError: The language model has no image tokens, or others than the processor.
    """

    def __init__(self, language_model: PreTrainedModel, processor: Any, known_objects: KnownObjects | None = None):
        vocabulary = processor.vocabulary
        if type(vocabulary).from_config(language_model.config) != vocabulary:
            raise ValueError(
                "the language model and its processor must have the same image tokens, but they differ. Load both "
                "from the folder in which they were saved together."
            )
        self.language_model = language_model.eval()
        self.processor = processor
        self.known_objects = known_objects
        self.tokenizer = processor.tokenizer
        self.vqvae = processor.vqvae
        self.image_processor = processor.image_processor
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def sampling(self) -> dict[str, Any]:
        """Guidance scale, temperature, top k and top p of images, by default 1, 1, 0 and 1.

        `generation_kwargs` in `generation_config.json` may have others, as in Janus. They do not change texts.
        """
        stored = self._generation_kwargs
        sampling = {}
        for name, default in DEFAULT_SAMPLING.items():
            value = stored.get(name, default)
            if not isinstance(value, Real):
                raise ValueError(f"`{name}` in the generation config must be a number, got {value!r:.80}.")
            sampling[name] = value
        return sampling

    @property
    def rewrites(self) -> bool:
        """Whether the model writes what it is going to draw before each image, see `rewrite`.

        `rewrite_captions` in `generation_kwargs` of `generation_config.json` says so.
        """
        value = self._generation_kwargs.get(REWRITES, False)
        if not isinstance(value, bool):
            raise ValueError(f"`{REWRITES}` in the generation config must be true or false, got {value!r:.80}.")
        return value

    @property
    def _generation_kwargs(self) -> Mapping[str, Any]:
        """How the model generates images, in the generation config; empty if it does not say so."""
        stored = getattr(self.language_model.generation_config, "generation_kwargs", None)
        if stored is None:
            return {}
        if not isinstance(stored, Mapping):
            raise ValueError(f"`generation_kwargs` of the generation config must be an object, got {stored!r:.80}.")
        return stored

    def to(self, device: torch.device | str) -> Self:
        """Moves the language model and the image tokenizer."""
        self.language_model.to(device)
        self.vqvae.to(device)
        return self

    def undrawable(self, prompts: Sequence[str | None]) -> list[str]:
        """Nouns in prompts that name what the model cannot draw, each once. Empty if it has no `known_objects`."""
        if self.known_objects is None:
            return []
        undrawable_nouns: list[str] = []
        for prompt in prompts:
            if prompt is None:
                continue
            for noun in self.known_objects.unknown(prompt):
                if noun not in undrawable_nouns:
                    undrawable_nouns.append(noun)
        return undrawable_nouns

    @torch.inference_mode()
    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Rewrites prompts, by greedy decoding, into the captions that the model draws.

        A model that was trained with `--rewrite_fraction` reads any wording, and writes the first caption of a row
        with this meaning. `draw` starts its answer with this caption.

        Args:
            prompts (`Sequence[str]`): Prompts.

        Returns:
            `list[str]`: A caption for each prompt: the prompt itself if the model does not rewrite.
        """
        if not self.rewrites or not prompts:
            return list(prompts)
        return self._rewrite(self._questions(prompts))

    @torch.inference_mode()
    def draw(
        self,
        prompts: str | Sequence[str | None] | None,
        grid: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        callback_on_step_end: Callable[..., object] | None = None,
    ) -> list[Image.Image]:
        """Draws one image per caption, or edits images.

        Args:
            prompts (`str` or `Sequence[str]`): A caption, or one caption per image; `None` for an image without a
                caption. If the model has `known_objects`, a warning names things that it cannot draw. A model that
                rewrites captions draws the captions that `rewrite` returns.
            grid (`tuple[int, int]`, *optional*): Rows and columns of codes, by default the first of the model.
            guidance_scale (`float`, *optional*): Scale of classifier-free guidance. The defaults of this and
                the next three arguments are in `sampling`.
            temperature (`float`, *optional*): Sampling temperature; 0 takes the most likely codes.
            top_k (`int`, *optional*): Number of most likely codes to sample from; 0 means all.
            top_p (`float`, *optional*): Total probability of the most likely codes to sample from.
            generator (`torch.Generator` or a list of them, *optional*): One for all images or one per image.
            image (`PIL.Image.Image` or a list of them, *optional*): Images to edit, one per caption.
            mask_image (`PIL.Image.Image` or a list of them, *optional*): Their masks, of the same sizes. A code is
                drawn if its part of the mask has any white, and kept otherwise.
            callback_on_step_end (`Callable`, *optional*): Called after each row of codes with the model, the number of
                the row, the grid, and `{"ids": ...}`, the ids of the rows so far, `(batch, rows, columns)`.

        Raises:
            ValueError: If an argument of sampling is out of its range, the model does not know the grid, there are
                no captions or not as many images, masks or generators, or a caption has no word.
        """
        texts = _list_of_prompts(prompts)
        _check_prompts(texts)
        sampling = self._choose_sampling(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        check_generators(generator, len(texts))
        if grid is None:
            grid = self.processor.vocabulary.grids[0]
        undrawable_nouns = self.undrawable(texts)
        if undrawable_nouns:
            warnings.warn(say_undrawable(undrawable_nouns), stacklevel=2)
        questions = self._questions(texts)
        begin_image = self.processor.begin_image(grid)
        starts_of_answers = [caption + begin_image for caption in self._captions_before_images(questions)]
        guidance_scale = sampling.pop("guidance_scale")
        has_caption = any(text is not None for text in texts)
        guidance = None
        if guidance_scale != 1 and has_caption:
            # All questions again without their captions, as the sampler expects them for guidance.
            questions += [self.processor.no_condition] * len(texts)
            starts_of_answers += [begin_image] * len(texts)
            guidance = partial(guide, guidance_scale=guidance_scale)
        ids_to_keep = None
        if image is not None or mask_image is not None:
            ids_to_keep = self._ids_to_keep(_as_list(image), _as_list(mask_image), grid, len(texts))
        vocabulary = self.processor.vocabulary
        sampler = IdSampler(
            self.language_model,
            self._ask(questions, starts_of_answers),
            grid,
            codes=range(vocabulary.first_token, vocabulary.begin),
            sample=partial(sample, **sampling, generator=generator),
            guide=guidance,
            known=ids_to_keep,
        )
        for row in range(grid[0]):
            ids = sampler.next_row()  # (batch, row + 1, columns)
            if callback_on_step_end is not None:
                callback_on_step_end(self, row, grid, {"ids": ids.clone()})
        return self.processor.decode_images(list(sampler.ids))

    @torch.inference_mode()
    def caption(self, images: Any, prompt: str = "", max_new_tokens: int = 64) -> list[str]:
        """Captions each image by greedy decoding.

        Args:
            images (`Sequence`): Images as [`SVQVAEProcessor`] takes them, or one of them.
            prompt (`str`, defaults to `""`): Text after each image.
            max_new_tokens (`int`, defaults to 64): Largest number of tokens of a text.

        Raises:
            ValueError: There is no image.
        """
        if _is_one_image(images):
            images = [images]
        if len(images) == 0:
            raise ValueError("`images` must hold at least one image, got none.")
        questions = [self.processor.image_token + prompt] * len(images)
        images_of_questions = [[image] for image in images]
        inputs = self._ask(questions, images=images_of_questions)
        return self._write(inputs, max_new_tokens)

    def _choose_sampling(self, **arguments: Any) -> dict[str, Any]:
        """Checked arguments of sampling. An argument that is None gets the model's default."""
        sampling = self.sampling
        for name, value in arguments.items():
            if value is not None:
                sampling[name] = value
        check_sampling(**sampling)
        return sampling

    def _questions(self, texts: Sequence[str | None]) -> list[str]:
        """Questions to the model: each caption itself, or the token for no caption."""
        return [self.processor.no_condition if text is None else text for text in texts]

    def _captions_before_images(self, questions: Sequence[str]) -> list[str]:
        """Captions that the model writes before the images of questions; empty if it writes none."""
        if not self.rewrites:
            return [""] * len(questions)
        captions = []
        for question, caption in zip(questions, self._rewrite(questions), strict=True):
            is_without_prompt = question == self.processor.no_condition
            captions.append("" if is_without_prompt else caption)
        return captions

    def _rewrite(self, questions: Sequence[str]) -> list[str]:
        """Captions that the model writes for questions, until an image begins."""
        inputs = self._ask(list(questions))
        return self._write(inputs, MAX_REWRITTEN_TOKENS, end=self.processor.vocabulary.begin)

    def _write(self, inputs: BatchFeature, max_new_tokens: int, end: int | None = None) -> list[str]:
        """Texts after the inputs, by greedy decoding.

        `end` is an image token that ends a text, as the end of sequence does. No other image token is written.
        """
        vocabulary_size = self.language_model.config.get_text_config().vocab_size
        image_tokens = range(self.processor.vocabulary.first_token, vocabulary_size)
        options: dict[str, Any] = {}
        if end is not None:
            options["eos_token_id"] = [end, self.tokenizer.eos_token_id]
        tokens = self.language_model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[token for token in image_tokens if token != end],
            **options,
        )  # (questions, question and answer)
        question_length = inputs["input_ids"].shape[1]
        answers = tokens[:, question_length:]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _ids_to_keep(
        self, images: Sequence[Image.Image], masks: Sequence[Image.Image], grid: tuple[int, int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of images, and whether each is kept because its part of the mask is black, `(batch, rows, columns)`.

        `count` is the number of prompts. Each needs an image and a mask.
        """
        images = [ImageOps.exif_transpose(image) for image in images]
        masks = [ImageOps.exif_transpose(mask) for mask in masks]
        _check_masks(images, masks, count)
        is_kept_of_images = []
        for mask in masks:
            is_kept_of_images.append(self._is_black(mask, grid))
        is_kept = torch.stack(is_kept_of_images)
        ids = torch.stack(self.processor.encode_images(images, grid))
        device = self.language_model.device
        return ids.to(device), is_kept.to(device)

    def _is_black(self, mask: Image.Image, grid: tuple[int, int]) -> torch.Tensor:
        """Whether the part of a mask that belongs to each code has no white, `(rows, columns)` in bool."""
        if mask.mode in ("LA", "P", "PA", "RGBA"):
            mask = mask.convert("RGB")  # without an alpha channel
        mask.info.pop("transparency", None)  # the colour that its file declares transparent
        # The image processor scales masks of floats and of 16 bits to 8 bits.
        pixels = self.image_processor(mask)["pixel_values"]
        images = self.image_processor.postprocess(pixels)  # a list of one image
        grey = np.asarray(images[0].convert("L"))  # (height, width)
        cropped = _crop_to_aspect_ratio(grey, grid)
        is_white = torch.from_numpy(cropped > LIGHTEST_BLACK)
        # Each code takes the maximum of its part of the mask, because a mean would lose thin strokes.
        has_white = F.adaptive_max_pool2d(is_white[None].float(), grid)[0]  # (rows, columns)
        return has_white == 0

    def _ask(
        self, questions: list[str], starts_of_answers: Sequence[str] | None = None, images: Any = None
    ) -> BatchFeature:
        """Arguments of the language model for questions, padded on the left, up to the starts of their answers.

        `images` are the images of each question, in lists.
        """
        if starts_of_answers is None:
            starts_of_answers = [""] * len(questions)
        # The prompts are chats that are cut before their answer, `ANSWER`. Chats without an answer would not do: some
        # templates write something before each answer, such as the name of the role.
        conversations = []
        for question in questions:
            user = {"role": "user", "content": question}
            assistant = {"role": "assistant", "content": ANSWER}
            conversations.append([user, assistant])
        prompts = []
        for chat, start_of_answer in zip(self._apply_template(conversations), starts_of_answers, strict=True):
            before_answer, _, _ = chat.rpartition(ANSWER)
            prompt = before_answer + start_of_answer
            prompts.append(prompt.rstrip(" "))  # tokenizers join a space with the word after it
        inputs = self.processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        return BatchFeature(arguments).to(self.language_model.device)

    def _apply_template(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """Texts of conversations. Raises for a damaged template."""
        try:
            chats = self.processor.apply_chat_template(conversations)
        except TemplateError as error:
            raise ValueError(
                f"the chat template must be a whole template of Jinja, but is damaged: {error}. Restore the file."
            ) from error
        if any(ANSWER not in chat for chat in chats):
            raise ValueError("the chat template must write what the assistant answers, but leaves it out. Restore it.")
        return chats


def _list_of_prompts(prompts: str | Sequence[str | None] | None) -> list[str | None]:
    """Prompts in a list. A single prompt may be a text, or None for an image without a caption."""
    if prompts is None or isinstance(prompts, str):
        return [prompts]
    return list(prompts)


def _check_masks(images: Sequence[Image.Image], masks: Sequence[Image.Image], num_prompts: int) -> None:
    """Raises ValueError unless there is one image per prompt, and a mask of its size."""
    image_sizes = [image.size for image in images]
    mask_sizes = [mask.size for mask in masks]
    if len(images) != num_prompts or image_sizes != mask_sizes:
        raise ValueError(
            "`image` and `mask_image` must hold one image and one mask of its size per prompt, got images of "
            f"{image_sizes} and masks of {mask_sizes} (width, height) for {num_prompts} prompts."
        )


def _check_prompts(prompts: Sequence[Any]) -> None:
    """Raises ValueError unless there is at least one prompt, and each is a text or None.

    An empty text is allowed. Any other text must have a word or a symbol, and not just spaces, for example.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one caption, or None for an image without one, got none.")
    for prompt in prompts:
        if prompt is None:
            continue
        if not isinstance(prompt, str):
            raise ValueError(f"`prompts` must hold texts, or None for an image without one, got {prompt!r:.80}.")
        is_empty = prompt == ""
        if not is_empty and not has_words(prompt):
            raise ValueError(f"a prompt must have a word or a symbol, got {prompt!r:.80}. Say what to draw.")


def _crop_to_aspect_ratio(grey: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Crops the middle of a mask `(height, width)` to the aspect ratio of a grid, as `ImageOps.fit` crops the image.

    Pixels that the crop covers in part are kept.
    """
    height, width = grey.shape
    rows, columns = grid
    cropped_height = min(height, width * rows / columns)
    cropped_width = min(width, height * columns / rows)
    top = (height - cropped_height) / 2
    left = (width - cropped_width) / 2
    bottom = top + cropped_height
    right = left + cropped_width
    return grey[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]


def _as_list(images: Image.Image | Sequence[Image.Image] | None) -> list[Image.Image]:
    """Images in a list, which is empty for None."""
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    return list(images)


def _is_one_image(images: Any) -> bool:
    """Whether the argument `images` holds a single image: a Pillow image, a path, or an array or tensor of pixels."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return True
    return getattr(images, "ndim", None) in PIXEL_DIMENSIONS
