"""Baselines that code blocks of pixels by k-means, alone and with a linear decoder, fitted on images.

A block has f x f pixels, as an id has, and k-means has as many codes as the codebook, so it takes the model's bits.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from svqvae_hf.data.image_rows import read_image
from svqvae_hf.models.quantizer import Codebook

MAX_BLOCKS = 1 << 20  # at most, that k-means is fitted on: more of them gain more than more iterations
ITERATIONS = 4
SEARCH_DIM = 32  # leading components by which blocks find their codes while k-means is fitted: 99 % of the variance
REGRESSION_BLOCKS = 1 << 18  # at most, that a linear map is fitted on
RIDGE = 1e-3  # relative to the mean square of the inputs
BLOCKS_AT_ONCE = 1 << 16


class KMeans:
    """Replaces each block by the nearest of `size` codes.

    Args:
        codes (`torch.Tensor` of shape `(size, 3 * f * f)`): Codes, in values from 0 to 255.
    """

    title = "k-means of blocks"

    def __init__(self, codes: torch.Tensor):
        self.f = math.isqrt(codes.shape[1] // 3)
        self.codes = codes
        self.mean = codes.mean(0)  # distances between values around 0 lose less to rounding
        self.codebook = _codebook(codes - self.mean)

    @classmethod
    @torch.inference_mode()
    def fit(cls, blocks: torch.Tensor, size: int) -> "KMeans":
        """Fits the codes by a few iterations of Lloyd from random blocks; a code without blocks restarts at one.

        Args:
            blocks (`torch.Tensor` of shape `(n, 3 * side * side)`): Blocks, from [`take_blocks`].
            size (`int`): Number of codes.

        Raises:
            ValueError: If there are fewer blocks than codes.
        """
        if len(blocks) < size:
            raise ValueError(
                f"k-means of blocks needs at least as many blocks as codes, {size}, but the images to fit it on have "
                f"{len(blocks)}. Use more images."
            )
        generator = torch.Generator().manual_seed(0)

        def draw() -> torch.Tensor:
            return blocks[torch.randperm(len(blocks), generator=generator)[:size].to(blocks.device)].float()

        mean, components = principal_components(blocks, min(SEARCH_DIM, blocks.shape[1]))
        codes = draw()
        for _ in range(ITERATIONS):
            search = _codebook((codes - mean) @ components)
            sums, counts = torch.zeros_like(codes), torch.zeros_like(codes[:, :1])
            for part in blocks.split(BLOCKS_AT_ONCE):
                vectors = part.float()
                ids = search((vectors - mean) @ components)
                sums.index_add_(0, ids, vectors)
                counts += torch.bincount(ids, minlength=size).unsqueeze(-1)
            codes = torch.where(counts > 0, sums / counts.clamp(min=1), draw())
        return cls(codes)

    @torch.inference_mode()
    def reconstruct(self, sample: torch.Tensor) -> torch.Tensor:
        """Codes and decodes images of any size, `(batch, 3, height, width)` in the values of the codes, to float32.

        An incomplete block repeats its last row and column. The result is neither clamped nor rounded.
        """
        height, width = sample.shape[-2:]
        padded = F.pad(sample.float(), (0, -width % self.f, 0, -height % self.f), mode="replicate")
        ids = self.nearest_ids(F.pixel_unshuffle(padded, self.f))
        return F.pixel_shuffle(self.blocks(ids), self.f)[..., :height, :width]

    def nearest_ids(self, blocks: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, h, w)` of blocks `(batch, 3 * f * f, h, w)`."""
        flat = blocks.movedim(1, -1)
        return self.codebook((flat - self.mean).flatten(0, -2)).view(flat.shape[:-1])

    def blocks(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes `(batch, 3 * f * f, h, w)` of ids."""
        return self.codes[ids].movedim(-1, 1)


class LinearDecoder(KMeans):
    """Decodes a block from its code and its eight neighbours, by a linear map.

    Args:
        kmeans ([`KMeans`]): The codes.
        weight (`torch.Tensor` of shape `(dim, dim, 3, 3)`): Map from 3 x 3 codes to what their middle one lacks.
    """

    title = "k-means with a linear 3 x 3 decoder"

    def __init__(self, kmeans: KMeans, weight: torch.Tensor):
        super().__init__(kmeans.codes)
        self.weight = weight

    @classmethod
    @torch.inference_mode()
    def from_kmeans(cls, kmeans: KMeans, images: Iterable[torch.Tensor]) -> "LinearDecoder":
        """Fits the map by ridge regression. On these images, its squared error is never larger than without it.

        Args:
            kmeans ([`KMeans`]): The codes.
            images (`Iterable[torch.Tensor]`): Images `(3, height, width)`, sides multiples of `f`.
        """
        dim = kmeans.codes.shape[1]
        products, targets = (torch.zeros(9 * dim, n, dtype=torch.float64) for n in (9 * dim, dim))  # on the CPU
        for image in images:
            blocks = F.pixel_unshuffle(image[None].float(), kmeans.f)
            coded = kmeans.blocks(kmeans.nearest_ids(blocks))
            inputs = F.unfold(_padded(coded - kmeans.mean[:, None, None]), 3)[0]  # (9 * dim, h * w)
            products += (inputs @ inputs.T).cpu()
            targets += (inputs @ (blocks - coded).flatten(2)[0].T).cpu()
        products.diagonal().add_(RIDGE * products.diagonal().mean())
        weight = torch.linalg.solve(products, targets).T.float().reshape(dim, dim, 3, 3)
        return cls(kmeans, weight.to(kmeans.codes.device))

    def blocks(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes of ids, each with the correction that its neighbourhood predicts."""
        coded = super().blocks(ids)
        return coded + F.conv2d(_padded(coded - self.mean[:, None, None]), self.weight)


def fit_block_baselines(images: Sequence[torch.Tensor], side: int, size: int) -> list[KMeans]:
    """Fits both baselines of blocks.

    Args:
        images (`Sequence[torch.Tensor]`): Images `(3, height, width)` on one device, from [`read_fit_images`].
        side (`int`): Side of a block in pixels, f of the model.
        size (`int`): Number of codes of k-means, the size of the codebook.

    Raises:
        ValueError: If there are fewer blocks than codes.
    """
    blocks = take_blocks(images, side)
    kmeans = KMeans.fit(blocks, size)
    every = math.ceil(len(blocks) / REGRESSION_BLOCKS)
    return [kmeans, LinearDecoder.from_kmeans(kmeans, images[::every])]


def read_fit_images(paths: Sequence[Path], side: int, device: torch.device) -> list[torch.Tensor]:
    """Reads images to fit baselines on: their centres, so large that all together have at most `MAX_BLOCKS` blocks.

    Args:
        paths (`Sequence[Path]`): Image files.
        side (`int`): Side of a block in pixels. Sides are cut to multiples of it, so a smaller image has no block.
        device (`torch.device`): Device of the images.

    Returns:
        `list[torch.Tensor]`: Images `(3, height, width)` in uint8.

    Raises:
        ValueError: If a file is not a readable image.
    """
    per_image = max(1, MAX_BLOCKS // len(paths))
    images = []
    for path in paths:
        pixels = torch.from_numpy(np.array(read_image(path))).movedim(-1, 0)
        rows = min(pixels.shape[1] // side, math.isqrt(per_image))
        columns = min(pixels.shape[2] // side, per_image // max(1, rows))
        top, left = (pixels.shape[1] - rows * side) // 2, (pixels.shape[2] - columns * side) // 2
        if rows and columns:
            images.append(pixels[:, top : top + rows * side, left : left + columns * side].to(device))
    return images


def take_blocks(images: Iterable[torch.Tensor], side: int) -> torch.Tensor:
    """Cuts images `(3, height, width)`, whose sides are multiples of `side`, into blocks `(n, 3 * side * side)`."""
    parts = [F.pixel_unshuffle(image, side).flatten(1).T for image in images]
    return torch.cat(parts) if parts else torch.empty(0, 3 * side * side)


def principal_components(blocks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(dim,)` of blocks `(n, dim)`, and their leading principal components as columns `(dim, count)`."""
    vectors = blocks[:: math.ceil(len(blocks) / REGRESSION_BLOCKS)].float()
    mean = vectors.mean(0)
    components = torch.linalg.eigh((vectors - mean).T.cov().cpu()).eigenvectors  # Apple's GPUs cannot
    return mean, components.flip(-1)[:, :count].to(mean.device)


def _codebook(codes: torch.Tensor) -> Codebook:
    size, dim = codes.shape
    codebook = Codebook(size, dim, l2_norm=False)
    codebook.weight = torch.nn.Parameter(codes, requires_grad=False)
    return codebook


def _padded(blocks: torch.Tensor) -> torch.Tensor:
    return F.pad(blocks, (1, 1, 1, 1), mode="replicate")
