"""Tokens and features of captions, for generators that read them."""

import reprlib
import unicodedata
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORD_CATEGORIES = ("L", "N", "S")  # starts of the Unicode categories of letters, numbers and symbols such as emoji


def has_words(caption: str) -> bool:
    """Whether a caption has a word or a symbol, and not punctuation alone."""
    return any(unicodedata.category(character).startswith(WORD_CATEGORIES) for character in caption)


def pad_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> torch.Tensor:
    """Tokens of captions, padded at their end, `(batch, length)`; padding alone for an empty one.

    Raises:
        ValueError: There is no caption, or a caption is not a text or has more tokens than `length`.
    """
    check_captions(captions)
    batch = tokenizer(list(captions), padding="max_length", padding_side="right", max_length=length).input_ids
    _check_length(captions, batch, length)
    only_padding = [tokenizer.pad_token_id] * length  # without special tokens, as in training
    rows = []
    for caption, tokens in zip(captions, batch, strict=True):
        rows.append(tokens if caption else only_padding)
    return torch.tensor(rows)


def check_captions(captions: Sequence[str]) -> None:
    """Raises unless there is at least one caption, and each is a text."""
    if not captions:
        raise ValueError("`prompt` must hold at least one caption, got none.")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"`prompt` must be a text or a list of texts, got {caption!r:.80} among them.")


def _check_length(captions: Sequence[str], batch: Sequence[list[int]], length: int) -> None:
    """Raises if a caption has more tokens than `length`."""
    for caption, tokens in zip(captions, batch, strict=True):
        if len(tokens) > length:
            raise ValueError(
                f"A caption must have at most {length} tokens, but {reprlib.repr(caption)} has {len(tokens)}. "
                "Shorten it."
            )


@torch.no_grad()
def encode_captions(
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    length: int,
    *,
    device: torch.device | None = None,
    truncate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes captions as LlamaGen does, with their text at the end.

    Args:
        text_encoder ([`~transformers.T5EncoderModel`]): Text encoder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        captions (`Sequence[str]`): Captions.
        length (`int`): Number of positions.
        device (`torch.device`, *optional*): Device on which the encoder computes, by default the one that holds it.
        truncate (`bool`, defaults to `False`): Cut longer captions to `length` tokens, instead of raising an error.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Features `(batch, length, channels)` with zeros before the text, and their
        mask `(batch, length)`, on this device.

    Raises:
        ValueError: There is no caption, or a caption is not a text or has more tokens than positions.
    """
    check_captions(captions)
    batch = tokenizer(list(captions), padding="max_length", max_length=length, truncation=truncate)
    _check_length(captions, batch["input_ids"], length)
    if device is None:
        device = text_encoder.device
    ids = torch.tensor(batch["input_ids"], device=device)  # (batch, length), the text first
    mask = torch.tensor(batch["attention_mask"], device=device)
    features = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, length, channels)
    features = features * mask[..., None]  # zeros for padding
    # Moves the text from the start of each row to its end.
    features_at_end = []
    tokens_per_caption = mask.sum(1).tolist()
    for features_of_caption, num_tokens in zip(features, tokens_per_caption, strict=True):
        num_zeros = length - num_tokens
        features_at_end.append(features_of_caption.roll(num_zeros, dims=0))
    return torch.stack(features_at_end), mask.flip(1)
