"""The formats of original checkpoints, as data: how weights are named, and config values that shapes do not show."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def count_numbers(keys: Iterable[Any], prefix: str) -> int:
    """Counts the different numbers that follow `prefix` in the keys."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = set()
    for key in keys:
        if not isinstance(key, str):  # pickles may have keys of any type
            continue
        match = pattern.match(key)
        if match is not None:
            numbers.add(match[1])
    return len(numbers)


@dataclass(frozen=True)
class CheckpointFormat:
    """Layout of the checkpoint files of one code base, and the config values that shapes do not show.

    Args:
        name (`str`): Short name.
        title (`str`): Name and origin, for people.
        container (`str`, *optional*): Key of the pickled dict that holds the weights. `None` for a safetensors file,
            which holds nothing else.
        level_prefix (`str`): Beginning of the keys of an encoder level, up to its number. It tells the format, and
            the number of levels tells f.
        prefix (`str`): Text before every key.
        renames (`tuple[tuple[str, str], ...]`): Beginnings of keys, first in this library, then in the format. The
            first that fits is replaced. `{level}` stands for each level, `{flipped}` for its number from the end.
        training_keys (`tuple[str, ...]`): Beginnings of keys that only training or other networks need. They are
            dropped.
        network_range (`tuple[float, float]`): Range of the training images.
        codebook_l2_norm (`bool`): Whether latents and codes lie on the unit sphere.
    """

    name: str
    title: str
    container: str | None
    level_prefix: str
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    training_keys: tuple[str, ...] = ("quantize.codebook_used",)  # 65,536 floats that log which ids were used
    network_range: tuple[float, float] = (0.0, 1.0)
    codebook_l2_norm: bool = True

    def matches(self, content: Mapping[str | None, Any]) -> bool:
        """Whether a file with this content has this format."""
        weights = content.get(self.container)
        return isinstance(weights, dict) and count_numbers(weights, self.level_prefix) > 0

    def to_original(self, key: str, num_levels: int) -> str:
        """Name in the file of a parameter of this library; the same but for the prefix if no rename fits.

        With 5 levels, for example, the rename from `decoder.conv_blocks.{level}.res.` to `decoder.up.{flipped}.block.`
        turns `decoder.conv_blocks.0.res.1.conv1.weight` into `decoder.up.4.block.1.conv1.weight`.
        """
        for our_pattern, original_pattern in self.renames:
            for level in range(num_levels):
                our_start = our_pattern.format(level=level)
                if key.startswith(our_start):
                    level_from_end = num_levels - 1 - level
                    original_start = original_pattern.format(level=level, flipped=level_from_end)
                    return self.prefix + original_start + key.removeprefix(our_start)
        return self.prefix + key


# Names of VQGANs, which FlexVAR and LlamaGen changed.
VQGAN_NAMES = (
    ("encoder.conv_blocks.{level}.res.", "encoder.down.{level}.block."),
    ("encoder.conv_blocks.{level}.", "encoder.down.{level}."),
    ("encoder.mid.0.", "encoder.mid.block_1."),
    ("encoder.mid.1.", "encoder.mid.attn_1."),
    ("encoder.mid.2.", "encoder.mid.block_2."),
    ("decoder.mid.0.", "decoder.mid.block_1."),
    ("decoder.mid.1.", "decoder.mid.attn_1."),
    ("decoder.mid.2.", "decoder.mid.block_2."),
)
JANUS_NAMES = (
    *VQGAN_NAMES,
    ("decoder.conv_blocks.{level}.res.", "decoder.up.{level}.block."),
    ("decoder.conv_blocks.{level}.", "decoder.up.{level}."),
)

CHECKPOINT_FORMATS = (
    CheckpointFormat(
        "svqvae", title="SVQVAE's layout (Open Model Initiative)", container=None, level_prefix="encoder.conv_blocks."
    ),
    CheckpointFormat(
        "llamagen",
        title="LlamaGen, or FlexVAR, which looks the same",
        container="model",
        level_prefix="encoder.conv_blocks.",
        network_range=(-1.0, 1.0),
    ),
    CheckpointFormat(
        "lightning",
        title="multi-scale VQVAE trained with Lightning",
        container="state_dict",
        level_prefix="vqvae.encoder.conv_blocks.",
        prefix="vqvae.",
        training_keys=("vqvae.quantize.codebook_used", "lpips_fn."),
    ),
    CheckpointFormat(
        "taming",
        title="VQGAN of taming-transformers",
        container="state_dict",
        level_prefix="encoder.down.",
        renames=(
            *VQGAN_NAMES,
            ("decoder.conv_blocks.{level}.res.", "decoder.up.{flipped}.block."),
            ("decoder.conv_blocks.{level}.", "decoder.up.{flipped}."),
        ),
        training_keys=("loss.",),
        network_range=(-1.0, 1.0),
        codebook_l2_norm=False,
    ),
    CheckpointFormat(
        "janus-vqvae",
        title="JanusVQVAE of transformers",
        container=None,
        level_prefix="encoder.down.",
        renames=JANUS_NAMES,
        network_range=(-1.0, 1.0),
    ),
    CheckpointFormat(
        "janus",
        title="JanusVQVAE of transformers, within Janus",
        container=None,
        level_prefix="model.vqmodel.encoder.down.",
        prefix="model.vqmodel.",
        renames=JANUS_NAMES,
        training_keys=("lm_head.", "model.language_", "model.vision_", "model.aligner.", "model.generation_"),
        network_range=(-1.0, 1.0),
    ),
)
