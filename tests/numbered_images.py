"""Image sets of numbered images, and loaders of their crops."""

import io
import tarfile

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.trainer.data.crop_batches import CropCutter
from svqvae_hf.trainer.data.crop_loader import CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.sample_order import Share

SHARDS, SHARD_SIZE = 4, 6
NUM_IMAGES = SHARDS * SHARD_SIZE
BROKEN = {7: b"", 12: b"no image"}
STREAMS = ("webdataset", "parquet")
KINDS = ("folder", *STREAMS)


def encode(image, kind="png", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def numbered(number):
    """An image whose red is its number, and whose green and blue are row and column."""
    rows, columns = np.mgrid[:20, :24]
    return Image.fromarray(np.stack([0 * rows + number, rows * 10, columns * 10], -1).astype(np.uint8))


def numbers(batch):
    """Numbers of the images from which crops were cut."""
    return (batch.sample[:, 0, 0, 0] * 255).round().int().tolist()


def write_tar(path, members, mode="w"):
    """Writes a tar file of named contents."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_set(folder, kind, contents):
    """Encoded images as a folder, as tar shards or as Parquet shards."""
    folder.mkdir()
    for shard in range(0, len(contents), SHARD_SIZE):
        members = list(enumerate(contents))[shard : shard + SHARD_SIZE]
        if kind == "folder":
            for number, content in members:
                (folder / f"{number:03d}.png").write_bytes(content)
        elif kind == "webdataset":
            write_tar(folder / f"{shard:03d}.tar", [(f"{number:03d}.png", content) for number, content in members])
        else:
            rows = [{"bytes": content, "path": f"{number:03d}.png"} for number, content in members]
            Dataset.from_dict({"png": rows}).to_parquet(folder / f"{shard:03d}.parquet", batch_size=4)


def open_set(folder):
    return open_images([str(folder)], copy=True)


def write_sets(root):
    """Writes the sets of the fixture `sets` below a folder."""
    whole = [encode(numbered(number)) for number in range(NUM_IMAGES)]
    for kind in KINDS:
        write_set(root / f"{kind}-whole", kind, whole)
        write_set(root / f"{kind}-broken", kind, [BROKEN.get(i, content) for i, content in enumerate(whole)])
    return {(kind, state): root / f"{kind}-{state}" for kind in KINDS for state in ("whole", "broken")}


def policy(**options):
    plain = {"sides": (16,), "center_crop": False, "random_flip": False, "resize_range": (1.0, 1.0)}
    return CropPolicy(**(plain | options))


def crop_loader(images, crop_policy=None, share=(2,), num_steps=12, seed=0, label=None, mixture=(), **options):
    """A loader of crops, in this process by default. `share`: batch size, batches per step, process, processes."""
    cutter = CropCutter(crop_policy or policy(), (0, 1), Share(*share), num_steps, seed, label, *mixture)
    return CropLoader(images, cutter, **({"num_workers": 0} | options))


def assert_equal(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.sample, other.sample)
        assert batch.skipped == other.skipped
