"""The pipeline `any-to-any` of transformers for language models with image tokens. Repositories with code hold it."""

from typing import Any

from transformers import AnyToAnyPipeline
from transformers.image_utils import make_flat_list_of_images

from .drawing import ImageLanguageModel


class ImageLanguagePipeline(AnyToAnyPipeline):
    """Draws images of captions, and otherwise answers chats as transformers' pipeline does.

    Example:
        >>> pipe = pipeline("any-to-any", model="org/scenes", trust_remote_code=True)
        >>> image = pipe("a whale above a guitar on pink", generation_mode="image")[0]["generated_image"]
        >>> chat = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        >>> caption = pipe(chat, return_full_text=False)[0]["generated_text"]
    """

    def check_model_type(self, supported_models: Any) -> None:
        """Checks nothing: transformers lists classes with image tokens, and this model is any causal one."""

    def __call__(self, text: Any = None, images: Any = None, generation_mode: str | None = None, **kwargs: Any) -> Any:
        """Draws one image per caption with `generation_mode="image"`.

        Args:
            text (`str`, `list[str]` or chats): Captions, or chats whose last message is the caption.
            images (*optional*): Images, which `"image"` edits: one per caption, with a `mask_image` each.
            generation_mode (`str`, *optional*): `"image"`, or a mode of transformers' pipeline.
            **kwargs: Arguments of [`~svqvae_hf.pipelines.drawing.ImageLanguageModel.draw`], such as `temperature`, or
                of transformers' pipeline.

        Returns:
            `list[dict]`: With `"image"`, dictionaries with `input_text` and `generated_image`.
        """
        if generation_mode != "image":
            return super().__call__(text=text, images=images, generation_mode=generation_mode, **kwargs)
        inputs = [text] if isinstance(text, str) or isinstance(text[0], dict) else text
        given = {"image": images, "mask_image": kwargs.pop("mask_image", None)}
        edited = {name: make_flat_list_of_images(value) for name, value in given.items() if value is not None}
        drawn = ImageLanguageModel(self.model, self.processor).draw([*map(caption_of, inputs)], **edited, **kwargs)
        return [{"input_text": each, "generated_image": image} for each, image in zip(inputs, drawn, strict=True)]


def caption_of(text: Any) -> str:
    """Caption that a text is, or that the last message of a chat asks for."""
    content = text if isinstance(text, str) else text[-1]["content"]
    parts = [{"text": content}] if isinstance(content, str) else content
    if any("text" not in part for part in parts):
        raise ValueError("a chat that asks for an image must hold text alone. To edit an image, pass it as `images`.")
    return "".join(part["text"] for part in parts)
