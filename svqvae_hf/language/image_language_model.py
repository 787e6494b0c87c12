"""Images of captions and captions of images, by a language model with image tokens."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, BatchFeature, LogitsProcessor, PreTrainedConfig, PreTrainedModel

from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.language.grammar import ImageGrammar
from svqvae_hf.language.image_vocabulary import CONFIG_KEY, ImageVocabulary
from svqvae_hf.language.processing_svqvae import SVQVAEProcessor
from svqvae_hf.pipelines.sampling import Generators, draw, make_warpers


class ImageLanguageModel:
    """A language model with image tokens, and its processor. It asks as `training/train_image_text.py` does.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Language model.
        processor ([`SVQVAEProcessor`]): Its processor.

    Example:
        >>> pipe = ImageLanguageModel.from_pretrained("lm-with-images")
        >>> images = pipe.draw(["a pear above a sailboat"], guidance_scale=3.0)
        >>> captions = pipe.caption(images)
    """

    def __init__(self, language_model: PreTrainedModel, processor: SVQVAEProcessor):
        self.language_model = language_model.eval()
        self.processor = processor
        self.grammar = ImageGrammar(language_model.config)
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @staticmethod
    def is_at(source: str | os.PathLike) -> bool:
        """Whether a folder or Hub id holds a language model with image tokens."""
        try:
            config, _ = from_hub(PreTrainedConfig.get_config_dict, source)
        except OSError:
            return False
        return CONFIG_KEY in config

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> "ImageLanguageModel":
        """Loads both from a folder or Hub id, with options of transformers' method for the language model."""
        ImageVocabulary.from_config(from_hub(PreTrainedConfig.get_config_dict, source)[0])
        language_model = from_hub(AutoModelForCausalLM.from_pretrained, source, **options)
        return cls(language_model, from_hub(SVQVAEProcessor.from_pretrained, source))

    def to(self, device: torch.device | str) -> "ImageLanguageModel":
        """Moves the language model and the image tokenizer."""
        self.language_model.to(device)
        self.processor.vqvae.to(device)
        return self

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str | None],
        grid: tuple[int, int] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
    ) -> list[Image.Image]:
        """Draws one image per caption.

        Args:
            prompts (`Sequence[str]`): Captions; None for an image without one.
            grid (`tuple[int, int]`, *optional*): Rows and columns of codes, by default the first of the model.
            guidance_scale (`float`, defaults to 1.0): Scale of classifier-free guidance.
            temperature (`float`, defaults to 1.0): Sampling temperature; 0 takes the most likely codes.
            top_k (`int`, defaults to 0): Number of most likely codes to sample from; 0 means all.
            top_p (`float`, defaults to 1.0): Total probability of the most likely codes to sample from.
            generator (`torch.Generator` or a list of them, *optional*): One for all images or one per image.

        Raises:
            ValueError: If the model does not know the grid.
        """
        grid = grid or self.processor.vocabulary.grids[0]
        start = self.processor.begin_image(grid)
        no_condition = self.processor.no_condition
        inputs = self._ask([no_condition if prompt is None else prompt for prompt in prompts], start)
        warpers = [] if temperature == 0 else [*make_warpers(temperature, top_k, top_p), _Draw(generator)]
        tokens = self.language_model.generate(
            **inputs,
            max_new_tokens=grid[0] * grid[1] + 1,
            do_sample=False,  # drawn by the last processor, from a generator per image
            guidance_scale=guidance_scale,
            negative_prompt_ids=self._ask([no_condition] * len(prompts), start)["input_ids"],
            logits_processor=[self.grammar, *warpers],
        )
        images = self.processor.post_process_multimodal_output(tokens, generation_mode="image")
        return [each[-1] for each in images]

    @torch.inference_mode()
    def caption(self, images: Sequence[Any], prompt: str = "", max_new_tokens: int = 64) -> list[str]:
        """Describes each image by the most likely text.

        Args:
            images (`Sequence`): Images as [`SVQVAEProcessor`] takes them.
            prompt (`str`, defaults to `""`): Text after each image.
            max_new_tokens (`int`, defaults to 64): Largest number of tokens of a text.
        """
        inputs = self._ask([self.processor.image_token + prompt] * len(images), images=[[image] for image in images])
        tokens = self.language_model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            suppress_tokens=[self.processor.vocabulary.begin],
            logits_processor=[self.grammar],
        )
        texts = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(texts, skip_special_tokens=True)]

    def _ask(self, questions: list[str], start: str = "", images: Any = None) -> BatchFeature:
        """Prompts of a batch, padded on the left, up to the start of the answer."""
        conversations = [[{"role": "user", "content": question}] for question in questions]
        prompts = self.processor.apply_chat_template(conversations, add_generation_prompt=True)
        text = [prompt + start for prompt in prompts]
        inputs = self.processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return BatchFeature({name: inputs[name] for name in names}).to(self.language_model.device)


class _Draw(LogitsProcessor):
    """Draws a token, and bars all others."""

    def __init__(self, generator: Generators):
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = draw(scores.float(), self.generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)
