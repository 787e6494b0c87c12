"""Conversion between ids at one or several scales and one sequence for a causal language model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from svqvae_hf.models.checks import check_integers, check_scale_from
from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.pipelines.labels import to_int64


@dataclass(frozen=True)
class SequenceLayout:
    """Order of the tokens in the sequence of an image.

        class or unconditional, ids of scale 0, separator, ids of scale 1, separator, ids of scale 2, ...

    Scales go from coarse to fine, ids in raster order. Every prefix of whole scales is the sequence of a smaller
    image. With one scale this is LlamaGen's layout (arXiv 2406.06525).

    The vocabulary is the codebook, then the classes, then the unconditional token, then a separator per scale after
    the first. Separators come last so that scales can be added to a trained model.

    Args:
        codebook_size (`int`): Rows of the codebook.
        f (`int`): Pixels per latent side.
        height (`int`): Height of the images in pixels.
        width (`int`): Width of the images in pixels.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Output side over input side, in ascending order. Stored as a
            tuple.
        num_classes (`int`, defaults to 0): Number of classes. Labels are `0, ..., num_classes - 1`; the label
            `num_classes` means no class.
        scale_from (`str`, defaults to `"image"`): What was resized to the scales, see
            [`SVQVAE.encode_scales`]. It changes no token of the layout, but images must be encoded as in training.

    Raises:
        ValueError: A value is out of range, or the scales do not ascend.
    """

    codebook_size: int
    f: int
    height: int
    width: int
    scales: Sequence[float] = (1.0,)
    num_classes: int = 0
    scale_from: str = "image"

    def __post_init__(self) -> None:
        check_scale_from(self.scale_from)
        check_integers({name: getattr(self, name) for name in ("codebook_size", "f", "height", "width")})
        check_integers({"num_classes": self.num_classes}, least=0)
        scales = tuple(map(float, self.scales))  # a config stores a list
        bounds = (0.0, *scales, math.inf)
        if not scales or not all(low < high for low, high in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(
                f"`scales` must be above 0, finite and ascending, got {self.scales!r}. Pass a sorted list."
            )
        object.__setattr__(self, "scales", scales)

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the ids of each scale."""
        return tuple(grid_shape(self.height, self.width, self.f, scale) for scale in self.scales)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Positions of the ids of each scale in the sequence."""
        sizes = [rows * columns for rows, columns in self.grids]
        ends = accumulate(size + 1 for size in sizes)  # one token precedes each scale
        return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))

    @cached_property
    def marker_positions(self) -> tuple[int, ...]:
        """Positions of the token before the ids of each scale: the class, then the separators."""
        return tuple(span.start - 1 for span in self.spans)

    @property
    def length(self) -> int:
        """Number of tokens in a sequence, including the class."""
        return self.spans[-1].stop

    @property
    def vocab_size(self) -> int:
        """Number of different tokens: codes, classes, the unconditional token and separators."""
        return self.codebook_size + self.num_classes + len(self.scales)

    @property
    def unconditional_token(self) -> int:
        """Token for no class, `codebook_size + num_classes`."""
        return self.codebook_size + self.num_classes

    def allowed(self, position: int) -> range:
        """Tokens that are allowed at a position.

        Args:
            position (`int`): Position in `[0, length)`.

        Raises:
            ValueError: The position is out of range.
        """
        if not 0 <= position < self.length:
            raise ValueError(f"`position` must be in [0, {self.length}), the length of a sequence, got {position}.")
        if position not in self.marker_positions:
            return range(self.codebook_size)
        if position == 0:
            return range(self.codebook_size, self.unconditional_token + 1)
        separator = self.unconditional_token + self.marker_positions.index(position)
        return range(separator, separator + 1)

    def encode(
        self, ids: Sequence[torch.Tensor], labels: torch.Tensor | Sequence[int] | int | None = None
    ) -> torch.Tensor:
        """Joins the ids of an image, or of a batch of images, to sequences.

        Args:
            ids (`Sequence[torch.Tensor]`, each of shape `(h, w)` or `(batch, h, w)`, integers): One grid per scale, as
                `vqvae.encode_tokens(sample, scales)` returns them. Fewer grids than scales make a prefix.
            labels (`torch.Tensor` of shape `(batch,)`, `Sequence[int]` or `int`, *optional*): Labels in
                `[0, num_classes]`; no class by default.

        Returns:
            `torch.Tensor`: Tokens `(length,)` or `(batch, length)`, int64.

        Raises:
            TypeError: Ids or labels are not integers.
            ValueError: A grid has the wrong shape, or ids or labels are out of range.
        """
        if not 1 <= len(ids) <= len(self.scales):
            raise ValueError(f"`ids` must have one grid per scale of {list(self.scales)}, got {len(ids)}.")
        grids = [to_int64("ids", grid) for grid in ids]
        shape = grids[0].shape[:-2]
        labels = self.num_classes if labels is None else labels
        labels = to_int64("labels", torch.as_tensor(labels)).to(grids[0].device)
        if labels.shape not in (torch.Size(), shape):
            raise ValueError(f"`labels` must have shape {tuple(shape)}, one per image, got {tuple(labels.shape)}.")
        _check_range("labels", labels, self.num_classes + 1, "including `num_classes` for no class")
        parts = [(self.codebook_size + labels).expand(shape)[..., None]]
        for index, (grid, size) in enumerate(zip(grids, self.grids, strict=False)):
            if grid.shape != (*shape, *size):
                raise ValueError(
                    f"the ids of scale {self.scales[index]:g} must have shape {(*shape, *size)}, got "
                    f"{tuple(grid.shape)}. Encode images of {self.height} x {self.width} pixels (height x width)."
                )
            tokens = grid.flatten(-2)
            _check_range("ids", tokens, self.codebook_size, "`codebook_size`")
            if index:
                parts.append(tokens.new_full((*shape, 1), self.unconditional_token + index))
            parts.append(tokens)
        return torch.cat(parts, dim=-1)

    def decode(self, sequences: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Splits sequences into ids and labels, the inverse of `encode`.

        Args:
            sequences (`torch.Tensor` of shape `(length,)` or `(batch, length)`, integers): Complete sequences, or
                prefixes that end with a scale.

        Returns:
            `tuple[list[torch.Tensor], torch.Tensor]`: Grids of ids `(h, w)` or `(batch, h, w)`, one per scale in the
            sequence, and labels `()` or `(batch,)`, both int64.

        Raises:
            TypeError: The tokens are not integers.
            ValueError: A sequence ends within a scale, or a token is not allowed at its position.
        """
        sequences = to_int64("sequences", sequences)
        length = sequences.shape[-1]
        ends = [span.stop for span in self.spans]
        if length not in ends:
            raise ValueError(f"a sequence must end with a scale, after {ends} tokens, got {length}.")
        scales = range(ends.index(length) + 1)
        for marker, span in zip(self.marker_positions[: len(scales)], self.spans, strict=False):
            self._check_tokens(sequences[..., marker], marker)
            self._check_tokens(sequences[..., span], span.start)
        grids = [sequences[..., self.spans[scale]].unflatten(-1, self.grids[scale]) for scale in scales]
        return grids, sequences[..., 0] - self.codebook_size

    def _check_tokens(self, tokens: torch.Tensor, position: int) -> None:
        allowed = self.allowed(position)
        if tokens.numel() and not allowed.start <= tokens.min() <= tokens.max() < allowed.stop:
            raise ValueError(
                f"from position {position}, tokens must be in [{allowed.start}, {allowed.stop}), got "
                f"[{tokens.min()}, {tokens.max()}]."
            )


def _check_range(name: str, values: torch.Tensor, end: int, what: str) -> None:
    if values.numel() and not 0 <= values.min() <= values.max() < end:
        raise ValueError(f"`{name}` must be in [0, {end}), {what}, got [{values.min()}, {values.max()}].")
