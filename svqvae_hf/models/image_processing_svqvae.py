"""Converts image files and arrays to samples for the model, and samples back to images."""

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, Self, TypedDict, cast

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from .checks import check_choice, check_range, type_name
from .image_files import load_image, to_rgb

OUTPUT_TYPES = ("pil", "np", "pt")
INTEGER_KINDS = ("i", "u")  # NumPy's kinds of signed and unsigned integers
CHANNELS = (1, 3, 4)  # grey, RGB and RGBA
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Keys that transformers writes to the configs of its processors.
TRANSFORMERS_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
ImageInput = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | BinaryIO | bytes


class SVQVAEImageProcessorKwargs(TypedDict, total=False):
    """Arguments of `SVQVAEImageProcessor.from_pretrained`."""

    pixel_range: tuple[float, float]


class SVQVAEImageProcessor(BaseImageProcessor):
    """Prepares images for the model and converts samples back: value range, layout and cropping.

    An 8-bit image comes back exactly as it went in. The dtype alone says what a value means: integers are 8-bit values
    in [0, 255], floats are in [0, 1]. Nothing is guessed from the values.

    Args:
        pixel_range (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Values of black and white in `pixel_values`, as
            in the model's `config["pixel_range"]`.

    Raises:
        TypeError: If another keyword is given.
        ValueError: If `pixel_range` is not two finite numbers, the lower one first.

    Example:
        >>> processor = SVQVAEImageProcessor(pixel_range=(-1.0, 1.0))
        >>> batch = processor(["first.jpg", "second.png"])  # of one size
        >>> images = processor.postprocess(batch["pixel_values"], batch["image_sizes"])
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = SVQVAEImageProcessorKwargs

    def __init__(self, pixel_range: tuple[float, float] = (0.0, 1.0), **kwargs: Any) -> None:
        _check_keywords(kwargs.keys() - TRANSFORMERS_KEYS)
        super().__init__(**kwargs)
        check_range("pixel_range", pixel_range)
        self.pixel_range = tuple(pixel_range)

    @classmethod
    def from_model(cls, model: Any) -> Self:
        """Makes the processor of a model, with its `pixel_range`.

        Args:
            model ([`SVQVAE`]): Model to prepare images for.
        """
        return cls(pixel_range=model.config["pixel_range"])

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Creates a processor from the content of a file and keywords.

        Args:
            image_processor_dict (`dict[str, Any]`): Content of `preprocessor_config.json`. Only `pixel_range` is used.
            kwargs: `pixel_range`, which replaces the value in the file, and arguments of transformers' method.

        Raises:
            ValueError: If `pixel_range` is not as described.
        """
        known_keys = TRANSFORMERS_KEYS | {"pixel_range"}
        config = {key: value for key, value in image_processor_dict.items() if key in known_keys}
        return super().from_dict(config, **kwargs)

    def preprocess(
        self, images: ImageInput | list[ImageInput] | tuple[ImageInput, ...], return_tensors: str | None = None
    ) -> BatchFeature:
        """Converts images of any kind to one batch.

        Args:
            images: One image of any size, or a list of images of one size, which may mix kinds: Pillow images, files
                (paths, open binary files or their bytes), NumPy arrays and torch tensors. Arrays have shape `(height,
                width)`, `(height, width, channels)` or `(batch, height, width, channels)`. Tensors have shape
                `(height, width)`, `(channels, height, width)` or `(batch, channels, height, width)`. Both have 3
                channels (RGB), 4 (RGBA, put on white) or 1 (grey), as uint8 in [0, 255] or floating point in [0, 1].
            return_tensors (`str`, *optional*): `"np"` for NumPy arrays, by default `"pt"`.

        Returns:
            `BatchFeature`: `pixel_values`, float32 of shape `(batch, 3, height, width)` in `pixel_range`, and
            `image_sizes`, one `(height, width)` per image.

        Raises:
            OSError: If a file cannot be opened.
            TypeError: If an image is of another type or dtype.
            ValueError: If there is no image, a file is unreadable, a shape is wrong, sizes differ, or floats lie
                outside [0, 1].
        """
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("`images` must hold at least one image, but is empty.")
        pixels_of_images = [_unit_pixels(image) for image in images]
        _check_one_size(pixels_of_images)
        unit_batch = torch.cat(pixels_of_images)  # (batch, 3, height, width) in [0, 1]
        black, white = self.pixel_range
        pixel_values = black + unit_batch * (white - black)
        features = BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        height, width = unit_batch.shape[-2:]
        features["image_sizes"] = [(height, width)] * len(unit_batch)
        return features

    def postprocess(
        self,
        sample: torch.Tensor | np.ndarray,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Converts a batch of samples to images, cropped to their sizes.

        Args:
            sample (`torch.Tensor` or `np.ndarray` of shape `(batch, 3, height, width)`): Samples in `pixel_range`.
                Values outside are clamped.
            image_sizes (sequence of `(height, width)`, *optional*): Size of each image, as `preprocess` returns them.
                By default nothing is cropped.
            output_type (`str`, defaults to `"pil"`): `"pil"` for 8-bit RGB images, `"np"` for a float32 array
                `(batch, height, width, 3)` in [0, 1], `"pt"` for a float32 tensor `(batch, 3, height, width)` in
                [0, 1].

        Returns:
            `list` of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`: One image per sample. If `image_sizes`
            differ, arrays and tensors are lists too.

        Raises:
            TypeError: If `sample` is of another type.
            ValueError: If `sample`, `image_sizes` or `output_type` is not as described.
        """
        if isinstance(sample, np.ndarray):
            sample = _as_tensor(sample)
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            raise TypeError(
                f"`sample` must be a floating-point tensor or array, got {type_name(sample)}. Pass one of the scales."
            )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if sample.ndim != 4 or sample.shape[1] != 3:
            raise ValueError(f"`sample` must have shape (batch, 3, height, width), got {tuple(sample.shape)}.")
        sizes = _sizes_of_images(sample, image_sizes)
        if sample.isnan().any():
            raise ValueError("`sample` must not contain NaN. Decode in float32 or bfloat16.")
        black, white = self.pixel_range
        unit_batch = ((sample.detach().float() - black) / (white - black)).clamp(0, 1)  # in [0, 1]
        images = []
        for image, (height, width) in zip(unit_batch, sizes, strict=True):
            images.append(image[:, :height, :width])  # (3, height, width)
        has_one_size = len(set(sizes)) == 1
        if output_type == "pt":
            return torch.stack(images) if has_one_size else images
        arrays = [_as_array(image) for image in images]
        if output_type == "np":
            return np.stack(arrays) if has_one_size else arrays
        return [_as_pillow(array) for array in arrays]


def _as_array(image: torch.Tensor) -> np.ndarray:
    """Converts an image `(3, height, width)` to an array `(height, width, 3)`."""
    return image.movedim(0, -1).cpu().numpy()


def _as_pillow(array: np.ndarray) -> Image.Image:
    """Converts an array `(height, width, 3)` in [0, 1] to an 8-bit RGB image."""
    rounded = np.rint(array * 255)
    return Image.fromarray(rounded.astype(np.uint8))


def _sizes_of_images(sample: torch.Tensor, image_sizes: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """Height and width of each image in a batch of samples, by default the height and width of the batch.

    Raises:
        ValueError: There are not as many sizes as samples, or a size does not fit the batch.
    """
    height, width = sample.shape[-2:]
    if image_sizes is None:
        return [(height, width)] * len(sample)
    if len(image_sizes) != len(sample):
        raise ValueError(f"`image_sizes` must hold one size per sample, got {len(image_sizes)} for {len(sample)}.")
    sizes = []
    for size in image_sizes:
        sides = np.asarray(size)
        is_pair_of_integers = sides.shape == (2,) and sides.dtype.kind in INTEGER_KINDS
        # Sides that are no pair of integers cannot be compared with the sample.
        fits_sample = is_pair_of_integers and 1 <= sides[0] <= height and 1 <= sides[1] <= width
        if not fits_sample:
            raise ValueError(
                f"`image_sizes` must hold integers (height, width) from 1 to the size of the sample, {height} x "
                f"{width}, got {size!r}. Resize the decoded ids of another scale with `SVQVAE.resize_to_image`."
            )
        sizes.append((int(sides[0]), int(sides[1])))
    return sizes


def _check_one_size(pixels: list[torch.Tensor]) -> None:
    """Raises ValueError if images `(batch, 3, height, width)` differ in height or width."""
    sizes = set()
    for image in pixels:
        height, width = image.shape[-2:]
        sizes.add((width, height))
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(
            f"the images of a batch must have one size, because padding would change their ids, got {listed} (width "
            "x height). Process each size on its own, or crop them."
        )


def _check_keywords(unknown: set[str]) -> None:
    """Raises TypeError if there are unknown keywords."""
    if unknown:
        raise TypeError(f"image processors take only `pixel_range`, got {', '.join(sorted(unknown))}. Leave it out.")


def _unit_pixels(image: ImageInput) -> torch.Tensor:
    """Converts one item of `preprocess` to float32 in [0, 1] of shape (batch, 3, height, width)."""
    pixels = _read_pixels(image)
    has_8_bits = pixels.dtype == torch.uint8
    if pixels.ndim == 2:  # (height, width)
        pixels = pixels.unsqueeze(0)  # (1, height, width)
    if pixels.ndim == 3:  # (channels, height, width)
        pixels = pixels.unsqueeze(0)  # (1, channels, height, width)
    batch = _to_unit_range(pixels)
    channels = batch.shape[1]
    if channels == 1:  # grey
        return batch.expand(-1, 3, -1, -1)
    if channels == 4:  # RGBA
        return _put_on_white(batch, has_8_bits=has_8_bits)
    return batch


def _read_pixels(image: ImageInput) -> torch.Tensor:
    """Reads one item of `preprocess`, without changing its values.

    Returns:
        `torch.Tensor`: `(height, width)`, `(channels, height, width)` or `(batch, channels, height, width)`.
    """
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, str | os.PathLike) or hasattr(image, "read"):
        image = load_image(cast(BinaryIO, image))
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray):
        _check_shape(image, "height, width, channels", channel_axis=-1)
        pixels = _as_tensor(image)
        if pixels.ndim == 2:
            return pixels
        return pixels.movedim(-1, -3)  # (..., channels, height, width)
    if isinstance(image, torch.Tensor):
        _check_shape(image, "channels, height, width", channel_axis=-3)
        return image
    raise TypeError(
        "an image must be a PIL image, a NumPy array, a torch tensor, the path of a file, an open binary file or "
        f"its bytes, got {type(image).__name__}."
    )


def _put_on_white(rgba: torch.Tensor, *, has_8_bits: bool) -> torch.Tensor:
    """Blends RGBA values `(batch, 4, height, width)` in [0, 1] over white. Rounds 8-bit values, as Pillow does."""
    rgb, opacity = rgba.split([3, 1], dim=1)
    blended = rgb * opacity + (1 - opacity)  # (batch, 3, height, width); white is 1
    if has_8_bits:
        return (blended * 255).round() / 255
    return blended


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """Copies an array to a tensor."""
    # PyTorch needs memory that is writable, contiguous and in the byte order of the machine.
    copied = np.array(array, array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(copied)


def _check_shape(image: np.ndarray | torch.Tensor, layout: str, channel_axis: int) -> None:
    """Raises ValueError unless an image has two axes, or the layout of an image or batch with 1, 3 or 4 channels."""
    is_plane = image.ndim == 2  # (height, width)
    has_channels = image.ndim in (3, 4) and image.shape[channel_axis] in CHANNELS
    is_empty = 0 in image.shape
    if is_empty or not (is_plane or has_channels):
        raise ValueError(
            f"{type(image).__name__} images must have shape (height, width), ({layout}) or (batch, {layout}), with 3 "
            f"channels (RGB), 4 (RGBA) or 1 (grey), got {tuple(image.shape)}."
        )


def _to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Converts pixels of any shape to float32 in [0, 1]. Raises for other types, and for floats outside [0, 1]."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if pixels.dtype not in FLOAT_DTYPES:
        raise TypeError(f"an image must be uint8 in [0, 255] or floating point in [0, 1], got {pixels.dtype}.")
    lowest = pixels.min().item()
    highest = pixels.max().item()
    is_in_range = lowest >= 0 and highest <= 1  # False for NaN
    if not is_in_range:
        raise ValueError(f"a float image must lie in [0, 1], got [{lowest:g}, {highest:g}]. Scale it, or pass uint8.")
    return pixels.float()
