"""Features of the captions of a token set: computed at each step, or once and kept in a folder."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from svqvae_hf.pipelines.captions import encode_captions
from svqvae_hf.trainer.data.token_sequences import TokenBatch, TokenSource

STORED_BATCH = 32  # captions that are encoded at a time to be kept
FEATURES, TOKEN_ENDS, ROW_ENDS = "features.bin", "token_ends.npy", "row_ends.npy"


class CaptionEncoder:
    """Encodes captions to the arguments of a language model. Longer ones are cut, as in LlamaGen's training.

    Args:
        text_encoder ([`~transformers.T5EncoderModel`]): Text encoder, in bfloat16.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        length (`int`): `num_condition_tokens` of the language model.
    """

    def __init__(self, text_encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, length: int):
        self.text_encoder = text_encoder.requires_grad_(False)
        self.tokenizer = tokenizer
        self.length = length

    def encode(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encodes captions to `prompt_embeds` and `prompt_attention_mask`."""
        features, mask = encode_captions(self.text_encoder, self.tokenizer, captions, self.length, truncate=True)
        return {"prompt_embeds": features, "prompt_attention_mask": mask}

    def draw(self, batch: TokenBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Encodes one random caption of each row of a batch."""
        return self.encode([captions[_draw(len(captions), generator)] for captions in batch.captions or []])


class StoredCaptions:
    """Features of all captions of a token set, mapped from files: bfloat16, only those of text.

    Args:
        folder (`Path`): Folder that [`store_captions`] wrote.
        source ([`TokenSource`]): The token set.
        encoder ([`CaptionEncoder`]): Encoder that made the features.

    Raises:
        ValueError: If the features are of another set or of another encoder.
    """

    def __init__(self, folder: Path, source: TokenSource, encoder: CaptionEncoder):
        self.length = encoder.length
        self.row_ends, self.token_ends = (np.load(folder / name, mmap_mode="r") for name in (ROW_ENDS, TOKEN_ENDS))
        self.features: np.ndarray = np.memmap(folder / FEATURES, dtype=np.int16, mode="r")
        first = encoder.encode(source.first_captions(1))
        expected = first["prompt_embeds"][first["prompt_attention_mask"].bool()].cpu()
        if len(self.row_ends) == source.num_rows and len(self.features) == self.token_ends[-1] * expected.shape[1]:
            self.features = self.features.reshape(-1, expected.shape[1])
            stored = self._features_of(0)
            fits = stored.shape == expected.shape and torch.allclose(stored.float(), expected.float(), atol=0.1)
        else:
            fits = False
        if not fits:
            raise ValueError(
                f"`--caption_features` must hold features of this token set by this text encoder, but `{folder}` does "
                "not. Delete it, or name a new folder."
            )

    def draw(self, batch: TokenBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Features of one random caption of each row of a batch."""
        counts = [self.row_ends[row] - _start(self.row_ends, row) for row in batch.rows]
        return self._get(batch.rows, [_draw(int(count), generator) for count in counts])

    def _get(self, rows: Iterable[int], numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        features = torch.zeros(len(numbers), self.length, self.features.shape[1], dtype=torch.bfloat16)
        mask = torch.zeros(len(numbers), self.length, dtype=torch.int64)
        for index, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            text = self._features_of(_start(self.row_ends, row) + number)
            features[index, self.length - len(text) :] = text
            mask[index, self.length - len(text) :] = 1
        return {"prompt_embeds": features, "prompt_attention_mask": mask}

    def _features_of(self, caption: int) -> torch.Tensor:
        """Features of the text of a caption `(tokens, channels)`."""
        tokens = self.features[_start(self.token_ends, caption) : self.token_ends[caption]]
        return torch.from_numpy(tokens.copy()).view(torch.bfloat16)


def store_captions(folder: Path, source: TokenSource, encoder: CaptionEncoder) -> None:
    """Encodes all captions of a token set, and keeps their features in a folder, which is complete or absent.

    Args:
        folder (`Path`): Folder to make.
        source ([`TokenSource`]): The token set.
        encoder ([`CaptionEncoder`]): Encoder.

    Raises:
        OSError: If it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    row_ends: list[int] = []
    token_ends: list[int] = []
    with open(partial / FEATURES, "wb") as file:
        for group in source.groups:
            rows = source.captions(source.read(group, source.caption_columns))
            row_ends += (np.cumsum([len(each) for each in rows]) + _last(row_ends)).tolist()
            captions = [caption for each in rows for caption in each]
            for start in range(0, len(captions), STORED_BATCH):
                encoded = encoder.encode(captions[start : start + STORED_BATCH])
                is_text = encoded["prompt_attention_mask"].bool()
                file.write(encoded["prompt_embeds"].bfloat16()[is_text].view(torch.int16).cpu().numpy().tobytes())
                token_ends += (is_text.sum(1).cumsum(0).cpu().numpy() + _last(token_ends)).tolist()
    np.save(partial / ROW_ENDS, np.array(row_ends))
    np.save(partial / TOKEN_ENDS, np.array(token_ends))
    os.replace(partial, folder)


def _last(ends: Sequence[int]) -> int:
    return ends[-1] if ends else 0


def _start(ends: np.ndarray, index: int) -> int:
    return int(ends[index - 1]) if index else 0


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
