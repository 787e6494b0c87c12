"""Tokens and features of captions, for generators that read them."""

import re
import reprlib
import unicodedata
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Kinds of the parts of a caption
WORD = "word"
SYMBOL = "symbol"
SEPARATOR = "separator"
WORD_CHARACTER = re.compile(r"[\w'’]")
SYMBOL_CATEGORIES = "S"  # start of the Unicode categories of symbols, such as emoji
JOINING = ("Cf", "Me", "Mn")  # Unicode categories of characters that belong to the one before, as in emoji


def split_caption(caption: str) -> list[tuple[str, str]]:
    """Splits a caption into words, symbols such as emoji, and what is between them.

    Returns:
        `list[tuple[str, str]]`: Kind and text of each part. The texts together are the caption.
    """
    parts: list[tuple[str, str]] = []
    kind_of_part = SEPARATOR
    text_of_part = ""
    for character in caption:
        kind = _kind(character, kind_of_part)
        if kind == kind_of_part:
            text_of_part += character
            continue
        if text_of_part:
            parts.append((kind_of_part, text_of_part))
        kind_of_part = kind
        text_of_part = character
    if text_of_part:
        parts.append((kind_of_part, text_of_part))
    return parts


def has_words(caption: str) -> bool:
    """Whether a caption has a word or a symbol, and not punctuation alone."""
    return any(kind != SEPARATOR for kind, _ in split_caption(caption))


def _kind(character: str, last_kind: str) -> str:
    """Kind of the part that a character belongs to, after a part of kind `last_kind`."""
    category = unicodedata.category(character)
    if WORD_CHARACTER.match(character):
        return WORD
    if category in JOINING:
        return last_kind
    if category.startswith(SYMBOL_CATEGORIES):
        return SYMBOL
    return SEPARATOR


def unknown_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """Words and symbols of captions that a tokenizer of whole words lacks; other tokenizers lack none."""
    kinds = {}  # of the words and symbols, in their order and without duplicates
    for caption in captions:
        for kind, text in split_caption(caption):
            if kind != SEPARATOR:
                kinds[text] = kind
    unknown = []
    for text, kind in kinds.items():
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        is_ignored_symbol = kind == SYMBOL and not tokens
        if is_ignored_symbol or tokenizer.unk_token_id in tokens:
            unknown.append(text)
    return unknown


def keep_known_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """Leaves out the words and symbols that a tokenizer of whole words lacks, with one warning.

    Raises:
        ValueError: If it knows no word of a caption.
    """
    unknown = unknown_words(tokenizer, captions)
    if not unknown:
        return list(captions)
    shortened_captions = []
    for caption in captions:
        _check_has_known_word(tokenizer, caption, unknown)
        shortened_captions.append(_leave_out(caption, unknown))
    warnings.warn(say_unknown(unknown), stacklevel=3)
    return shortened_captions


def _check_has_known_word(tokenizer: PreTrainedTokenizerBase, caption: str, unknown: Sequence[str]) -> None:
    """Raises ValueError if a caption has words, but all of them are among the unknown ones."""
    words = []  # and symbols
    for kind, text in split_caption(caption):
        if kind != SEPARATOR:
            words.append(text)
    if words and all(word in unknown for word in words):
        known_words = [word for word in tokenizer.get_vocab() if word.isalnum()]
        listed = ", ".join(sorted(known_words))
        raise ValueError(f"a prompt must have a word that the model knows, got {caption!r}. It knows {listed}.")


def _leave_out(caption: str, unknown: Sequence[str]) -> str:
    """A caption without unknown words and symbols."""
    shortened = ""
    for _, text in split_caption(caption):
        if text not in unknown:
            shortened += text
    return shortened


def say_unknown(words: Sequence[str]) -> str:
    """Sentence about words that a model does not know."""
    return f"unknown to the model and left out: {', '.join(words)}"


def pad_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> torch.Tensor:
    """Tokens of captions, padded at their end, `(batch, length)`; padding alone for an empty one.

    Words that the tokenizer lacks are left out, with a warning.

    Raises:
        ValueError: There is no caption, or a caption is not a text, has no known word, or more tokens than `length`.
    """
    check_captions(captions)
    captions = keep_known_words(tokenizer, captions)
    batch = tokenizer(captions, padding="max_length", padding_side="right", max_length=length).input_ids
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
