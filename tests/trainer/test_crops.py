import numpy as np
import pytest
import torch
from numbered_images import BROKEN, KINDS, NUM_IMAGES, crop_loader, open_set, policy
from PIL import Image

from svqvae_hf.trainer.data.crops import centre_crops


@pytest.fixture
def ramp(tmp_path):
    """A folder with one image, in which each pixel has its own colour."""
    (tmp_path / "ramp").mkdir()
    values = np.arange(48 * 60).reshape(48, 60)
    image = np.stack([values // 256, values % 256, 0 * values], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "ramp" / "ramp.png")
    return open_set(tmp_path / "ramp")


def test_crops_are_cut_at_random_positions(ramp):
    tops = set()
    lefts = set()
    flips = set()
    for batch in crop_loader(ramp, policy(random_flip=True), (400,), 1):
        red, green, _ = (batch.sample * 255).round().long().unbind(1)
        for crop in red * 256 + green:
            (step_down,) = np.unique(np.diff(crop.numpy(), axis=0))
            (step_right,) = np.unique(np.diff(crop.numpy(), axis=1))
            assert step_down == 60
            flips.add(int(step_right))
            top, left = divmod(crop.min().item(), 60)
            tops.add(top)
            lefts.add(left)
    assert flips == {1, -1}
    assert tops == set(range(48 - 16 + 1))
    assert lefts == set(range(60 - 16 + 1))


def test_images_are_resized_within_the_range(tmp_path):
    gradient = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (160, 200, 3))
    (tmp_path / "set").mkdir()
    Image.fromarray(gradient).save(tmp_path / "set" / "gradient.png")
    wide = policy(sides=(64,), resize_range=(0.5, 2))
    (batch,) = crop_loader(open_set(tmp_path / "set"), wide, (100,), 1)
    middle = batch.sample[:, 0, 32, 2:-2] * 255  # the filter is one-sided at the border of the image
    factors = (middle.shape[1] - 1) / (middle[:, -1] - middle[:, 0])
    assert 0.48 < factors.min() < 0.6
    assert 1.8 < factors.max() < 2.1


@pytest.mark.parametrize("size", [(20, 100), (3, 5), (1, 1), (16, 16), (17, 31)])
@pytest.mark.parametrize("resize_range", [(1.0, 1.0), (0.1, 0.9)])
def test_small_images_are_enlarged_until_they_hold_the_crop(tmp_path, size, resize_range):
    (tmp_path / "set").mkdir()
    Image.new("RGB", size, "white").save(tmp_path / "set" / "small.png")
    images = open_set(tmp_path / "set")
    for batch in crop_loader(images, policy(sides=(32,), resize_range=resize_range), num_steps=5):
        assert torch.equal(batch.sample, torch.ones(2, 3, 32, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_centre_crops_skip_unreadable_images(sets, kind):
    crops = centre_crops(open_set(sets[kind, "broken"]), 9, 16, (0, 1)).sample
    assert (crops[:, 0, 0, 0] * 255).round().int().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    all_crops = centre_crops(open_set(sets[kind, "broken"]), 99, 8, (0, 1))
    assert len(all_crops.sample) == NUM_IMAGES - len(BROKEN)
    assert len(all_crops.skipped) == len(BROKEN)
