"""Draws images from captions and writes captions of images, with a language model that has image tokens."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, PreTrainedModel

from .captions import keep_known_words
from .id_sampler import IdSampler
from .sampling import Generators, check_generators, check_sampling, guide, sample

ANSWER = "<|answer|>"  # stands for one in a template


class ImageLanguageModel:
    """A language model with image tokens, and its processor. Its prompts are as in `training/train_language_model.py`.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Language model.
        processor ([`SVQVAEProcessor`]): Its processor.
    """

    def __init__(self, language_model: PreTrainedModel, processor: Any):
        self.language_model = language_model.eval()
        self.processor = processor
        self.tokenizer, self.vqvae = processor.tokenizer, processor.vqvae
        self.image_processor = processor.image_processor
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def sampling(self) -> dict[str, Any]:
        """Guidance scale, temperature, top k and top p of images, by default 1, 1, 0 and 1.

        `generation_kwargs` in `generation_config.json` may have others, as in Janus. They do not change texts.
        """
        own = getattr(self.language_model.generation_config, "generation_kwargs", None) or {}
        defaults = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return {name: own.get(name, default) for name, default in defaults.items()}

    def to(self, device: torch.device | str) -> Self:
        """Moves the language model and the image tokenizer."""
        self.language_model.to(device)
        self.vqvae.to(device)
        return self

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
        image: Sequence[Image.Image] | None = None,
        mask_image: Sequence[Image.Image] | None = None,
        callback_on_step_end: Callable[..., object] | None = None,
    ) -> list[Image.Image]:
        """Draws one image per caption, or edits images.

        Args:
            prompts (`str` or `Sequence[str]`): A caption, or one per image; None for an image without one. Words that
                a tokenizer of whole words lacks are left out, with a warning.
            grid (`tuple[int, int]`, *optional*): Rows and columns of codes, by default the first of the model.
            guidance_scale (`float`, *optional*): Scale of classifier-free guidance. The defaults of this and of the
                next three arguments are in `sampling`.
            temperature (`float`, *optional*): Sampling temperature; 0 takes the most likely codes.
            top_k (`int`, *optional*): Number of most likely codes to sample from; 0 means all.
            top_p (`float`, *optional*): Total probability of the most likely codes to sample from.
            generator (`torch.Generator` or a list of them, *optional*): One for all images or one per image.
            image (`Sequence[PIL.Image.Image]`, *optional*): Images to edit, one per caption.
            mask_image (`Sequence[PIL.Image.Image]`, *optional*): Their masks, of the same sizes. A code is drawn if
                its part of the mask has any white, and kept otherwise.
            callback_on_step_end (`Callable`, *optional*): Called after each row of codes with the model, the number of
                the row, the grid, and `{"ids": ...}`, the ids of the rows so far, `(batch, rows, columns)`.

        Raises:
            ValueError: If an argument of sampling is out of its range, the model does not know the grid, there are
                no captions or not as many images, masks or generators, or the tokenizer knows no word of a caption.
        """
        texts = [prompts] if prompts is None or isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("`prompts` must hold at least one caption, or None for an image without one, got none.")
        asked = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = self.sampling | {name: value for name, value in asked.items() if value is not None}
        check_sampling(**sampling)
        check_generators(generator, len(texts))
        vocabulary, no_condition = self.processor.vocabulary, self.processor.no_condition
        grid = grid or vocabulary.grids[0]
        known = iter(keep_known_words(self.tokenizer, [text for text in texts if text is not None]))
        questions = [no_condition if text is None else next(known) for text in texts]
        scale = sampling.pop("guidance_scale")
        if all(text is None for text in texts):
            scale = 1  # no caption guides them
        if scale != 1:
            questions += [no_condition] * len(texts)
        edits = image is not None or mask_image is not None
        sampler = IdSampler(
            self.language_model,
            self._ask(questions, self.processor.begin_image(grid)),
            grid,
            range(vocabulary.first_token, vocabulary.begin),
            partial(sample, **sampling, generator=generator),
            guide=None if scale == 1 else partial(guide, guidance_scale=scale),
            known=self._known(image or [], mask_image or [], grid, len(texts)) if edits else None,
        )
        for row in range(grid[0]):
            ids = sampler.next_row()
            if callback_on_step_end is not None:
                callback_on_step_end(self, row, grid, {"ids": ids.clone()})
        return self.processor.decode_images([*sampler.ids])

    @torch.inference_mode()
    def caption(self, images: Sequence[Any], prompt: str = "", max_new_tokens: int = 64) -> list[str]:
        """Captions each image by greedy decoding.

        Args:
            images (`Sequence`): Images as [`SVQVAEProcessor`] takes them, or one of them.
            prompt (`str`, defaults to `""`): Text after each image.
            max_new_tokens (`int`, defaults to 64): Largest number of tokens of a text.
        """
        if isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) in (2, 3):
            images = [images]
        inputs = self._ask([self.processor.image_token + prompt] * len(images), images=[[image] for image in images])
        stop = self.language_model.config.get_text_config().vocab_size
        image_tokens = [*range(self.processor.vocabulary.first_token, stop)]
        tokens = self.language_model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=image_tokens
        )
        texts = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(texts, skip_special_tokens=True)]

    def _known(
        self, images: Sequence[Image.Image], masks: Sequence[Image.Image], grid: tuple[int, int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of images, and whether each is kept because its part of the mask is black, `(batch, rows, columns)`."""
        upright = [[ImageOps.exif_transpose(each) for each in listed] for listed in (images, masks)]
        sizes, mask_sizes = ([each.size for each in listed] for listed in upright)
        if len(images) != count or sizes != mask_sizes:
            raise ValueError(
                "`image` and `mask_image` must hold one image and one mask of its size per prompt, got images of "
                f"{sizes} and masks of {mask_sizes} (width, height) for {count} prompts."
            )
        (rows, columns), f = grid, self.vqvae.f
        white = [mask.convert("L").point(lambda value: 255 * (value > 127)) for mask in upright[1]]  # no noise
        fitted = [np.asarray(ImageOps.fit(mask, (columns * f, rows * f), Image.Resampling.BOX)) for mask in white]
        parts = torch.from_numpy(np.stack(fitted)).view(count, rows, f, columns, f)
        ids, kept = torch.stack(self.processor.encode_images(images, grid)), parts.amax((2, 4)) == 0
        return ids.to(self.language_model.device), kept.to(self.language_model.device)

    def _ask(self, questions: list[str], start: str = "", images: Any = None) -> BatchFeature:
        """Prompts of a batch, padded on the left, up to the start of the answer."""
        answer = {"role": "assistant", "content": ANSWER}  # before which templates may write more than for none
        conversations = [[{"role": "user", "content": question}, answer] for question in questions]
        prompts = self.processor.apply_chat_template(conversations)
        text = [(prompt.rpartition(ANSWER)[0] + start).rstrip(" ") for prompt in prompts]  # a space joins a word
        inputs = self.processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return BatchFeature({name: inputs[name] for name in names}).to(self.language_model.device)
