"""The grammar of images among text: as a logits processor for generation, and in the syntax of servers."""

import re

import torch
from transformers import LogitsProcessor, PreTrainedConfig

from svqvae_hf.models.image_vocabulary import END, ImageVocabulary

OUTSIDE, SIZE, CODES, LAST = range(4)  # the next token: text or begin, a size, a code, end


class ImageGrammar(LogitsProcessor):
    """Forbids every token that would make a malformed image. All other logits stay as they are.

    Outside an image the next token is a token of the text or begins an image, then comes one of the sizes, then
    exactly rows x columns codes, then the end. The tokens so far determine what may follow, so sequences may be padded
    on the left, hold several images, change places in beam search, or begin inside an image.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Config of the language model.

    Raises:
        ValueError: If the language model has no image tokens.

    Example:
        >>> tokens = model.generate(**inputs, logits_processor=[ImageGrammar(model.config)])
    """

    def __init__(self, config: PreTrainedConfig):
        vocabulary = ImageVocabulary.from_config(config)
        self.begin = vocabulary.begin
        vocabulary_size = config.get_text_config().vocab_size
        counts = [rows * columns for rows, columns in vocabulary.grids]
        longest = max(counts) + 2  # a size, the codes and the end
        self.kinds = torch.full((len(counts), longest), OUTSIDE)  # (size, number of tokens after the last begin)
        self.kinds[:, 0] = SIZE
        for size, count in enumerate(counts):
            self.kinds[size, 1 : count + 1] = CODES
            self.kinds[size, count + 1] = LAST
        # Where the row of `kinds` of a size token starts, if `kinds` is read as one row.
        self.starts = torch.zeros(vocabulary_size, dtype=torch.int64)
        self.starts[vocabulary.first_size : vocabulary.stop] = torch.arange(0, self.kinds.numel(), longest)
        self.bias = torch.full((4, vocabulary_size), -torch.inf)  # (kind of the next token, token)
        self.bias[OUTSIDE, : vocabulary.first_token] = 0
        self.bias[OUTSIDE, vocabulary.begin] = 0
        self.bias[SIZE, vocabulary.first_size : vocabulary.stop] = 0
        self.bias[CODES, vocabulary.first_token : vocabulary.begin] = 0
        self.bias[LAST, vocabulary.end] = 0

    def next_kind(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Kind of the token after sequences `(batch, length)`: `OUTSIDE`, `SIZE`, `CODES` or `LAST`, `(batch, 1)`."""
        self._move(input_ids.device)
        newest_first = input_ids[:, -self.kinds.shape[1] :].flip(1)  # an image that began before them is complete
        has_begun, place = (newest_first == self.begin).max(1, keepdim=True)  # both (batch, 1)
        size_token = newest_first.gather(1, (place - 1).clamp_min(0))
        kind = self.kinds.take(self.starts.take(size_token) + place)
        return kind * has_begun  # `OUTSIDE` is 0

    def _move(self, device: torch.device) -> None:
        """Moves the tables to the device of the tokens."""
        self.kinds = self.kinds.to(device)
        self.bias = self.bias.to(device)
        self.starts = self.starts.to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sets the logits `(batch, vocab_size)` of the forbidden tokens to minus infinity."""
        kind = self.next_kind(input_ids)[:, 0]  # first, because it moves the bias to the device
        return scores + self.bias.index_select(0, kind)


def grammar_regex(vocabulary: ImageVocabulary, grid: tuple[int, int]) -> str:
    """Regular expression of the answer to a prompt that ends with `processor.begin_image(grid)`: codes and the end.

    Servers with structured output take it. It matches one image and no text.

    Example:
        >>> pattern = grammar_regex(processor.vocabulary, (16, 16))
        >>> re.fullmatch(pattern, tokenizer.decode(tokens))
    """
    digits = vocabulary.names[0].count("0")
    last = f"{vocabulary.codebook_size - 1:0{digits}}"
    numbers = []
    for place, digit in enumerate(last):
        if digit == "0":
            continue
        # Numbers that agree with the last one up to this place, and have a smaller digit there.
        smaller = rf"[0-{int(digit) - 1}]"
        numbers.append(last[:place] + smaller + r"\d" * (digits - place - 1))
    numbers.append(last)
    rows, columns = grid
    code = rf"<\|image_(?:{'|'.join(numbers)})\|>"
    return f"(?:{code}){{{rows * columns}}}{re.escape(END)}"


def grammar_lark(vocabulary: ImageVocabulary) -> str:
    """Grammar in the syntax of llguidance, which names tokens by their ids.

    llguidance keeps special tokens apart from the text, so that a regular expression cannot match them.
    """
    code = f"<[{vocabulary.first_token}-{vocabulary.begin - 1}]>"
    images = []
    for rows, columns in vocabulary.grids:
        size = f"<[{vocabulary.size_token((rows, columns))}]>"
        images.append(f"{size} {code}{{{rows * columns}}}")
    any_image = " | ".join(images)
    return (
        f"start: (TEXT | image)*\nimage: <[{vocabulary.begin}]> ({any_image}) <[{vocabulary.end}]>\nTEXT: /(.|\\n)+/\n"
    )
