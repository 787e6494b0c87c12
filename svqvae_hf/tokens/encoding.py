"""How images were encoded to ids: all that decoding needs besides the ids and the size of an image."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from svqvae_hf.models.checks import INTEGER_LIMIT, check_integers, check_scale_from, check_scales_differ
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.models.tiling import Tiles

FORMAT_VERSION = 1  # of token files and of the settings of token sets
FINGERPRINT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoding:
    """How images were encoded.

    Args:
        scales (`tuple[float, ...]`): Output side over input side, one per grid of ids, in their order. They differ
            within six digits, because they name the files of decoded images.
        f (`int`): Pixels per latent side of the model.
        tile_size (`int`, *optional*): Side in pixels of the tiles that images were encoded in; `None` without tiles.
        overlap (`int`, *optional*): Overlap of these tiles in pixels; `None` without tiles.
        codebook_size (`int`): Rows of the codebook.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the codebook.
        scale_from (`str`, defaults to `"latents"`): What was resized to the scales, see [`SVQVAE.forward`]. Files
            without it hold scales from the latents. Decoding is the same for both.

    Raises:
        ValueError: A value is out of range.
    """

    scales: tuple[float, ...]
    f: int
    tile_size: int | None
    overlap: int | None
    codebook_size: int
    codebook_fingerprint: str
    scale_from: str = "latents"

    def __post_init__(self) -> None:
        check_integers({"f": self.f, "codebook_size": self.codebook_size})
        has_tiles = self.tile_size is not None or self.overlap is not None
        if has_tiles:
            check_integers({"tile_size": self.tile_size})
            check_integers({"overlap": self.overlap}, least=0)
        check_scale_from(self.scale_from)
        if not FINGERPRINT.fullmatch(str(self.codebook_fingerprint)):
            raise ValueError(f"`codebook_fingerprint` must be 64 hex digits, got {self.codebook_fingerprint!r:.80}.")
        for scale in self.scales:
            is_number = isinstance(scale, int | float)
            if not is_number or not 0 < scale < INTEGER_LIMIT:
                raise ValueError(f"a scale must be a number above 0 and under 2**31, got {scale!r:.80}.")
        check_scales_differ(self.scales)

    def grid(self, scale: float, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of ids at a scale, for an image of `height` and `width` in pixels."""
        return grid_shape(height, width, self.f, scale)

    @property
    def tiles(self) -> Tiles | None:
        """Tile size and overlap in pixels; `None` without tiles."""
        if self.tile_size is None or self.overlap is None:
            return None
        return Tiles(self.tile_size, self.overlap)

    def to_record(self) -> dict[str, Any]:
        """Content of a JSON document that [`from_record`] reads: the format version, and all values except ids."""
        record: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for field in dataclasses.fields(self):
            if field.name != "ids":  # a field of ImageTokens, which stores it elsewhere
                record[field.name] = getattr(self, field.name)
        return record

    @classmethod
    def from_record(cls, record: Any, **further_values: Any) -> Self:
        """Reads the content of a JSON document.

        Args:
            record: Content.
            **further_values: Values that are stored elsewhere, such as the ids.

        Raises:
            ValueError: It has another version, lacks a value, or has one that is out of range. The message calls the
                document "it", because callers put the document's name before.
        """
        if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"it must have format version {FORMAT_VERSION}, got {record!r:.80}.")
        values = dict(further_values)
        missing_names = []
        for field in dataclasses.fields(cls):
            if field.name in further_values:
                continue
            if field.name in record:
                values[field.name] = record[field.name]
            elif field.default is dataclasses.MISSING:
                missing_names.append(field.name)
        if missing_names:
            raise ValueError(f"it must also have {', '.join(missing_names)}.")
        # JSON has lists in place of tuples.
        scales = values["scales"]
        if not isinstance(scales, list):
            raise ValueError(f"its scales must be a list, got {scales!r:.80}.")
        values["scales"] = tuple(scales)
        return cls(**values)


def encoding_of(model: SVQVAE, scales: Sequence[float], scale_from: str, tiles: Tiles | None = None) -> dict[str, Any]:
    """How a model encodes images, as arguments of [`Encoding`].

    Args:
        model ([`SVQVAE`]): The model.
        scales (`Sequence[float]`): Output side over input side of each grid of ids.
        scale_from (`str`): What the model resizes to the scales: `"image"`, or the `"latents"` of the image.
        tiles ([`Tiles`], *optional*): Tiles that images are encoded in. By default, the tiles that
            [`~SVQVAE.enable_tiling`] has set on the model, or none.
    """
    if tiles is None:
        tiles = model.tiles_of_call()  # called without arguments, it returns the tiles that are set on the model
    tile_size: int | None = None
    overlap: int | None = None
    if tiles is not None:
        tile_size, overlap = tiles
    return {
        "scales": tuple(float(scale) for scale in scales),
        "f": model.f,  # pixels of an image per latent, along a side
        "tile_size": tile_size,
        "overlap": overlap,
        "codebook_size": model.config["codebook_size"],
        "codebook_fingerprint": model.codebook_fingerprint(),
        "scale_from": scale_from,
    }
