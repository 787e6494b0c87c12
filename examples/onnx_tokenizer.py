"""Encodes and decodes images with exported graphs, using only onnxruntime and NumPy. Pillow reads the files.

The graphs do not tile: attention takes 8 bytes per pair of ids. An image that does not fit is an error.

svqvae export MODEL --output graphs
python examples/onnx_tokenizer.py graphs photo.jpg back.png
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class OnnxTokenizer:
    """Images to ids and back.

    Args:
        folder (`str` or `Path`): Folder that `svqvae export` made, with `encoder.onnx` and `decoder.onnx`.
    """

    def __init__(self, folder: str | Path):
        providers = onnxruntime.get_available_providers()
        self.encoder = onnxruntime.InferenceSession(Path(folder, "encoder.onnx"), providers=providers)
        self.decoder = onnxruntime.InferenceSession(Path(folder, "decoder.onnx"), providers=providers)
        facts = self.encoder.get_modelmeta().custom_metadata_map
        self.black, self.white = json.loads(facts["pixel_range"])
        self.f = json.loads(facts["f"])

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Maps pixels `(height, width, 3)` in uint8 to ids `(ceil(height / f), ceil(width / f))` in int64."""
        self.check_memory(pixels)
        sample = self.black + pixels.astype(np.float32) / 255 * (self.white - self.black)
        sample = sample.transpose(2, 0, 1)[None]  # (1, 3, height, width)
        (ids,) = self.encoder.run(["ids"], {"sample": sample})
        return ids[0]

    def decode(self, ids: np.ndarray, height: int, width: int) -> np.ndarray:
        """Maps ids to pixels `(height, width, 3)` in uint8, cropped to the size of the image that was encoded."""
        (sample,) = self.decoder.run(["sample"], {"ids": ids[None]})  # (1, 3, rows * f, columns * f)
        unit = (sample[0] - self.black) / (self.white - self.black)
        pixels = np.rint(unit.clip(0, 1) * 255).astype(np.uint8)
        return pixels.transpose(1, 2, 0)[:height, :width]

    def check_memory(self, pixels: np.ndarray) -> None:
        """Raises ValueError for an image that is too large for the memory that is free, on Linux."""
        height, width = pixels.shape[:2]
        num_ids = height * width / self.f**2
        needed = 8 * num_ids**2
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > available:
            raise ValueError(f"The image takes {needed / 2**30:.0f} GiB, but {available / 2**30:.0f} GiB are free.")


def read_rgb(source: str | Path) -> np.ndarray:
    """Reads an 8-bit image file, upright and with transparent parts on white: `(height, width, 3)` in uint8."""
    with Image.open(source) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip these at 255
        raise ValueError(f"`{source}` must be an 8-bit image, got mode {image.mode}. Convert it first.")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def main(folder: str, source: str, target: str) -> None:
    """Encodes an image file, and writes the image that its ids decode to."""
    tokenizer = OnnxTokenizer(folder)
    pixels = read_rgb(source)
    ids = tokenizer.encode(pixels)
    height, width = pixels.shape[:2]
    decoded = tokenizer.decode(ids, height, width)
    Image.fromarray(decoded).save(target)
    print(f"{width} x {height} pixels, {ids.size} ids, the first {ids.flat[:8].tolist()}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Usage: python examples/onnx_tokenizer.py GRAPHS PHOTO OUTPUT")
    main(*sys.argv[1:])
