"""Converts image files and arrays to samples for the model, and samples back to images."""

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, Self, TypedDict, cast

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

from .checks import check_range
from .image_files import load_image, to_rgb

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
            kwargs: `pixel_range`, which replaces the value in the file, and `return_unused_kwargs`.

        Raises:
            TypeError: If another keyword is given.
            ValueError: If `pixel_range` is not as described.
        """
        if not kwargs.get("return_unused_kwargs"):
            _check_keywords(kwargs.keys() - {"pixel_range", "return_unused_kwargs"})
        known = {"pixel_range", *TRANSFORMERS_KEYS}
        return super().from_dict({key: value for key, value in image_processor_dict.items() if key in known}, **kwargs)

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
        items = images if isinstance(images, list | tuple) else [images]
        pixels = [_unit_pixels(item) for item in items]
        if not pixels:
            raise ValueError("`images` must hold at least one image, but is empty.")
        found = {(image.shape[-1], image.shape[-2]) for image in pixels}
        if len(found) > 1:
            raise ValueError(
                "the images of a batch must have one size, because padding would change their ids, got "
                f"{', '.join(f'{width} x {height}' for width, height in sorted(found))} (width x height). Process "
                "each size on its own, or crop them."
            )
        batch = torch.cat(pixels)
        sizes = [(batch.shape[-2], batch.shape[-1])] * len(batch)
        black, white = self.pixel_range
        features = BatchFeature({"pixel_values": black + batch * (white - black)}, tensor_type=return_tensors)
        features["image_sizes"] = sizes
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
            kind = sample.dtype if isinstance(sample, torch.Tensor) else type(sample).__name__
            raise TypeError(f"`sample` must be a floating-point tensor or array, got {kind}. Pass one of the scales.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be 'pil', 'np' or 'pt', got {output_type!r}.")
        if sample.ndim != 4 or sample.shape[1] != 3:
            raise ValueError(f"`sample` must have shape (batch, 3, height, width), got {tuple(sample.shape)}.")
        if image_sizes is not None and len(image_sizes) != len(sample):
            raise ValueError(f"`image_sizes` must hold one size per sample, got {len(image_sizes)} for {len(sample)}.")
        height, width = sample.shape[-2:]
        sizes = [(height, width)] * len(sample) if image_sizes is None else [*image_sizes]
        for size in sizes:
            sides = np.asarray(size)
            fits = sides.shape == (2,) and sides.dtype.kind in "iu" and (1 <= sides).all()
            if not (fits and (sides <= (height, width)).all()):
                raise ValueError(
                    f"`image_sizes` must hold integers (height, width) from 1 to the size of the sample, {height} x "
                    f"{width}, got {size!r}. Resize the decoded ids of another scale with `SVQVAE.resize_to_image`."
                )
        if sample.isnan().any():
            raise ValueError("`sample` must not contain NaN. Decode in float32 or bfloat16.")
        black, white = self.pixel_range
        unit = ((sample.detach().float() - black) / (white - black)).clamp(0, 1)
        images = [image[:, :h, :w] for image, (h, w) in zip(unit, sizes, strict=True)]
        agree = len({tuple(map(int, size)) for size in sizes}) == 1
        if output_type == "pt":
            return torch.stack(images) if agree else images
        arrays = [image.movedim(0, -1).cpu().numpy() for image in images]  # (height, width, 3)
        if output_type == "np":
            return np.stack(arrays) if agree else arrays
        return [Image.fromarray(np.rint(array * 255).astype(np.uint8)) for array in arrays]


def _check_keywords(unknown: set[str]) -> None:
    if unknown:
        raise TypeError(f"image processors take only `pixel_range`, got {', '.join(sorted(unknown))}. Leave it out.")


def _unit_pixels(image: ImageInput) -> torch.Tensor:
    """Converts one item of `preprocess` to float32 in [0, 1] of shape (batch, 3, height, width)."""
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, str | os.PathLike) or hasattr(image, "read"):
        image = load_image(cast(BinaryIO, image))
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray):
        _check_shape(image, "height, width, channels", channels=-1)
        pixels = _as_tensor(image)
        pixels = pixels.movedim(-1, -3) if pixels.ndim > 2 else pixels
    elif isinstance(image, torch.Tensor):
        _check_shape(image, "channels, height, width", channels=-3)
        pixels = image
    else:
        raise TypeError(
            "an image must be a PIL image, a NumPy array, a torch tensor, the path of a file, an open binary file or "
            f"its bytes, got {type(image).__name__}."
        )
    pixels = pixels if pixels.ndim > 2 else pixels[None]
    values = _to_unit_range(pixels)
    if values.shape[-3] == 4:  # put on white, 8-bit values with the rounding of Pillow
        colours, alpha = values.split([3, 1], dim=-3)
        blended = colours * alpha + (1 - alpha)
        values = (blended * 255).round() / 255 if pixels.dtype == torch.uint8 else blended
    return values.expand(*values.shape[:-3], 3, -1, -1).reshape(-1, 3, *values.shape[-2:])


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    # A copy, because torch needs it writable, contiguous and in the machine's byte order.
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _check_shape(image: np.ndarray | torch.Tensor, layout: str, channels: int) -> None:
    if not 2 <= image.ndim <= 4 or 0 in image.shape or (image.ndim > 2 and image.shape[channels] not in (1, 3, 4)):
        raise ValueError(
            f"{type(image).__name__} images must have shape (height, width), ({layout}) or (batch, {layout}), with 3 "
            f"channels (RGB), 4 (RGBA) or 1 (grey), got {tuple(image.shape)}."
        )


def _to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if pixels.dtype not in FLOAT_DTYPES:
        raise TypeError(f"an image must be uint8 in [0, 255] or floating point in [0, 1], got {pixels.dtype}.")
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):  # also when they are NaN
        raise ValueError(f"a float image must lie in [0, 1], got [{low:g}, {high:g}]. Scale it, or pass uint8.")
    return pixels.float()
