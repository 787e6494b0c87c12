"""Examples of language models: rows of token sets as sequences with a class or a caption, or as chats, and texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from svqvae_hf.loaders.pretrained_models import SVQVAEProcessor
from svqvae_hf.models.checks import check_same_codebook
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.token_sets.shards import load_rows
from svqvae_hf.trainer.data.sample_order import DIGEST, check_same, digest_of, row_at
from svqvae_hf.trainer.data.token_sequences import TokenSource, check_captions

IGNORED = -100  # label that the loss skips


@dataclass(frozen=True)
class Mix:
    """How rows become examples.

    Args:
        condition_dropout (`float`): Fraction of images without their class or caption.
        caption_fraction (`float`): Fraction of chats that ask for the caption; the others ask for the image.
        first_caption_fraction (`float`): Fraction of images asked for by their first caption, not by any of them.
        text_fraction (`float`): Fraction of examples that are texts.
        completion_only_loss (`bool`): Learn only the answers of chats.
        seed (`int`): Seed of the order and of all draws.
    """

    condition_dropout: float = 0.0
    caption_fraction: float = 0.0
    first_caption_fraction: float = 1.0
    text_fraction: float = 0.0
    completion_only_loss: bool = True
    seed: int = 0


class LlamaGenExamples(Dataset):
    """Sequences of LlamaGen: a class or the token for captions, and the ids of an image.

    Each is a function of the seed and its number. In an epoch each row occurs once, in a new random order.

    Args:
        source ([`TokenSource`]): Token set.
        count (`int`): Number of examples.
        mix ([`Mix`]): Dropout of the condition, and seed.
    """

    def __init__(self, source: TokenSource, count: int, mix: Mix):
        self.source, self.count, self.mix = source, count, mix
        self.digest = digest_of([source.rows])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.mix.seed, index))
        source, row = self.source, row_at(index, len(self.source.rows), self.mix.seed)
        ids, label, captions = source.batch([row])
        if rng.random() < self.mix.condition_dropout:
            label[:] = source.num_classes  # drops its caption as well
        tokens = torch.cat([source.settings.codebook_size + label, ids[-1].flatten()])
        example = {"input_ids": tokens, "labels": torch.cat([torch.tensor([IGNORED]), tokens[1:]])}
        if captions is None:
            return example
        is_first = rng.random() < self.mix.first_caption_fraction
        return example | {"caption": captions[0][0 if is_first else rng.integers(len(captions[0]))]}


def check_rows(checkpoint: Path, digest: str) -> None:
    """Raises ValueError unless a checkpoint of transformers' `Trainer` was written with the rows of this digest."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    callback = state["stateful_callbacks"].get("CheckpointOnSignal", {})
    check_same(DIGEST, callback.get("attributes", {}).get("digest"), digest)


@dataclass
class ChatExamples(Dataset):
    """Chats that ask for an image or for its caption, and texts. Each is a function of the seed and its number.

    Args:
        processor ([`SVQVAEProcessor`]): Processor of the language model.
        context (`int`): Largest number of tokens.
        count (`int`, *optional*): Number of examples, by default one per row.
        mix ([`Mix`]): Fractions of all kinds of examples, and seed.
        token_set (`str`, *optional*): Token set of the images.
        caption_column (`str`): Its column of captions.
        texts (`Sequence[dict]`): From [`read_texts`].
    """

    processor: SVQVAEProcessor
    context: int
    count: int | None
    mix: Mix
    token_set: str | None
    caption_column: str
    texts: Sequence[dict[str, Any]] = ()

    def __post_init__(self) -> None:
        self.pairs: Any = []
        if self.token_set is not None:
            self.settings = read_settings(self.token_set)
            check_same_codebook(self.processor.vqvae, self.settings)
            self.pairs = load_rows(self.token_set)
            check_captions(self.pairs, self.caption_column)
        self.digest = digest_of([self.pairs, self.texts])

    def __len__(self) -> int:
        return len(self.pairs) if self.count is None else self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = np.random.default_rng((self.mix.seed, index))
        is_text = rng.random() < self.mix.text_fraction
        rows = self.texts if is_text else self.pairs
        row = rows[row_at(index, len(rows), self.mix.seed)]
        return self.text_example(row) if is_text else self.chat_example(self.conversation(row, rng))

    def text_example(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """A text with any number of images. All of its tokens are learned."""
        images = [self.processor.image_text(torch.tensor(ids)) for ids in row.get("images", [])]
        texts = row["text"].split(self.processor.image_token)
        text = "".join(part for pair in zip(texts, [*images, ""], strict=True) for part in pair)
        tokens = self.tokenize(text + (self.processor.tokenizer.eos_token or ""))[: self.context]
        return {"input_ids": tokens, "labels": tokens}

    def conversation(self, row: dict[str, Any], rng: np.random.Generator) -> list[dict[str, str]]:
        """Messages that ask for an image or for its first caption. An image is the text of its finest tokens."""
        image = self.processor.image_text(max(row_tokens(row, self.settings).ids, key=torch.numel))
        captions = row[self.caption_column]
        captions = [captions] if isinstance(captions, str) else captions
        is_first = rng.random() < self.mix.first_caption_fraction
        caption = captions[0 if is_first else rng.integers(len(captions))]
        turns = [image, captions[0]]
        if rng.random() >= self.mix.caption_fraction:
            turns = [caption if rng.random() >= self.mix.condition_dropout else self.processor.no_condition, image]
        roles = zip(("user", "assistant"), turns, strict=True)
        return [{"role": role, "content": content} for role, content in roles]

    def chat_example(self, conversation: list[dict[str, str]]) -> dict[str, list[int]]:
        """Tokens of a conversation. The answer is learned."""
        tokens = self.tokenize(self.processor.apply_chat_template(conversation))
        prompt = self.tokenize(self.processor.apply_chat_template(conversation[:1], add_generation_prompt=True))
        if len(tokens) > self.context:
            raise ValueError(f"an image with its caption must fit in {self.context} tokens, but takes {len(tokens)}.")
        same = [own == other for own, other in zip(tokens, prompt, strict=False)]
        asked = [*same, False].index(False) if self.mix.completion_only_loss else 0
        return {"input_ids": tokens, "labels": [IGNORED] * asked + tokens[asked:]}

    def tokenize(self, text: str) -> list[int]:
        """Tokens as the processor makes them, without a second begin of sequence."""
        bos = self.processor.tokenizer.bos_token
        return self.processor.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids


def read_texts(files: Sequence[str], processor: SVQVAEProcessor) -> list[dict[str, Any]]:
    """Reads and checks the objects of JSON Lines files.

    Args:
        files (`Sequence[str]`): Files. Each line has a `text` and, for each placeholder of an image in it,
            rows of ids in `images`.
        processor ([`SVQVAEProcessor`]): Processor of the language model.

    Raises:
        ValueError: If a line is something else.
    """
    texts = []
    for file in files:
        lines = [*enumerate(Path(file).read_text("utf-8").split("\n"), start=1)]
        for number, line in [each for each in lines if each[1].strip()] or lines[:1]:
            try:
                row = json.loads(line)
                images = [processor.vocabulary.encode(torch.tensor(ids)) for ids in row.get("images", [])]
                if (count := row["text"].count(processor.image_token)) != len(images):
                    raise ValueError(f"it has {count} {processor.image_token} for {len(images)} images")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reason = f" ({error})" if isinstance(error, ValueError) else ""
                message = f"line {number} of `{file}` must be a JSON object with a `text` and its `images`{reason}."
                raise ValueError(message) from error
            texts.append(row)
    return texts
