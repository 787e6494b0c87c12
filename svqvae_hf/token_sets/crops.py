"""Crops of an image that become rows of a token set."""

from PIL import Image, ImageOps

FLIPPED = "-flipped"
CROP_POSITIONS = {  # (x, y): 0 is left or top, 1 is right or bottom
    "centre": (0.5, 0.5),
    "top-left": (0.0, 0.0),
    "top-right": (1.0, 0.0),
    "bottom-left": (0.0, 1.0),
    "bottom-right": (1.0, 1.0),
}
CROPS = {  # names of the crops of an image, in the order of the rows
    "whole": ("whole",),
    "whole-flip": ("whole", f"whole{FLIPPED}"),
    "centre": ("centre",),
    "centre-flip": ("centre", f"centre{FLIPPED}"),
    "ten-crop": tuple(f"{position}{ending}" for position in CROP_POSITIONS for ending in ("", FLIPPED)),
}
TEN_CROP_MARGIN = 1.1  # side of the square that contains ten crops, over the side of a crop (LlamaGen's `crop_range`)


def is_whole(crops: object) -> bool:
    """Whether these crops are whole images."""
    return crops in ("whole", "whole-flip")


def make_crops(image: Image.Image, crops: str, resolution: int | None) -> list[Image.Image]:
    """Makes the crops of an image.

    Args:
        image (`PIL.Image.Image`): Image of any size.
        crops (`str`): A key of `CROPS`. `"centre"` resizes the shorter side to `resolution` (bicubic) and crops the
            centre. `"ten-crop"` resizes the centre square to 1.1 times `resolution` and crops the centre and the
            corners, each also flipped.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.

    Returns:
        `list[PIL.Image.Image]`: One crop per name in `CROPS[crops]`, all of one size.
    """
    if resolution is not None:
        side = round(TEN_CROP_MARGIN * resolution) if crops == "ten-crop" else resolution
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    made = []
    for name in CROPS[crops]:
        crop = image
        if resolution is not None:
            x, y = CROP_POSITIONS[name.removesuffix(FLIPPED)]
            left, top = round(x * (image.width - resolution)), round(y * (image.height - resolution))
            crop = image.crop((left, top, left + resolution, top + resolution))
        made.append(ImageOps.mirror(crop) if name.endswith(FLIPPED) else crop)
    return made
