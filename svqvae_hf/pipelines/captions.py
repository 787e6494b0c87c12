"""Tokens and features of captions, for generators that read them."""

import re
import reprlib
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.tokens.image_tokens import execution_device


def load_text_encoder(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a text encoder in bfloat16, as LlamaGen does, and its tokenizer.

    Args:
        source (`str`): Folder or Hub id of a T5 encoder, such as `google/flan-t5-xl`.

    Raises:
        OSError: It does not exist or cannot be downloaded.
        ValueError: It is not a T5 encoder.
    """
    encoder, info = from_hub(
        transformers.T5EncoderModel.from_pretrained,  # here, because other generators need not import it
        source,
        dtype=torch.bfloat16,
        use_safetensors=True,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise ValueError(f"`text_encoder` must be a T5 encoder, but `{source}` lacks {min(info['missing_keys'])}.")
    return encoder.eval(), from_hub(AutoTokenizer.from_pretrained, source)


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
    truncate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes captions as LlamaGen does, with their text at the end.

    Args:
        text_encoder ([`~transformers.T5EncoderModel`]): Text encoder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        captions (`Sequence[str]`): Captions.
        length (`int`): Number of positions.
        truncate (`bool`, defaults to `False`): Cut longer captions to `length` tokens, instead of raising an error.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Features `(batch, length, channels)` with zeros before the text, and their
        mask `(batch, length)`, on the device of the encoder.

    Raises:
        ValueError: A caption has more tokens than positions.
    """
    batch = tokenizer(list(captions), padding="max_length", max_length=length, truncation=truncate)
    _check_length(captions, batch["input_ids"], length)
    device = execution_device(text_encoder)
    ids, mask = (torch.tensor(batch[name], device=device) for name in ("input_ids", "attention_mask"))
    features = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    pairs = zip(features, mask.sum(1).tolist(), strict=True)
    return torch.stack([each.roll(length - tokens, dims=0) for each, tokens in pairs]), mask.flip(1)
