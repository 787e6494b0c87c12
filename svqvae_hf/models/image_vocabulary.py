"""Image tokens of a language model: their names, their ids, and images among other tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedConfig

PLACEHOLDER = "<|image|>"  # stands for an image in a text; it is not a token
BEGIN = "<|image_begin|>"
END = "<|image_end|>"
NO_CONDITION = "<|no_condition|>"
CODE_DIGITS = 5  # fewest digits of a code in the name of its token
CONFIG_KEY = "image_vocabulary"  # in the config of the language model and of the processor


@dataclass(frozen=True)
class ImageVocabulary:
    """Image tokens of a language model.

    An image is one sequence of tokens:

        <|image_begin|> <|image_16x24|> <|image_00017|> ... 16 x 24 codes, row by row ... <|image_end|>

    They follow the tokens of the text: the codes, begin, end, the token for "no condition", and one token per grid.

    Args:
        first_token (`int`): Token of code 0.
        codebook_size (`int`): Number of codes.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the codebook.
        f (`int`): Pixels per latent side.
        grids (`Sequence[tuple[int, int]]`): Rows and columns of codes of the images. Stored as a tuple.
        tokenizer_digest (`str`, *optional*): Digest of the tokenizer that the language model was made for, as
            `tokenizer_digest` of `processing_svqvae.py` computes it. None in folders without one.

    Raises:
        ValueError: If there is no grid, one is empty, or one occurs twice.
    """

    first_token: int
    codebook_size: int
    codebook_fingerprint: str
    f: int
    grids: Sequence[tuple[int, int]]
    tokenizer_digest: str | None = None

    def __post_init__(self) -> None:
        message = f"`grids` must be different pairs of rows and columns, at least 1, got {self.grids}."
        grids = []
        try:
            for rows, columns in self.grids:  # lists, if they come from a config
                grids.append((int(rows), int(columns)))
        except (TypeError, ValueError) as error:
            raise ValueError(message) from error
        has_empty_grid = any(rows < 1 or columns < 1 for rows, columns in grids)
        has_duplicates = len(set(grids)) < len(grids)
        if not grids or has_empty_grid or has_duplicates:
            raise ValueError(message)
        object.__setattr__(self, "grids", tuple(grids))  # because the dataclass is frozen

    @classmethod
    def from_config(cls, config: PreTrainedConfig | Mapping[str, Any]) -> "ImageVocabulary":
        """Reads the image tokens from the config of a language model or of a processor.

        Raises:
            ValueError: If it has none, or they are damaged.
        """
        entries = config if isinstance(config, Mapping) else config.to_dict()
        if CONFIG_KEY not in entries:
            raise ValueError(
                f"the config must have an `{CONFIG_KEY}`, but has none, so the model has no image tokens. Add them "
                "with `svqvae extend-lm`."
            )
        return cls.from_entries(entries[CONFIG_KEY])

    @classmethod
    def from_entries(cls, entries: Any) -> "ImageVocabulary":
        """Reads the image tokens from the value that a config holds for them, as `to_config` made it.

        Raises:
            ValueError: If the value does not have the right keys and types.
        """
        if not isinstance(entries, Mapping):
            raise ValueError(f"`{CONFIG_KEY}` of the config must be an object, got {entries!r:.80}. Restore the file.")
        all_keys = {field.name for field in fields(cls)}
        required_keys = {field.name for field in fields(cls) if field.default is MISSING}
        missing_keys = required_keys - entries.keys()
        unknown_keys = entries.keys() - all_keys
        if missing_keys or unknown_keys:
            keys = [str(key) for key in entries]
            raise ValueError(
                f"`{CONFIG_KEY}` of the config must have the keys {', '.join(sorted(required_keys))}, got "
                f"{', '.join(sorted(keys))}. Restore the file."
            )
        for key in ("first_token", "codebook_size", "f"):
            value = entries[key]
            if type(value) is not int or value < 1:
                raise ValueError(f"`{key}` of `{CONFIG_KEY}` must be an integer of at least 1, got {value!r:.80}.")
        return cls(**entries)

    def to_config(self) -> dict[str, Any]:
        """Entries for a config."""
        return asdict(self)

    @property
    def names(self) -> list[str]:
        """Names of the tokens, in the order of their ids."""
        largest_code = self.codebook_size - 1
        digits = max(CODE_DIGITS, len(str(largest_code)))
        codes = [f"<|image_{code:0{digits}}|>" for code in range(self.codebook_size)]
        sizes = [f"<|image_{rows}x{columns}|>" for rows, columns in self.grids]
        return codes + [BEGIN, END, NO_CONDITION] + sizes

    @property
    def begin(self) -> int:
        """Token before an image."""
        return self.first_token + self.codebook_size

    @property
    def end(self) -> int:
        """Token after an image."""
        return self.begin + 1

    @property
    def no_condition(self) -> int:
        """Token in place of a caption, for classifier-free guidance."""
        return self.begin + 2

    @property
    def first_size(self) -> int:
        """Token of the first grid."""
        return self.begin + 3

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.first_size + len(self.grids)

    def size_token(self, grid: Sequence[int]) -> int:
        """Token of a grid.

        Raises:
            ValueError: If the vocabulary has no such grid, or it is not a pair of rows and columns.
        """
        try:
            grid = tuple(grid)
        except TypeError as error:
            raise ValueError(
                f"`grid` must be a pair of rows and columns of codes, such as {self.grids[0]}, got {grid!r:.80}."
            ) from error
        if grid in self.grids:
            return self.first_size + self.grids.index(grid)
        choices = ", ".join(f"{rows} x {columns}" for rows, columns in self.grids)
        wanted = " x ".join(str(side) for side in grid)
        raise ValueError(
            f"`grid` must be one of the rows x columns of codes that the model knows, {choices}, got {wanted}. "
            "Choose one, or extend the language model with more `--grids`."
        )

    def begin_image(self, grid: Sequence[int]) -> list[int]:
        """Tokens before the codes of an image."""
        return [self.begin, self.size_token(grid)]

    def encode(self, ids: torch.Tensor) -> list[int]:
        """Tokens of an image with ids `(h, w)`.

        Raises:
            ValueError: If the vocabulary has no such grid or no such codes.
        """
        start = self.begin_image(ids.shape)
        if ids.min() < 0 or ids.max() >= self.codebook_size:
            raise ValueError(
                f"ids must be in [0, {self.codebook_size}), the codes of the codebook, got {ids.min()} to "
                f"{ids.max()}. Encode the image with the tokenizer in the folder of the language model."
            )
        codes = ids.flatten().long() + self.first_token
        return start + codes.tolist() + [self.end]

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Splits a sequence into text and images.

        Args:
            tokens (`torch.Tensor` of shape `(length,)`): Sequence.

        Returns:
            `list[torch.Tensor]`: In turn, the tokens of a text, which may be empty, and the ids `(h, w)` of an image,
            from the first text to the last. An image in which the sequence ends is left out.

        Raises:
            ValueError: If there is an image token outside an image, a text inside one, or too few or too many codes.
        """
        parts = []
        text_start = 0
        begin_positions = (tokens == self.begin).nonzero().flatten().tolist()
        for begin in begin_positions:
            parts.append(self._check_text(tokens[text_start:begin], text_start))
            size_position = begin + 1
            if size_position == len(tokens):
                return parts  # the sequence ends before the size of the image
            rows, columns = self._grid_of(tokens[size_position])
            first_code = size_position + 1
            end_position = first_code + rows * columns
            self._check_codes(tokens, first_code, rows, columns)
            is_cut_off = end_position >= len(tokens)
            if is_cut_off:
                return parts
            ids = tokens[first_code:end_position] - self.first_token  # (rows * columns,)
            parts.append(ids.view(rows, columns))
            text_start = end_position + 1
        parts.append(self._check_text(tokens[text_start:], text_start))
        return parts

    def _grid_of(self, size_token: torch.Tensor) -> tuple[int, int]:
        """Grid of the token after the begin of an image."""
        size = int(size_token)
        if not self.first_size <= size < self.stop:
            raise ValueError(f"the token after {BEGIN} must be one of the size tokens, got token {size}.")
        return self.grids[size - self.first_size]

    def _check_codes(self, tokens: torch.Tensor, first_code: int, rows: int, columns: int) -> None:
        """Raises ValueError if a token of an image is not a code, or the token after the codes is not the end token.

        If the sequence ends inside the image, only the tokens that are there are checked.
        """
        num_codes = rows * columns
        end_position = first_code + num_codes
        ids = tokens[first_code:end_position] - self.first_token  # at most `num_codes`
        is_no_code = (ids < 0) | (ids >= self.codebook_size)
        wrong_positions = (first_code + is_no_code.nonzero().flatten()).tolist()
        is_whole = end_position < len(tokens)
        if is_whole and tokens[end_position] != self.end:
            wrong_positions.append(end_position)
        if wrong_positions:
            position = wrong_positions[0]
            raise ValueError(
                f"an image of {rows} x {columns} must have {num_codes} codes and then {END}, got token "
                f"{tokens[position]} at position {position}. Correct the prompt, or generate with `ImageGrammar`."
            )

    def _check_text(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Returns the tokens of a text. Raises ValueError if one of them is an image token.

        `start` is the position of the text in its sequence, for the error.
        """
        is_in_image_vocabulary = (tokens >= self.first_token) & (tokens < self.stop)
        # The token for "no condition" belongs to the image vocabulary, but stands in a text, in place of a caption.
        is_image_token = is_in_image_vocabulary & (tokens != self.no_condition)
        if is_image_token.any():
            position_in_text = int(is_image_token.nonzero()[0])
            raise ValueError(
                f"outside an image there must be no image token, got token {tokens[position_in_text]} at position "
                f"{start + position_in_text}. Correct the prompt, or generate with `ImageGrammar`."
            )
        return tokens
