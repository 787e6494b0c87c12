"""Reference batches of published evaluations: statistics of a large set of images, and some of its images.

`VIRTUAL_imagenet256_labeled.npz` and the others of guided-diffusion have these arrays:

    mu, sigma       mean (2048) and covariance (2048, 2048) of Inception's features of all images
    mu_s, sigma_s   the same of spatial features, which are not used here
    arr_0           10,000 of the images in uint8 (n, side, side, 3)

Source: arXiv 2105.05233; github.com/openai/guided-diffusion, evaluations/.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGES = "arr_0.npy"  # member of the archive


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Args:
        mean (`np.ndarray` of shape `(dim,)`): Mean in float64.
        covariance (`np.ndarray` of shape `(dim, dim)`): Covariance in float64.
    """

    mean: np.ndarray
    covariance: np.ndarray


class ReferenceBatch:
    """A reference batch in a file. Iterating yields its images, read one by one.

    Args:
        path (`Path`): `.npz` file.

    Attributes:
        side (`int`): Side of the images in pixels.
        statistics ([`FeatureStatistics`]): Statistics of Inception's features of the whole set.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a reference batch, or is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                mean = _read_array(archive, "mu.npy")
                covariance = _read_array(archive, "sigma.npy")
                with archive.open(IMAGES) as file:
                    shape, dtype = _read_header(file)
        except (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`{path}` must be a reference batch with the arrays mu, sigma and arr_0, but is another file or "
                f"damaged: {error}."
            ) from error
        has_matching_shapes = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        if not has_matching_shapes:
            raise ValueError(f"`{path}`: sigma must be the covariance of mu, got {covariance.shape} and {mean.shape}.")
        if dtype != np.uint8 or not _is_shape_of_squares(shape):
            raise ValueError(f"`{path}`: arr_0 must be square images in uint8, got {dtype} of shape {shape}.")
        self.num_images, self.side, _, _ = shape
        self.statistics = FeatureStatistics(mean, covariance)

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[Image.Image]:
        bytes_per_image = self.side * self.side * 3
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES) as file:
            _read_header(file)
            for _ in range(self.num_images):
                content = file.read(bytes_per_image)
                if len(content) < bytes_per_image:
                    raise ValueError(f"`{self.path}` is cut short.")
                pixels = np.frombuffer(content, np.uint8).reshape(self.side, self.side, 3)
                yield Image.fromarray(pixels)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers in float64."""
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)


def _is_shape_of_squares(shape: tuple[int, ...]) -> bool:
    """Whether a shape is `(n, side, side, 3)`, without zeros."""
    if len(shape) != 4 or 0 in shape:
        return False
    _, height, width, channels = shape
    return height == width and channels == 3


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in C order. Reads `file` up to the first value of the array."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if is_fortran:
        raise ValueError("arr_0 must be in C order")
    return shape, dtype
