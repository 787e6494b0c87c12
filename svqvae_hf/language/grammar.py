"""The grammar of images among text: as logits processors for generation, and as a regular expression for servers."""

import re
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedConfig, PreTrainedModel
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from svqvae_hf.language.image_vocabulary import BEGIN, END, ImageVocabulary

IMAGE_PREFIX = "<|image_"  # of the names of all tokens of images
OUTSIDE, SIZE, CODES, LAST = range(4)  # the next token: text or begin, a size, a code, end


class ImageGrammar(LogitsProcessor):
    """Bars every token that would make a malformed image. All other logits stay as they are.

    Outside an image the next token is a token of the text or begins an image, then comes one of the sizes, then
    exactly rows x columns codes, then the end. The tokens so far say all, so sequences may be padded on the left, hold
    several images, change places in beam search, or begin inside an image.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Config of the language model.

    Raises:
        ValueError: If the language model has no image tokens.

    Example:
        >>> tokens = model.generate(**inputs, logits_processor=[ImageGrammar(model.config)])
    """

    def __init__(self, config: PreTrainedConfig):
        vocabulary = ImageVocabulary.from_config(config)
        self.begin, self.first_size = vocabulary.begin, vocabulary.first_size
        self.counts = torch.tensor([rows * columns for rows, columns in vocabulary.grids])
        self.allowed = torch.zeros(4, config.get_text_config().vocab_size, dtype=torch.bool)  # next kind x token
        self.allowed[OUTSIDE, : vocabulary.first_token] = True
        self.allowed[OUTSIDE, vocabulary.begin] = True
        self.allowed[SIZE, vocabulary.first_size : vocabulary.stop] = True
        self.allowed[CODES, vocabulary.first_token : vocabulary.begin] = True
        self.allowed[LAST, vocabulary.end] = True

    def next_kind(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Kind of the next token of sequences `(batch, length)`: `OUTSIDE`, `SIZE`, `CODES` or `LAST`, `(batch,)`."""
        self._move(input_ids.device)
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        begin = torch.where(input_ids == self.begin, positions, -length - 2).amax(1)  # the last one, if any
        size = input_ids.gather(1, (begin + 1).clamp(0, length - 1)[:, None])[:, 0] - self.first_size
        codes_left = self.counts[size.clamp(0, len(self.counts) - 1)] - (length - 2 - begin)
        kind = torch.where(codes_left > 0, CODES, torch.where(codes_left == 0, LAST, OUTSIDE))
        kind = torch.where(begin == length - 1, SIZE, kind)
        return torch.where(begin < 0, OUTSIDE, kind)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sets the logits `(batch, vocab_size)` of the barred tokens to minus infinity."""
        kind = self.next_kind(input_ids)
        return scores.masked_fill(~self.allowed[kind], -torch.inf)

    def _move(self, device: torch.device) -> None:
        if self.allowed.device != device:
            self.allowed, self.counts = self.allowed.to(device), self.counts.to(device)


class ImageGuidance(UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """Classifier-free guidance of transformers, inside images only. It comes before [`ImageGrammar`].

    Args:
        guidance_scale (`float`): Guidance scale, 1 for none.
        model ([`~transformers.PreTrainedModel`]): The language model.
        **context: `unconditional_ids` and its mask, the prompt without its condition, as `negative_prompt_ids` of
            `generate`.
    """

    def __init__(self, guidance_scale: float, model: PreTrainedModel, **context: Any):
        super().__init__(guidance_scale, model, **context)
        self.grammar = ImageGrammar(model.config)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guides the logits `(batch, vocab_size)` of sequences that are inside an image."""
        inside = self.grammar.next_kind(input_ids) != OUTSIDE
        return torch.where(inside[:, None], super().__call__(input_ids, scores), scores.log_softmax(-1))


def grammar_regex(vocabulary: ImageVocabulary) -> str:
    """Regular expression of texts with images, without lookaround, as servers with structured output take it.

    Example:
        >>> pattern = grammar_regex(ImageVocabulary.from_config(model.config))
        >>> re.fullmatch(pattern, tokenizer.decode(tokens))
    """
    digits = vocabulary.names[0].count("0")
    limit = f"{vocabulary.codebook_size:0{digits}}"
    below = [  # numbers that agree with the limit up to a digit, which is smaller
        rf"{limit[:place]}[0-{int(digit) - 1}]" + r"\d" * (digits - place - 1)
        for place, digit in enumerate(limit)
        if digit != "0"
    ]
    code = rf"<\|image_(?:{'|'.join(below)})\|>"
    images = [rf"<\|image_{rows}x{columns}\|>(?:{code}){{{rows * columns}}}" for rows, columns in vocabulary.grids]
    image = f"{re.escape(BEGIN)}(?:{'|'.join(images)}){re.escape(END)}"
    # A text is free of "<|image_". It holds beginnings of that, each followed by another one or by a wrong character.
    starts = [IMAGE_PREFIX[:length] for length in range(1, len(IMAGE_PREFIX))]
    stopped = [re.escape(start) + f"[^<{IMAGE_PREFIX[len(start)]}]" for start in starts]
    again = f"(?:{'|'.join(map(re.escape, starts))})*"
    text = f"(?:[^<]|{again}(?:{'|'.join(stopped)}))*{again}"
    return f"{text}(?:{image}{text})*"


def grammar_lark(vocabulary: ImageVocabulary) -> str:
    """Grammar in the syntax of llguidance, which names tokens by their ids.

    llguidance keeps special tokens apart from the text, so that a regular expression cannot match them.
    """
    code = f"<[{vocabulary.first_token}-{vocabulary.begin - 1}]>"
    images = [f"<[{vocabulary.size_token(grid)}]> {code}{{{grid[0] * grid[1]}}}" for grid in vocabulary.grids]
    return (
        "start: (TEXT | image)*\n"
        f"image: <[{vocabulary.begin}]> ({' | '.join(images)}) <[{vocabulary.end}]>\n"
        "TEXT: /(.|\\n)+/\n"
    )
