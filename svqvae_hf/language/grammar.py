"""The grammar of images among text: as a logits processor for generation, and in the syntax of servers."""

import re
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedConfig

from svqvae_hf.models.image_vocabulary import END, ImageVocabulary

# Kinds of the next token
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
        # Kind of the next token, by the size of the image and the number of tokens after its begin.
        self.kinds = kinds_in_images(vocabulary.grids)  # (sizes, longest)
        # For each token that stands for a size, the number of this size: its row in `kinds`. Other tokens have 0.
        vocabulary_size = config.get_text_config().vocab_size
        num_sizes = len(vocabulary.grids)
        self.row_of_size = torch.zeros(vocabulary_size, dtype=torch.int64)
        self.row_of_size[vocabulary.first_size : vocabulary.stop] = torch.arange(num_sizes)
        self.bias = _bias_of_kinds(vocabulary, vocabulary_size)  # (kinds, vocabulary)

    def next_kind(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Kind of the token after sequences `(batch, length)`: `OUTSIDE`, `SIZE`, `CODES` or `LAST`, `(batch, 1)`.

        For example, let a sequence be a text, the begin of an image, a size of 1 x 2 and a code. With the newest token
        first, it is:

            index          0     1      2      3
            token       code  size  begin   text

        The begin has index 2, so two tokens come after it, and the size has index 1. The row of the size 1 x 2 in
        `kinds` has `CODES` for two tokens after the begin.
        """
        self._move(input_ids.device)
        longest = self.kinds.shape[1]
        newest_tokens = input_ids[:, -longest:]  # (batch, longest); an image that began before them is complete
        newest_first = newest_tokens.flip(1)  # (batch, longest)
        is_begin = newest_first == self.begin  # (batch, longest)
        has_begun = is_begin.any(dim=1, keepdim=True)  # (batch, 1)
        # Of several images, the newest one has the first begin. `argmax` returns its index, or 0 if there is no begin.
        index_of_begin = is_begin.int().argmax(dim=1, keepdim=True)  # (batch, 1)
        num_after_begin = index_of_begin  # a begin at index 2, for example, has two tokens after it
        row = self._row_of_image(newest_first, index_of_begin)  # (batch, 1)
        kind_in_image = self.kinds[row, num_after_begin]  # (batch, 1), without meaning if no image has begun
        return torch.where(has_begun, kind_in_image, OUTSIDE)

    def _row_of_image(self, newest_first: torch.Tensor, index_of_begin: torch.Tensor) -> torch.Tensor:
        """Row in `kinds` of the size of the newest image `(batch, 1)`, from the arguments that [`next_kind`] has made.

        Directly after the begin there is no size yet. Then any row will do, because all rows begin with `SIZE`.
        """
        index_of_size = (index_of_begin - 1).clamp_min(0)  # (batch, 1)
        size_token = newest_first.gather(1, index_of_size)  # (batch, 1)
        return self.row_of_size[size_token]

    def _move(self, device: torch.device) -> None:
        """Moves the tables to the device of the tokens."""
        self.kinds = self.kinds.to(device)
        self.bias = self.bias.to(device)
        self.row_of_size = self.row_of_size.to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sets the logits `(batch, vocab_size)` of the forbidden tokens to minus infinity."""
        kind = self.next_kind(input_ids)[:, 0]  # first, because it moves the bias to the device
        return scores + self.bias.index_select(0, kind)


def _bias_of_kinds(vocabulary: ImageVocabulary, vocabulary_size: int) -> torch.Tensor:
    """Bias `(kinds, vocabulary)` of each token if the next token must be of a kind: 0, or minus infinity.

    These are the kinds that have a bias of 0, for the tokens in the order of the vocabulary:

        tokens          from           to             kind
        text            0              first_token    OUTSIDE
        codes           first_token    begin          CODES
        begin           begin                         OUTSIDE
        end             end                           LAST
        no condition                                  none
        sizes           first_size     stop           SIZE
    """
    bias = torch.full((NUM_KINDS, vocabulary_size), -torch.inf)
    bias[OUTSIDE, : vocabulary.first_token] = 0
    bias[CODES, vocabulary.first_token : vocabulary.begin] = 0
    bias[OUTSIDE, vocabulary.begin] = 0
    bias[LAST, vocabulary.end] = 0
    bias[SIZE, vocabulary.first_size : vocabulary.stop] = 0
    return bias


def kinds_in_images(grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Kind of the next token, by the size of the image and by the number of tokens after its begin.

    The row of a grid of 1 x 2, for example, says that after the begin alone comes the size, and so on:

        tokens after the begin      0      1      2     3
        kind of the next token   SIZE  CODES  CODES  LAST

    Args:
        grids (`Sequence[tuple[int, int]]`): Rows and columns of codes of each size.

    Returns:
        `torch.Tensor` of shape `(sizes, longest)`: Kinds in int64, with `OUTSIDE` after the end of shorter images.
    """
    code_counts = [rows * columns for rows, columns in grids]
    longest = max(code_counts) + 2  # a size, the codes and the end
    kinds = torch.full((len(code_counts), longest), OUTSIDE)
    kinds[:, 0] = SIZE
    for size, num_codes in enumerate(code_counts):
        kinds[size, 1 : num_codes + 1] = CODES
        kinds[size, num_codes + 1] = LAST
    return kinds


def grammar_regex(vocabulary: ImageVocabulary, grid: tuple[int, int]) -> str:
    r"""Regular expression of the answer to a prompt that ends with `processor.begin_image(grid)`: codes and the end.

    It is for servers with structured output. It matches one image and no text. For a grid of 16 x 16, it is
    `(?:<\|image_(?:NUMBERS)\|>){256}<\|image_end\|>`, where `NUMBERS` matches the number of any code, such as `00019`.

    Example:
        >>> pattern = grammar_regex(processor.vocabulary, (16, 16))
        >>> re.fullmatch(pattern, tokenizer.decode(tokens))
    """
    # The names of the codes are, for 20 codes, "<|image_00000|>" to "<|image_00019|>".
    name_of_last_code = vocabulary.names[vocabulary.codebook_size - 1]
    last_number = name_of_last_code.removeprefix("<|image_").removesuffix("|>")  # "00019"
    numbers = _numbers_regex(last_number)
    code = rf"<\|image_(?:{numbers})\|>"
    rows, columns = grid
    repetitions = "{" + str(rows * columns) + "}"  # such as "{256}"
    end = re.escape(END)
    return f"(?:{code}){repetitions}{end}"


def _numbers_regex(last_number: str) -> str:
    r"""Regular expression of all numbers from 0 to the last one, with as many digits.

    Up to 305, for example, it is `[0-2]\d\d|30[0-4]|305`: the numbers with a smaller first digit than 305, those with
    the same first two digits and a smaller last digit, and 305. No number has a smaller second digit, which is 0.
    """
    num_digits = len(last_number)
    patterns = []
    for place, digit in enumerate(last_number):
        if digit == "0":  # no digit is smaller
            continue
        # These numbers have the digits of the last number before this place, and a smaller one in this place.
        equal_digits = last_number[:place]
        smaller_digit = rf"[0-{int(digit) - 1}]"
        any_digits = r"\d" * (num_digits - place - 1)
        patterns.append(equal_digits + smaller_digit + any_digits)
    patterns.append(last_number)
    return "|".join(patterns)


def grammar_lark(vocabulary: ImageVocabulary) -> str:
    r"""Grammar in the syntax of llguidance, which names tokens by their ids.

    llguidance keeps special tokens apart from the text, so that a regular expression cannot match them. `<[5]>` is the
    token with the id 5. For codes from 50 to 99 and images of 2 x 2 and 4 x 4 codes, the grammar is:

        start: (TEXT | image)*
        image: <[100]> (<[103]> <[50-99]>{4} | <[104]> <[50-99]>{16}) <[101]>
        TEXT: /(.|\n)+/
    """
    last_code = vocabulary.begin - 1
    code = f"<[{vocabulary.first_token}-{last_code}]>"
    images = []
    for rows, columns in vocabulary.grids:
        size_token = vocabulary.size_token((rows, columns))
        repetitions = "{" + str(rows * columns) + "}"
        images.append(f"<[{size_token}]> {code}{repetitions}")
    any_image = " | ".join(images)
    lines = [
        "start: (TEXT | image)*",
        f"image: <[{vocabulary.begin}]> ({any_image}) <[{vocabulary.end}]>",
        r"TEXT: /(.|\n)+/",
    ]
    return "\n".join(lines) + "\n"
