"""The one way to bring an image to the size of its reconstruction, or back."""

from PIL import Image


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an image to `(width, height)`: by area if a side gets shorter, otherwise bicubic.

    Area resampling averages all pixels, so a smaller reference has no aliasing.
    """
    if image.size == size:
        return image
    shrinks = size[0] < image.width or size[1] < image.height
    return image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
