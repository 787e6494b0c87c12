"""A tiny token set with captions."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from cli_runner import svqvae
from PIL import Image
from tiny_language_models import extended

CAPTIONS = ["a pear", "a cat", "a red key", "a sailboat"]


@cache
def captioned_tokens(folder: Path) -> Path:
    """A token set of 4 captioned images of 16 x 16 pixels, of the codebook of the extended language models."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "caption": caption}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(rows))
    vqvae = extended("qwen") / "vqvae"
    crops = ["--crops", "centre", "--resolution", 16]
    assert svqvae("tokenize", folder / "images", "--output", folder / "tokens", "--model", vqvae, *crops) == 0
    return folder / "tokens"
