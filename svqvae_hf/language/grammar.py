"""The grammar of images among text: as a logits processor for generation, and in the syntax of servers."""

import re

import torch
from transformers import LogitsProcessor, PreTrainedConfig

from svqvae_hf.models.image_vocabulary import END, ImageVocabulary

# Kinds of the next token. `next_kind` relies on `OUTSIDE` being 0.
OUTSIDE = 0  # text or begin
SIZE = 1
CODES = 2
LAST = 3  # end
NUM_KINDS = 4


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

        # Kind of the next token, by the size of the image and the number of tokens after its begin
        code_counts = [rows * columns for rows, columns in vocabulary.grids]
        longest = max(code_counts) + 2  # a size, the codes and the end
        self.kinds = torch.full((len(code_counts), longest), OUTSIDE)
        self.kinds[:, 0] = SIZE
        for size, num_codes in enumerate(code_counts):
            self.kinds[size, 1 : num_codes + 1] = CODES
            self.kinds[size, num_codes + 1] = LAST
        # For each size token, the index of the first entry of its row in the flattened `kinds`
        self.starts = torch.zeros(vocabulary_size, dtype=torch.int64)
        self.starts[vocabulary.first_size : vocabulary.stop] = torch.arange(0, self.kinds.numel(), longest)

        # Bias of each token, by the kind of the next token: 0 if the token is of this kind
        self.bias = torch.full((NUM_KINDS, vocabulary_size), -torch.inf)
        self.bias[OUTSIDE, : vocabulary.first_token] = 0
        self.bias[OUTSIDE, vocabulary.begin] = 0
        self.bias[SIZE, vocabulary.first_size : vocabulary.stop] = 0
        self.bias[CODES, vocabulary.first_token : vocabulary.begin] = 0
        self.bias[LAST, vocabulary.end] = 0

    def next_kind(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Kind of the token after sequences `(batch, length)`: `OUTSIDE`, `SIZE`, `CODES` or `LAST`, `(batch, 1)`."""
        self._move(input_ids.device)
        longest = self.kinds.shape[1]
        newest_tokens = input_ids[:, -longest:]  # (batch, longest); an image that began before them is complete
        newest_first = newest_tokens.flip(1)
        # Whether an image has begun, and how many tokens follow its begin. Both are (batch, 1).
        has_begun, num_after_begin = (newest_first == self.begin).max(1, keepdim=True)
        size_place = (num_after_begin - 1).clamp_min(0)  # the token after the begin, which is the size
        size_token = newest_first.gather(1, size_place)  # (batch, 1)
        first_entry = self.starts.take(size_token)  # 0 if there is no size yet
        kind = self.kinds.take(first_entry + num_after_begin)
        return kind * has_begun  # `OUTSIDE`, which is 0, if no image has begun

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
    num_digits = vocabulary.names[0].count("0")  # the name of code 0 has only zeros
    last_code = vocabulary.codebook_size - 1
    number = _numbers_regex(f"{last_code:0{num_digits}}")
    code = rf"<\|image_(?:{number})\|>"
    rows, columns = grid
    num_codes = rows * columns
    return f"(?:{code}){{{num_codes}}}{re.escape(END)}"


def _numbers_regex(last_number: str) -> str:
    """Regular expression of all numbers from 0 to the last one, with as many digits."""
    num_digits = len(last_number)
    patterns = []
    for place, digit in enumerate(last_number):
        if digit == "0":
            continue
        # Numbers that agree with the last one up to this place, and have a smaller digit there
        equal_digits = last_number[:place]
        smaller_digit = rf"[0-{int(digit) - 1}]"
        any_digits = r"\d" * (num_digits - place - 1)
        patterns.append(equal_digits + smaller_digit + any_digits)
    patterns.append(last_number)
    return "|".join(patterns)


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
