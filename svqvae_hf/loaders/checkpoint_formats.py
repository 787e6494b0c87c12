"""The five families of original checkpoints: how their files are laid out, and what their shapes do not tell."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def rename(key: str, pairs: list[tuple[str, str]]) -> str:
    """Replaces the beginning of a key, by the first pair (old, new) that fits."""
    for old, new in pairs:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def count_numbers(keys: Iterable[Any], prefix: str) -> int:
    """How many different numbers follow `prefix` in the keys."""
    number = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return len({match[1] for key in keys if isinstance(key, str) and (match := number.match(key))})


@dataclass(frozen=True)
class Family:
    """Layout of the checkpoints of one code base, and what their shapes do not tell.

    Args:
        name (`str`): Short name.
        title (`str`): Name and origin, for people.
        container (`str`, *optional*): Key of the pickled dict that holds the weights. `None`: a safetensors file,
            which holds nothing else.
        levels (`str`): Prefix, up to the number, of the keys of an encoder level; tells the family, and f.
        beside (`frozenset[str]`): Keys of the pickled dict, one of which must be there as well.
        prefix (`str`): What stands before each key.
        names (`tuple[tuple[str, str], ...]`): Beginnings of keys, ours and the family's. `{level}` stands for each
            level, `{flipped}` for the same counted from the other end.
        training_keys (`tuple[str, ...]`): Beginnings of keys that only training needs; they are dropped.
        network_range (`tuple[float, float]`): Range of the images that the family trains on.
        codebook_l2_norm (`bool`): Whether latents and codes are on the unit sphere.
    """

    name: str
    title: str
    container: str | None
    levels: str
    beside: frozenset[str] = frozenset()
    prefix: str = ""
    names: tuple[tuple[str, str], ...] = ()
    training_keys: tuple[str, ...] = ("quantize.codebook_used",)  # a log of used ids, 65,536 floats
    network_range: tuple[float, float] = (0.0, 1.0)
    codebook_l2_norm: bool = True

    def holds(self, content: Mapping[str | None, Any]) -> bool:
        """Whether a file of this content is of this family."""
        weights = content.get(self.container)
        return (
            isinstance(weights, dict)
            and count_numbers(weights, self.levels) > 0
            and (not self.beside or bool(self.beside & content.keys()))
        )

    def original_name(self, key: str, num_levels: int) -> str:
        """What the family calls a parameter of ours."""
        return self.prefix + rename(key, self.name_pairs(num_levels))

    def name_pairs(self, num_levels: int) -> list[tuple[str, str]]:
        """`names`, one pair for each level."""
        return [
            (ours.format(level=level), theirs.format(level=level, flipped=num_levels - 1 - level))
            for ours, theirs in self.names
            for level in range(num_levels)
        ]


FAMILIES = (
    Family(
        name="svqvae",
        title="SVQVAE's layout (Open Model Initiative)",
        container=None,
        levels="encoder.conv_blocks.",
    ),
    Family(
        name="llamagen",
        title="LlamaGen",
        container="model",
        levels="encoder.conv_blocks.",
        beside=frozenset({"args", "ema", "optimizer"}),
        network_range=(-1.0, 1.0),
    ),
    Family(
        name="flexvar",
        title="FlexVAR, whose layout is also that of LlamaGen's files without training state",
        container="model",
        levels="encoder.conv_blocks.",
        network_range=(-1.0, 1.0),
    ),
    Family(
        name="lightning",
        title="multi-scale VQVAE trained with Lightning",
        container="state_dict",
        levels="vqvae.encoder.conv_blocks.",
        prefix="vqvae.",
        training_keys=("vqvae.quantize.codebook_used", "lpips_fn."),
    ),
    Family(
        name="taming",
        title="VQGAN of taming-transformers",
        container="state_dict",
        levels="encoder.down.",
        names=(
            ("encoder.conv_blocks.{level}.res.", "encoder.down.{level}.block."),
            ("encoder.conv_blocks.{level}.", "encoder.down.{level}."),
            ("encoder.mid.0.", "encoder.mid.block_1."),
            ("encoder.mid.1.", "encoder.mid.attn_1."),
            ("encoder.mid.2.", "encoder.mid.block_2."),
            ("decoder.mid.0.", "decoder.mid.block_1."),
            ("decoder.mid.1.", "decoder.mid.attn_1."),
            ("decoder.mid.2.", "decoder.mid.block_2."),
            ("decoder.conv_blocks.{level}.res.", "decoder.up.{flipped}.block."),
            ("decoder.conv_blocks.{level}.", "decoder.up.{flipped}."),
        ),
        training_keys=("loss.",),
        network_range=(-1.0, 1.0),
        codebook_l2_norm=False,
    ),
)
