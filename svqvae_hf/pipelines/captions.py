"""Tokens and features of captions, for generators that read them."""

import re
import reprlib
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORD = re.compile(r"[\w'’]+")


def unknown_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """Words of captions that a tokenizer of whole words lacks; other tokenizers lack none."""
    words = dict.fromkeys(word for caption in captions for word in WORD.findall(caption))
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]


def keep_known_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """Leaves out the words that a tokenizer of whole words lacks, with one warning.

    Raises:
        ValueError: If it knows no word of a caption.
    """
    unknown = unknown_words(tokenizer, captions)
    if not unknown:
        return list(captions)
    kept = [WORD.sub(lambda word: "" if word[0] in unknown else word[0], caption) for caption in captions]
    for caption, rest in zip(captions, kept, strict=True):
        if WORD.search(caption) and not WORD.search(rest):
            known = ", ".join(sorted(word for word in tokenizer.get_vocab() if word.isalnum()))
            raise ValueError(f"a prompt must have a word that the model knows, got {caption!r}. It knows {known}.")
    warnings.warn(say_unknown(unknown), stacklevel=3)
    return kept


def say_unknown(words: Sequence[str]) -> str:
    """Sentence about words that a model does not know."""
    return f"unknown to the model and left out: {', '.join(words)}"


def pad_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> torch.Tensor:
    """Tokens of captions, padded at their end, `(batch, length)`; padding alone for an empty one.

    Words that the tokenizer lacks are left out, with a warning.

    Raises:
        ValueError: A caption has no known word, or more tokens than `length`.
    """
    captions = keep_known_words(tokenizer, captions)
    batch = tokenizer(list(captions), padding="max_length", padding_side="right", max_length=length).input_ids
    _check_length(captions, batch, length)
    absent = [tokenizer.pad_token_id] * length  # as in training, without special tokens
    return torch.tensor([ids if text else absent for ids, text in zip(batch, captions, strict=True)])


def _check_length(captions: Sequence[str], batch: list[list[int]], length: int) -> None:
    longest = max(batch, key=len)
    if len(longest) > length:
        text = reprlib.repr(captions[batch.index(longest)])
        raise ValueError(f"A caption must have at most {length} tokens, but {text} has {len(longest)}. Shorten it.")


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
        ValueError: A caption has more tokens than positions.
    """
    batch = tokenizer(list(captions), padding="max_length", max_length=length, truncation=truncate)
    _check_length(captions, batch["input_ids"], length)
    device = text_encoder.device if device is None else device
    ids, mask = (torch.tensor(batch[name], device=device) for name in ("input_ids", "attention_mask"))
    features = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    pairs = zip(features, mask.sum(1).tolist(), strict=True)
    return torch.stack([each.roll(length - tokens, dims=0) for each, tokens in pairs]), mask.flip(1)
