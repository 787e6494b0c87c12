"""Baselines of blocks and of image files: what must hold for each."""

import numpy as np
import pytest
import torch
from block_baselines import KMeans, LinearDecoder, fit_block_baselines, read_fit_images, take_blocks

SIDE = 4
CPU = torch.device("cpu")


@pytest.fixture
def images(photo):
    """Two photographs of 96 x 64 pixels."""
    pixels = torch.from_numpy(np.array(photo)).movedim(-1, 0)
    return [pixels[:, 60:124, 100:196], pixels[:, 130:194, 200:296]]


def mean_squared_error(baseline, images):
    sample = torch.stack(images)
    return (baseline.reconstruct(sample) - sample).square().mean().item()


def test_kmeans_is_better_with_more_codes_and_than_random_blocks(images):
    blocks = take_blocks(images, SIDE)
    errors = [mean_squared_error(KMeans.fit(blocks, size), images) for size in (1, 8, 64)]
    assert errors[0] == pytest.approx(blocks.float().var(0, correction=0).mean().item(), rel=1e-4)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    draw = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:64]
    assert errors[2] < 0.8 * mean_squared_error(KMeans(blocks[draw].float()), images)


def test_linear_decoder_is_never_worse_on_the_images_of_its_fit(images):
    blocks = take_blocks(images, SIDE)
    for size in (8, 64):
        kmeans = KMeans.fit(blocks, size)
        for count in (1, 2):
            linear = LinearDecoder.from_kmeans(kmeans, images[:count])
            assert mean_squared_error(linear, images[:count]) < mean_squared_error(kmeans, images[:count])


def test_too_few_blocks(images):
    with pytest.raises(ValueError, match=r"at least as many blocks as codes, 1000, but .* have 768. Use more images"):
        fit_block_baselines(images, SIDE, size=1000)
    with pytest.raises(ValueError, match="have 0"):
        fit_block_baselines([], SIDE, size=1)


def test_centres_of_images_are_read_up_to_a_number_of_blocks(photo, tmp_path, monkeypatch):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, size in zip(paths, ((41, 30), (200, 100), (3, 200)), strict=True):
        photo.crop((100, 50, 100 + size[0], 50 + size[1])).save(path)
    whole = read_fit_images(paths, SIDE, CPU)
    assert [image.shape for image in whole] == [(3, 28, 40), (3, 100, 200)]  # no block fits into three pixels
    monkeypatch.setattr("block_baselines.MAX_BLOCKS", 3 * 60)
    small = read_fit_images(paths, SIDE, CPU)
    assert [image.shape for image in small] == [(3, 28, 32), (3, 28, 32)]
    assert torch.equal(small[0], whole[0][:, :, 4:36])
    paths[0].write_bytes(b"Dear diary")
    with pytest.raises(ValueError, match="is not a readable image"):
        read_fit_images(paths, SIDE, CPU)
