"""Ids of one or several scales as one sequence for a causal language model, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from transformers import LogitsProcessor

from svqvae_hf.tokens.token_files import grid_shape

INTEGER_TYPES = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


@dataclass(frozen=True)
class SequenceLayout:
    """What stands where in the sequence of an image.

        class or unconditional, ids of scale 0, separator, ids of scale 1, separator, ids of scale 2, ...

    Scales go from coarse to fine, ids in raster order. Every prefix of whole scales is the sequence of a smaller
    image; one scale is LlamaGen's layout (arXiv 2406.06525). The vocabulary is the codebook, then the classes, then
    the unconditional token, then a separator for each scale but the first; so scales can be added to a trained model.

    Args:
        codebook_size (`int`): Rows of the codebook.
        f (`int`): Pixels per latent side.
        height (`int`): Height in pixels of the images that the sequences stand for.
        width (`int`): Width in pixels.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Output side over image side, rising; kept as a tuple.
        num_classes (`int`, defaults to 0): Number of labels, which are `0, ..., num_classes - 1`. The label
            `num_classes` is that of an image of no class.

    Raises:
        ValueError: A value is out of its range, or the scales do not rise.
    """

    codebook_size: int
    f: int
    height: int
    width: int
    scales: Sequence[float] = (1.0,)
    num_classes: int = 0

    def __post_init__(self) -> None:
        for name, least in {"codebook_size": 1, "f": 1, "height": 1, "width": 1, "num_classes": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, but is {value!r}.")
        try:
            scales = tuple(map(float, self.scales))  # a list, where it comes from a config
        except (TypeError, ValueError):
            scales = ()
        bounds = (0.0, *scales, math.inf)
        if not scales or not all(low < high for low, high in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(
                f"`scales` must be above 0, finite and rise, but are {self.scales!r}. Give them as a sorted list."
            )
        object.__setattr__(self, "scales", scales)

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the ids of each scale."""
        return tuple(grid_shape(self.height, self.width, self.f, scale) for scale in self.scales)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Where the ids of each scale stand in the sequence."""
        sizes = [rows * columns for rows, columns in self.grids]
        ends = accumulate(size + 1 for size in sizes)  # before each scale stands one token
        return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Where the token before the ids of each scale stands: that of the class, then the separators."""
        return tuple(span.start - 1 for span in self.spans)

    @property
    def length(self) -> int:
        """Tokens of a sequence, that of the class included."""
        return self.spans[-1].stop

    @property
    def vocab_size(self) -> int:
        """Tokens that there are: codes, classes, the unconditional token, separators."""
        return self.codebook_size + self.num_classes + len(self.scales)

    @property
    def unconditional_token(self) -> int:
        """The token that stands for no class, `codebook_size + num_classes`."""
        return self.codebook_size + self.num_classes

    def allowed(self, position: int) -> range:
        """The tokens of which one must stand at a position.

        Args:
            position (`int`): In `[0, length)`.

        Raises:
            ValueError: If it is not.
        """
        if not 0 <= position < self.length:
            raise ValueError(f"a position must be in [0, {self.length}), the length of a sequence, but is {position}.")
        if position not in self.heads:
            return range(self.codebook_size)
        if position == 0:
            return range(self.codebook_size, self.unconditional_token + 1)
        separator = self.unconditional_token + self.heads.index(position)
        return range(separator, separator + 1)

    def encode(
        self, ids: Sequence[torch.Tensor], labels: torch.Tensor | Sequence[int] | int | None = None
    ) -> torch.Tensor:
        """Joins the ids of an image, or of a batch of them, to sequences.

        Args:
            ids (`Sequence[torch.Tensor]`, of shape `(h, w)` or `(batch, h, w)`, integers): One grid per scale, as
                `vqvae.encode_tokens(sample, scales)` gives them. Fewer than the layout has give a prefix.
            labels (`torch.Tensor` of shape `(batch,)`, `Sequence[int]` or `int`, *optional*): In `[0, num_classes]`;
                no class if not given.

        Returns:
            `torch.Tensor`: Tokens `(length,)` or `(batch, length)`, int64.

        Raises:
            TypeError: If ids or labels are no integers.
            ValueError: If grids have another shape, or ids or labels are out of range.
        """
        if not 1 <= len(ids) <= len(self.scales):
            raise ValueError(f"there must be one grid for each of the scales {list(self.scales)}, but are {len(ids)}.")
        grids = [to_int64("ids", grid) for grid in ids]
        shape = grids[0].shape[:-2]
        labels = self.num_classes if labels is None else labels
        labels = to_int64("labels", torch.as_tensor(labels)).to(grids[0].device)
        if labels.shape not in (torch.Size(), shape):
            raise ValueError(f"labels must have shape {tuple(shape)}, one each, but have {tuple(labels.shape)}.")
        _check_range("labels", labels, self.num_classes + 1, "`num_classes`, which stands for no class, included")
        parts = [(self.codebook_size + labels).expand(shape)[..., None]]
        for index, (grid, size) in enumerate(zip(grids, self.grids, strict=False)):
            if grid.shape != (*shape, *size):
                raise ValueError(
                    f"the ids of scale {self.scales[index]:g} must have shape {(*shape, *size)}, but have "
                    f"{tuple(grid.shape)}. Encode images of {self.height} x {self.width} pixels (height x width)."
                )
            tokens = grid.flatten(-2)
            _check_range("ids", tokens, self.codebook_size, "`codebook_size`")
            if index:
                parts.append(tokens.new_full((*shape, 1), self.unconditional_token + index))
            parts.append(tokens)
        return torch.cat(parts, dim=-1)

    def decode(self, sequences: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Takes sequences apart, the inverse of `encode`.

        Args:
            sequences (`torch.Tensor` of shape `(length,)` or `(batch, length)`, integers): Whole sequences, or
                prefixes that end with a scale.

        Returns:
            `tuple[list[torch.Tensor], torch.Tensor]`: Grids of ids `(h, w)` or `(batch, h, w)`, one for each scale
            that is there, and the labels `()` or `(batch,)`, int64.

        Raises:
            TypeError: If the tokens are no integers.
            ValueError: If a sequence ends within a scale, or holds a token where it cannot stand.
        """
        sequences = to_int64("sequences", sequences)
        length = sequences.shape[-1]
        ends = [span.stop for span in self.spans]
        if length not in ends:
            raise ValueError(f"a sequence must end with a scale, at one of {ends} tokens, but has {length}.")
        scales = range(ends.index(length) + 1)
        for head, span in zip(self.heads[: len(scales)], self.spans, strict=False):
            self._check_tokens(sequences[..., head], head)
            self._check_tokens(sequences[..., span], span.start)
        grids = [sequences[..., self.spans[scale]].unflatten(-1, self.grids[scale]) for scale in scales]
        return grids, sequences[..., 0] - self.codebook_size

    def _check_tokens(self, tokens: torch.Tensor, position: int) -> None:
        allowed = self.allowed(position)
        if tokens.numel() and not allowed.start <= tokens.min() <= tokens.max() < allowed.stop:
            raise ValueError(
                f"from position {position}, tokens must be in [{allowed.start}, {allowed.stop}), but are in "
                f"[{tokens.min()}, {tokens.max()}]. Sample with `LayoutLogitsProcessor`."
            )


class LayoutLogitsProcessor(LogitsProcessor):
    """Allows, at each position, only the tokens that the layout allows there, so that every sample decodes.

    Args:
        layout ([`SequenceLayout`]): The layout of the sequences.

    Example:
        >>> prompt = torch.tensor([[layout.unconditional_token]])
        >>> processors = [LayoutLogitsProcessor(layout)]
        >>> sequences = model.generate(
        ...     prompt, logits_processor=processors, max_new_tokens=layout.length - 1, do_sample=True, top_k=0
        ... )
    """

    def __init__(self, layout: SequenceLayout):
        self.layout = layout

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sets the scores `(batch, vocab_size)` of all other tokens to minus infinity.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`): What the sequences hold so far.
            scores (`torch.Tensor` of shape `(batch, vocab_size)`): Logits of the next token.
        """
        allowed = self.layout.allowed(input_ids.shape[1])
        masked = torch.full_like(scores, -math.inf)
        masked[:, allowed.start : allowed.stop] = scores[:, allowed.start : allowed.stop]
        return masked


def to_int64(name: str, values: torch.Tensor) -> torch.Tensor:
    """Integers of any type as int64, of which all operations are there.

    Args:
        name (`str`): What the values are, for the error.
        values (`torch.Tensor`): Integers of any shape.

    Raises:
        TypeError: If it is something else.
    """
    found = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
    if found not in INTEGER_TYPES:
        raise TypeError(f"{name} must be tensors of integers, but are of type {found}. Give int64 tensors.")
    return values.long()


def _check_range(name: str, values: torch.Tensor, end: int, what: str) -> None:
    if values.numel() and not 0 <= values.min() <= values.max() < end:
        raise ValueError(f"{name} must be in [0, {end}), {what}, but are in [{values.min()}, {values.max()}].")
