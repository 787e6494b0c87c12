"""Converts image files and arrays to samples for the model, samples back to images, and resizes both."""

import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, BatchFeature

# diffusers loads a pipeline's component only if the base class that it knows is a name of the component's module.
from transformers import ImageProcessingMixin as ImageProcessingMixin

from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.hub.standalone import with_code
from svqvae_hf.models.checks import check_range
from svqvae_hf.untrusted.images import opened_image

if TYPE_CHECKING:
    from svqvae_hf.models.modeling_svqvae import SVQVAE

# Supported formats by Pillow's names, with their file suffixes. JPEG includes MPO.
IMAGE_FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Keys that transformers writes to the configs of its processors.
TRANSFORMERS_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}
ImageInput = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | BinaryIO | bytes


def load_image(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Reads an image file as 8-bit RGB. A file with several frames or pages yields the first.

    Args:
        file (`str`, `os.PathLike` or binary file object): Path or open file (`io.BytesIO(encoded)` for bytes in
            memory) in one of `IMAGE_FORMATS`. The content decides, not the name. Pillow's other formats raise an
            error, because some of them start another program. So do run-length encoded BMPs, because a few bytes can
            decode to any size.

    Returns:
        `PIL.Image.Image`: The image, converted by [`to_rgb`].

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is not an image, is broken or truncated, has values outside the range of its mode, or has
            more pixels than Pillow allows: twice `PIL.Image.MAX_IMAGE_PIXELS`, by default 179 million.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return _decode(opened, f"`{os.fspath(file)}`")
    return _decode(file, "the image")


def _decode(file: BinaryIO, name: str) -> Image.Image:
    with opened_image(file, name, tuple(IMAGE_FORMATS)) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _convert(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, upright and with transparent parts on white.

    Args:
        image (`PIL.Image.Image`): Image of any mode. Its EXIF orientation is applied. Integer modes (`"I"`, `"I;16"`,
            ...) are read as 16-bit grey in [0, 65535], and `"F"` as grey in [0, 1].

    Returns:
        `PIL.Image.Image`: Image of mode `"RGB"`.

    Raises:
        ValueError: If a 16-bit or float image has values outside its range.
    """
    image = ImageOps.exif_transpose(image)  # a copy
    return image if image.mode == "RGB" and not image.has_transparency_data else _convert(image)


def _convert(image: Image.Image) -> Image.Image:
    """Converts an upright image to RGB, without the metadata of its file."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_to_8_bit(image)
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.info = {}
    return image


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scales grey to 8 bits, where Pillow's own conversion of these modes clips at 255."""
    values, top = np.asarray(image), 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()  # NaN if any value is
    if not (low >= 0 and high <= top):
        raise ValueError(
            f"an image of mode {image.mode!r} must have values in [0, {top}], got [{low}, {high}]. Scale them to that "
            "range."
        )
    grey = np.rint(values * (255 / top))
    if "transparency" in image.info:  # the one grey value that a 16-bit PNG may declare transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))


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

    save_pretrained = with_code(BaseImageProcessor.save_pretrained)

    @classmethod
    def from_model(cls, model: "SVQVAE") -> Self:
        """Makes the processor of a model, with its `pixel_range`.

        Args:
            model ([`SVQVAE`]): Model to prepare images for.
        """
        return cls(pixel_range=model.config["pixel_range"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a processor from the folder or Hub repository of a model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Further arguments of transformers' method, and `pixel_range`, which replaces the stored one.

        Raises:
            OSError: If the config does not exist, or the Hub does not answer and the cache has no complete copy.
        """
        return from_hub(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

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
        options = {"pixel_range", "return_unused_kwargs"}
        if not kwargs.get("return_unused_kwargs"):
            _check_keywords(kwargs.keys() - options)
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
        if not isinstance(sample, torch.Tensor):
            raise TypeError(
                f"`sample` must be a tensor or array, got {type(sample).__name__}. Pass the output's `.sample`, one "
                "scale at a time."
            )
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be 'pil', 'np' or 'pt', got {output_type!r}.")
        if sample.ndim != 4 or sample.shape[1] != 3:
            raise ValueError(f"`sample` must have shape (batch, 3, height, width), got {tuple(sample.shape)}.")
        if image_sizes is not None and len(image_sizes) != len(sample):
            raise ValueError(
                f"`image_sizes` must hold one (height, width) per sample, got {len(image_sizes)} for {len(sample)}."
            )
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
        raise TypeError(
            f"an image processor takes only `pixel_range`, got {', '.join(sorted(unknown))}. Leave it out."
        )


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
    if values.shape[-3] == 4:
        values = _on_white(values, is_8_bit=pixels.dtype == torch.uint8)
    return values.expand(*values.shape[:-3], 3, -1, -1).reshape(-1, 3, *values.shape[-2:])


def _on_white(rgba: torch.Tensor, is_8_bit: bool) -> torch.Tensor:
    """Puts RGBA in [0, 1] of shape (..., 4, height, width) on white, 8-bit values with the rounding of Pillow."""
    colours, alpha = rgba.split([3, 1], dim=-3)
    blended = colours * alpha + (1 - alpha)
    return (blended * 255).round() / 255 if is_8_bit else blended


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
        raise ValueError(
            f"a floating-point image must have values in [0, 1], got [{low:g}, {high:g}]. Scale or clip it, or "
            "pass uint8."
        )
    return pixels.float()


def pad_to_multiple(sample: torch.Tensor, f: int) -> torch.Tensor:
    """Pads both sides to multiples of `f`, at the bottom and right, by repeating the last row and column."""
    bottom, right = (-side % f for side in sample.shape[-2:])
    if not torch.compiler.is_compiling() and bottom == right == 0:  # a graph pads images of any size alike
        return sample
    return F.pad(sample, (0, right, 0, bottom), mode="replicate")


def resize_sample(sample: torch.Tensor, scale: float, f: int) -> torch.Tensor:
    """Resizes images to a scale, so that their latents have the same grid as [`resize_latents`] returns.

    Images are padded as in [`SVQVAE.encode`], then resized to whole latents: bicubic with antialiasing, or by area at
    scales up to 0.25. On Kodak images bicubic was 0.16 dB better at 0.75, and both were equal at 0.25 and 0.1. At very
    small scales PyTorch's bicubic kernel for CUDA needs too much shared memory.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images of any size and range.
        scale (`float`): Above 0.
        f (`int`): Pixels per latent side.

    Returns:
        `torch.Tensor`: Images `(batch, channels, f * max(1, round(scale * h)), f * max(1, round(scale * w)))`, where
        `h = ceil(height / f)` and `w = ceil(width / f)`. Bicubic overshoot is not clamped.
    """
    padded = pad_to_multiple(sample, f)
    size = [max(1, round(scale * (side // f))) * f for side in padded.shape[-2:]]
    return resize(padded, size, "area" if scale <= 0.25 else "bicubic", antialias=scale > 0.25)


def resize_latents(latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Resizes latents to a scale, by area below 1 and bilinearly above.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, h, w)`): Latents before quantisation.
        scale (`float`): Above 0.

    Returns:
        `torch.Tensor`: Latents `(batch, channels, max(1, round(scale * h)), max(1, round(scale * w)))`.
    """
    size = [max(1, round(scale * side)) for side in latents.shape[-2:]]
    return resize(latents, size, "area" if scale < 1 else "bilinear")


def grid_shape(height: int, width: int, f: int, scale: float) -> tuple[int, int]:
    """Rows and columns of ids of an image at a scale.

    Args:
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        f (`int`): Pixels per latent side of the model.
        scale (`float`): Output side over input side, more than 0.
    """
    rows, columns = (max(1, round(scale * math.ceil(side / f))) for side in (height, width))
    return rows, columns


def resize(values: torch.Tensor, size: Sequence[int], mode: str, antialias: bool = False) -> torch.Tensor:
    """Resizes `(batch, channels, h, w)` in float32. Apple's GPUs cannot do it by area, so there the CPU does."""
    if list(values.shape[-2:]) == list(size):
        return values
    device = torch.device("cpu") if mode == "area" and values.device.type == "mps" else values.device
    return F.interpolate(values.to(device, torch.float32), list(size), mode=mode, antialias=antialias).to(values)


def map_range(values: torch.Tensor, source: Sequence[float], target: Sequence[float]) -> torch.Tensor:
    """Maps values linearly from the range `source` (low, high) to `target` (low, high), without clamping."""
    if list(source) == list(target):
        return values
    gain = (target[1] - target[0]) / (source[1] - source[0])
    return values * gain + (target[0] - source[0] * gain)
