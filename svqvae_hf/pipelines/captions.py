"""Tokens and features of captions, for generators that read them."""

import re
import reprlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_words(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> None:
    """Raises ValueError if a tokenizer of whole words lacks a word of captions."""
    words = dict.fromkeys(word for caption in captions for word in re.findall(r"\w+", caption))
    unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word).input_ids]
    if unknown:
        known = sorted(word for word in tokenizer.get_vocab() if word.isalnum())
        raise ValueError(
            f"a prompt must consist of words that the model knows, but has {', '.join(unknown)}. It knows "
            f"{', '.join(known)}."
        )


def pad_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> torch.Tensor:
    """Tokens of captions, padded at their end, `(batch, length)`.

    Raises:
        ValueError: A caption has a word that the tokenizer lacks, or more tokens than `length`.
    """
    check_words(tokenizer, captions)
    batch = tokenizer(list(captions), padding="max_length", padding_side="right", max_length=length).input_ids
    _check_length(captions, batch, length)
    return torch.tensor(batch)


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
