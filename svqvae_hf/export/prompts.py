"""Prompts of a language model that draws, split so that a page can put a caption into them."""

from dataclasses import dataclass
from typing import Any

from svqvae_hf.pipelines.image_chats import ANSWER, ImageChats

CAPTION = "<|caption|>"  # stands for a caption in a template


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a caption, up to the first code of the image.

    Args:
        before (`str`): Text before the caption.
        after (`str`): Text after it, before the answer.
        begin_image (`str`): Text between what the answer writes and the first code.
        add_special_tokens (`bool`): Whether the tokenizer adds special tokens, which the text itself does not have.
    """

    before: str
    after: str
    begin_image: str
    add_special_tokens: bool

    def tokens(self, tokenizer: Any, caption: str, written: str = "") -> list[int]:
        """Tokens of the prompt with a caption, and with what the model writes before the image."""
        text = self.before + caption + self.after + written + self.begin_image
        return tokenizer(text, add_special_tokens=self.add_special_tokens).input_ids

    def question_tokens(self, tokenizer: Any, caption: str) -> list[int]:
        """Tokens of the prompt with a caption, up to the answer."""
        text = self.before + caption + self.after
        return tokenizer(text, add_special_tokens=self.add_special_tokens).input_ids


def prompt_template(model: ImageChats, grid: tuple[int, int]) -> PromptTemplate:
    """Applies the chat template of a model to a caption, as [`ImageChats.draw`] does, and splits the result.

    Args:
        model ([`ImageChats`]): Language model and processor.
        grid (`tuple[int, int]`): Rows and columns of the image.
    """
    chat = [{"role": "user", "content": CAPTION}, {"role": "assistant", "content": ANSWER}]
    text = model.processor.apply_chat_template(chat)
    before_answer, _, _ = text.rpartition(ANSWER)
    before_caption, _, after_caption = before_answer.partition(CAPTION)
    bos = model.tokenizer.bos_token
    has_special_tokens = bool(bos) and before_caption.startswith(bos)
    return PromptTemplate(
        before=before_caption,
        after=after_caption,
        begin_image=model.processor.begin_image(grid),
        add_special_tokens=not has_special_tokens,
    )
