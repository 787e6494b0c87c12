"""The pipeline `any-to-any` of transformers for language models with image tokens. Repositories with code hold it."""

from typing import Any

from transformers import AnyToAnyPipeline
from transformers.image_utils import make_flat_list_of_images

from .image_chats import ImageChats


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
            **kwargs: Arguments of [`~svqvae_hf.pipelines.image_chats.ImageChats.draw`], such as `temperature`, or of
                transformers' pipeline.

        Returns:
            `list[dict]`: With `"image"`, dictionaries with `input_text` and `generated_image`.
        """
        if generation_mode != "image":
            return super().__call__(text=text, images=images, generation_mode=generation_mode, **kwargs)
        inputs = _as_batch(text)
        captions = [caption_of(chat) for chat in inputs]
        if images is not None:
            kwargs["image"] = make_flat_list_of_images(images)
        if kwargs.get("mask_image") is not None:
            kwargs["mask_image"] = make_flat_list_of_images(kwargs["mask_image"])
        drawings = ImageChats(self.model, self.processor).draw(captions, **kwargs)
        results = []
        for chat, image in zip(inputs, drawings, strict=True):
            results.append({"input_text": chat, "generated_image": image})
        return results


def _as_batch(text: Any) -> list[Any]:
    """Captions or chats as a list of them. One chat is a list of messages."""
    if isinstance(text, str):
        return [text]
    if not isinstance(text, list | tuple) or not text:
        raise ValueError(f"`text` must be a caption, a chat, or a list of either that is not empty, got {text!r:.80}.")
    is_one_chat = isinstance(text[0], dict)  # its first message
    if is_one_chat:
        return [text]
    return list(text)


def caption_of(text: Any) -> str:
    """Caption of the image to draw: a text itself, or the text of the last message of a chat."""
    if isinstance(text, str):
        return text
    if not isinstance(text, list | tuple) or not text:
        raise ValueError(f"a caption must be a text or a chat, got {text!r:.80}.")
    last_message = text[-1]
    content = last_message["content"]
    if isinstance(content, str):
        return content
    caption = ""
    for part in content:
        if "text" not in part:
            raise ValueError(
                "a chat that asks for an image must hold text alone. To edit an image, pass it as `images`."
            )
        caption += part["text"]
    return caption
