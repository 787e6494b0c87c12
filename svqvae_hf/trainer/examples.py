"""Examples of language models: rows of token sets as sequences with a class or a caption, or as chats, and texts."""

import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from svqvae_hf.loaders.pretrained_models import SVQVAEProcessor
from svqvae_hf.models.checks import check_same_codebook
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.trainer.data.sample_order import row_at
from svqvae_hf.trainer.data.token_sequences import TokenSource, check_captions

IGNORED = -100  # label that the loss skips
CAPTION_BATCH = 1000  # captions that are checked at a time
SIZES_AT_A_TIME = 100_000  # rows whose sizes are checked at a time
MARGIN = 16  # tokens by which a chat may be longer than the sum of its parts


@dataclass(frozen=True)
class Mix:
    """How rows become examples.

    Args:
        condition_dropout (`float`): Fraction of images without their class or caption.
        caption_fraction (`float`): Fraction of chats that ask for the caption; the others ask for the image.
        first_caption_fraction (`float`): Fraction of images asked for by their first caption, not by any of them.
        text_fraction (`float`): Fraction of examples that are texts.
        rewrite_fraction (`float`): Fraction of chats that rewrite captions into the first captions of their rows. If
            it is not 0, answers with an image begin with the first caption.
        seed (`int`): Seed of the order and of all draws.
    """

    condition_dropout: float = 0.0
    caption_fraction: float = 0.0
    first_caption_fraction: float = 1.0
    text_fraction: float = 0.0
    rewrite_fraction: float = 0.0
    seed: int = 0

    @property
    def rewrites(self) -> bool:
        """Whether answers with an image begin with the first caption."""
        return self.rewrite_fraction > 0

    def draw_caption(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        """Draws one of the captions of an image. The first one is drawn at least as often as the fraction says."""
        if rng.random() < self.first_caption_fraction:
            return captions[0]
        position = int(rng.integers(len(captions)))
        return captions[position]


class LlamaGenExamples(Dataset):
    """Sequences of LlamaGen: a class or the token for captions, and the ids of an image.

    Each is a function of the seed and its number. In an epoch each row occurs once, in a new random order.

    Args:
        source ([`TokenSource`]): Token set.
        count (`int`): Number of examples.
        mix ([`Mix`]): Dropout of the condition, and seed.
    """

    def __init__(self, source: TokenSource, count: int, mix: Mix):
        self.source = source
        self.count = count
        self.mix = mix

    def __len__(self) -> int:
        return self.count

    @property
    def rows_per_epoch(self) -> int:
        """Number of examples in which each row occurs once."""
        return len(self.source.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.mix.seed, index))
        source = self.source
        row = row_at(index, len(source.rows), self.mix.seed)
        batch = source.batch([row])  # of one image
        image_class = batch.labels  # (1,)
        is_dropped = rng.random() < self.mix.condition_dropout
        if is_dropped:
            # The class of images without a condition. If an image has it, the model also ignores the image's caption.
            image_class = torch.full_like(image_class, source.num_classes)
        condition_token = source.settings.codebook_size + image_class  # (1,)
        finest_ids = batch.ids[-1].flatten()
        tokens = torch.cat([condition_token, finest_ids])  # (1 + ids,)
        labels = tokens.clone()
        labels[0] = IGNORED
        example: dict[str, Any] = {"input_ids": tokens, "labels": labels}
        if batch.captions is not None:
            captions_of_image = batch.captions[0]
            example["caption"] = self.mix.draw_caption(captions_of_image, rng)
        return example


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
            self.pairs = TokenSet(self.token_set).load()
            self._check_grids()
            check_captions(self.pairs, self.caption_column)
            self.caption_rows = self.pairs.select_columns([self.caption_column])

    def _check_grids(self) -> None:
        """Raises ValueError unless the language model knows the grid of each image. The error names the row."""
        known_sizes = set()
        rows = self.pairs.select_columns(["key", "height", "width"]).with_format("pandas")
        for first_row in range(0, len(rows), SIZES_AT_A_TIME):  # in batches, because a set may be larger than memory
            batch = rows[first_row : first_row + SIZES_AT_A_TIME]
            one_row_per_size = batch.drop_duplicates(["height", "width"])
            for row in one_row_per_size.itertuples():
                size = (row.height, row.width)
                if size not in known_sizes:
                    self._check_grid(*size, name_of_row=f"row {first_row + row.Index} (`{row.key}`)")
                    known_sizes.add(size)

    def _check_grid(self, height: int, width: int, name_of_row: str) -> None:
        """Raises ValueError unless the language model knows the grid of an image with these sides in pixels."""
        finest_scale = max(self.settings.scales)
        grid = self.settings.grid(finest_scale, height, width)
        try:
            self.processor.vocabulary.size_token(grid)
        except ValueError as error:
            raise ValueError(f"`{self.token_set}`, {name_of_row}: {error}") from error

    def __len__(self) -> int:
        return len(self.pairs) if self.count is None else self.count

    @property
    def rows_per_epoch(self) -> int | None:
        """Number of examples in which each row occurs once; `None` if some examples are not about a row."""
        if self.mix.text_fraction > 0 or self.mix.rewrites:
            return None
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = np.random.default_rng((self.mix.seed, index))
        is_text = rng.random() < self.mix.text_fraction
        if is_text:
            text_number = row_at(index, len(self.texts), self.mix.seed)
            return self.text_example(self.texts[text_number])
        row_number = row_at(index, len(self.pairs), self.mix.seed)
        row = self.pairs[row_number]
        is_rewriting = self.mix.rewrites and rng.random() < self.mix.rewrite_fraction
        if is_rewriting:
            return self.rewriting_example(row, rng)
        return self.chat_example(self.conversation(row, rng))

    def text_example(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """A text with any number of images. All of its tokens are learned, but the first, which has none before it.

        A tokenizer that pads on the left would have it predicted from padding.
        """
        tokens = text_tokens(self.processor, row)
        labels = [IGNORED, *tokens[1:]]
        return {"input_ids": tokens, "labels": labels}

    def conversation(self, row: dict[str, Any], rng: np.random.Generator) -> list[dict[str, str]]:
        """Messages that ask for an image, or for its first caption.

        The user asks for the image by any caption or, if the condition is dropped, by none. The user asks for the
        caption by the image.
        """
        image = self.image_text(row)
        captions = self.captions_of(row)
        # Drawn before it is clear whether it is needed, so that the draws after it are the same in each case.
        caption_of_question = self.mix.draw_caption(captions, rng)
        asks_for_caption = rng.random() < self.mix.caption_fraction
        if asks_for_caption:
            return chat(question=image, answer=captions[0])
        is_dropped = rng.random() < self.mix.condition_dropout
        if is_dropped:
            return chat(question=self.processor.no_condition, answer=image)
        return chat(question=caption_of_question, answer=self.answer(row))

    def answer(self, row: dict[str, Any]) -> str:
        """What a model answers that is asked for the image of a row."""
        image = self.image_text(row)
        if self.mix.rewrites:
            return self.captions_of(row)[0] + image
        return image

    def rewriting_example(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, list[int]]:
        """A chat without images, which rewrites captions of random rows into the first captions of these rows.

        It has at least as many tokens as the image of `row` has codes, so that it is about as long as other chats.
        The ends of the answers are not learned. An answer of this chat ends after the caption. But when the user asks
        for an image, the answer must go on after the caption with the image.
        """
        num_codes_of_image = max(ids.numel() for ids in row_tokens(row, self.settings).ids)
        conversation: list[dict[str, str]] = []
        num_tokens = 0
        while num_tokens < num_codes_of_image:
            row_number = int(rng.integers(len(self.caption_rows)))
            captions = self.captions_of(self.caption_rows[row_number])
            question_and_answer = chat(question=self.mix.draw_caption(captions, rng), answer=captions[0])
            conversation += question_and_answer
            for message in question_and_answer:
                num_tokens += len(tokenize(self.processor, message["content"]))
        example = self.chat_example(conversation)
        end_of_answer = self.processor.tokenizer.eos_token_id
        labels = example["labels"]
        for position, label in enumerate(labels):
            if label == end_of_answer:
                labels[position] = IGNORED
        return example

    def image_text(self, row: dict[str, Any]) -> str:
        """Text of the finest tokens of an image."""
        finest = max(row_tokens(row, self.settings).ids, key=torch.numel)
        return self.processor.image_text(finest)

    def captions_of(self, row: dict[str, Any]) -> list[str]:
        """Captions of a row, at least one."""
        captions = row[self.caption_column]
        return [captions] if isinstance(captions, str) else captions

    def chat_example(self, conversation: list[dict[str, str]]) -> dict[str, list[int]]:
        """Tokens of a conversation. The answers are learned."""
        tokens = tokenize(self.processor, self.processor.apply_chat_template(conversation))
        if len(tokens) > self.context:
            raise ValueError(f"an image with its caption must fit in {self.context} tokens, but takes {len(tokens)}.")
        labels = [IGNORED] * len(tokens)
        for number in range(1, len(conversation), 2):  # every second message is an answer
            before_answer = self.processor.apply_chat_template(conversation[:number], add_generation_prompt=True)
            with_answer = self.processor.apply_chat_template(conversation[: number + 1])
            start = self._count_tokens_of_beginning(tokens, before_answer)
            stop = self._count_tokens_of_beginning(tokens, with_answer)
            labels[start:stop] = tokens[start:stop]
        return {"input_ids": tokens, "labels": labels}

    def _count_tokens_of_beginning(self, tokens_of_chat: Sequence[int], beginning: str) -> int:
        """Number of the first tokens of a chat that lie whole in the beginning of its text.

        A token of the chat may contain the last letters of the beginning and the letters after them. If the text of
        the chat is "a cat.", and the beginning is "a cat", then the tokens "a" and " cat." of the chat differ from the
        tokens "a" and " cat" of the beginning. Only the first token counts then.
        """
        tokens_of_beginning = tokenize(self.processor, beginning)
        return common_start(tokens_of_chat, tokens_of_beginning)

    def check_lengths(self) -> None:
        """Raises unless each caption fits the context together with its image.

        The length of each chat is estimated from the tokens of its caption. Only the chats that may be too long are
        made and checked exactly, because this takes longer.

        Raises:
            ValueError: A caption is too long. The error names its row.
        """
        num_rows = len(self.pairs)
        if num_rows == 0:
            return
        longest_that_fits = self.context - self._length_without_caption() - MARGIN
        for start in range(0, num_rows, CAPTION_BATCH):
            stop = min(start + CAPTION_BATCH, num_rows)
            for caption in self._count_caption_tokens(range(start, stop)):
                may_be_too_long = caption.num_tokens > longest_that_fits
                if may_be_too_long:
                    self._check_caption(caption.row_number, caption.text)

    def _length_without_caption(self) -> int:
        """About how many tokens a chat has besides its captions, with the largest image of the processor."""
        # The chat of the first row has a caption and the codes of an image. Both are taken away.
        row = self.pairs[0]
        caption = self.captions_of(row)[0]
        conversation = chat(question=caption, answer=self.image_text(row))
        chat_tokens = tokenize(self.processor, self.processor.apply_chat_template(conversation))
        caption_tokens = tokenize(self.processor, caption)
        num_codes = max(ids.numel() for ids in row_tokens(row, self.settings).ids)
        length_without_both = len(chat_tokens) - len(caption_tokens) - num_codes
        # The chat of another row may have the codes of the largest image.
        most_codes = max(rows * columns for rows, columns in self.processor.vocabulary.grids)
        return length_without_both + most_codes

    def _count_caption_tokens(self, row_numbers: range) -> list["CaptionLength"]:
        """Counts the tokens of each caption of some rows, as its chat holds it."""
        captions_of_rows = [self.captions_of(row) for row in self.caption_rows.select(row_numbers)]
        num_tokens_of = self._count_tokens(captions_of_rows)
        lengths = []
        for row_number, captions in zip(row_numbers, captions_of_rows, strict=True):
            for caption in captions:
                num_tokens = num_tokens_of[caption]  # in the question
                if self.mix.rewrites:  # the answer begins with the first caption of the row
                    num_tokens += num_tokens_of[captions[0]]
                lengths.append(CaptionLength(row_number, caption, num_tokens))
        return lengths

    def _count_tokens(self, captions_of_rows: Sequence[Sequence[str]]) -> dict[str, int]:
        """Number of tokens of each caption. All captions are tokenised at once, which is faster than one by one."""
        all_captions: list[str] = []
        for captions in captions_of_rows:
            all_captions += captions
        tokens_of_captions = self.processor.tokenizer(all_captions).input_ids
        num_tokens_of = {}
        for caption, tokens in zip(all_captions, tokens_of_captions, strict=True):
            num_tokens_of[caption] = len(tokens)
        return num_tokens_of

    def _check_caption(self, row_number: int, caption: str) -> None:
        """Raises if the chats of a caption and the image of its row are too long."""
        row = self.pairs[row_number]
        chat_about_image = chat(question=caption, answer=self.answer(row))  # asks for the image
        chat_about_caption = chat(question=self.image_text(row), answer=caption)  # asks for the caption
        try:
            self.chat_example(chat_about_image)  # raises if the chat is too long
            self.chat_example(chat_about_caption)
        except ValueError as error:
            raise ValueError(
                f"`{self.token_set}`, row {row_number} (`{row['key']}`), caption {reprlib.repr(caption)}: {error} "
                "Shorten the caption, or leave the row out."
            ) from error


@dataclass(frozen=True)
class CaptionLength:
    """A caption, the number of its row, and the number of tokens of all text in its chat."""

    row_number: int
    text: str
    num_tokens: int


def chat(question: str, answer: str) -> list[dict[str, str]]:
    """Messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def common_start(tokens: Sequence[int], other_tokens: Sequence[int]) -> int:
    """Number of equal tokens at the start of two sequences."""
    count = 0
    for token, other_token in zip(tokens, other_tokens, strict=False):
        if token != other_token:
            break
        count += 1
    return count


def tokenize(processor: SVQVAEProcessor, text: str) -> list[int]:
    """Tokens as the processor makes them, without a second begin of sequence."""
    bos = processor.tokenizer.bos_token
    has_bos = bool(bos) and text.startswith(bos)
    return processor.tokenizer(text, add_special_tokens=not has_bos).input_ids


def text_tokens(processor: SVQVAEProcessor, row: dict[str, Any]) -> list[int]:
    """Tokens of a text of [`read_texts`], with the tokens of its images in place of their placeholders."""
    images = row.get("images", [])
    text_before_images, *texts_after_images = row["text"].split(processor.image_token)
    whole_text = text_before_images
    for ids, text_after_image in zip(images, texts_after_images, strict=True):
        whole_text += processor.image_text(torch.tensor(ids))
        whole_text += text_after_image
    end = processor.tokenizer.eos_token or ""
    return tokenize(processor, whole_text + end)


def read_texts(files: Sequence[str], processor: SVQVAEProcessor, context: int) -> list[dict[str, Any]]:
    """Reads and checks the objects of JSON Lines files.

    Args:
        files (`Sequence[str]`): Files. Each line has a `text` and, for each placeholder of an image in it,
            rows of ids in `images`.
        processor ([`SVQVAEProcessor`]): Processor of the language model.
        context (`int`): Largest number of tokens of a text with its images and its end.

    Raises:
        ValueError: If a file is not UTF-8, or a line is something else, or too long.
    """
    texts = []
    for file in files:
        try:
            content = Path(file).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"`{file}` must be UTF-8 text, but is not: {error}. Save it as UTF-8.") from error
        if not content.strip():
            raise ValueError(f"line 1 of `{file}` must be a JSON object with a `text` and its `images`, got none.")
        for number, line in enumerate(content.split("\n"), start=1):
            is_empty_line = not line.strip()
            if is_empty_line:
                continue
            line_name = f"line {number} of `{file}`"
            row = _read_text(line_name, line, processor)
            _check_text_length(line_name, row, processor, context)
            texts.append(row)
    return texts


def _read_text(line_name: str, line: str, processor: SVQVAEProcessor) -> dict[str, Any]:
    """Reads the JSON object of a line, such as `{"text": "A cat: <image>.", "images": [[[3, 7], [1, 0]]]}`.

    Args:
        line_name (`str`): Name of the line for an error, such as "line 7 of `texts.jsonl`".
        line (`str`): The line.
        processor ([`SVQVAEProcessor`]): Processor of the language model.

    Raises:
        ValueError: The line is not such an object.
    """
    requirement = f"{line_name} must be a JSON object with a `text` and its `images`"
    try:
        row = json.loads(line)
        _check_images_of_text(row, processor)
    except ValueError as error:  # the line is not JSON, or its images are wrong
        raise ValueError(f"{requirement} ({error}).") from error
    except (AttributeError, KeyError, TypeError) as error:  # the JSON is not an object, or its values have other types
        raise ValueError(f"{requirement}.") from error
    return row


def _check_images_of_text(row: Any, processor: SVQVAEProcessor) -> None:
    """Checks that the images of a text have ids of the model, and that each has a placeholder in the text.

    Raises:
        ValueError: The model cannot have such ids, or the number of placeholders differs.
        AttributeError, KeyError, TypeError: The row is not an object with a `text` and `images`.
    """
    images = row.get("images", [])
    for rows_of_ids in images:
        for row_of_ids in rows_of_ids:
            if any(type(id) is not int for id in row_of_ids):  # `true` is an int of another type
                raise ValueError("an id of its images is not a whole number")
        _check_ids(torch.tensor(rows_of_ids), processor)
    num_placeholders = row["text"].count(processor.image_token)
    if num_placeholders != len(images):
        raise ValueError(f"it has {num_placeholders} {processor.image_token} for {len(images)} images")


def _check_ids(ids: torch.Tensor, processor: SVQVAEProcessor) -> None:
    """Raises ValueError if the vocabulary of a model has no grid of the shape of the ids, or not all of the ids."""
    processor.vocabulary.encode(ids)  # raises the error; the tokens that it returns are not needed here


def _check_text_length(line_name: str, row: dict[str, Any], processor: SVQVAEProcessor, context: int) -> None:
    """Raises ValueError if a text with its images is longer than the context."""
    length = len(text_tokens(processor, row))
    if length > context:
        raise ValueError(
            f"{line_name} must fit the context of {context} tokens with its images, but takes {length}. Split the "
            "text."
        )
