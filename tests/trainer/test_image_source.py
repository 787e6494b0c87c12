import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.options import ImageOptions

pytestmark = pytest.mark.usefixtures("one_accelerator")


@pytest.fixture
def folder(tmp_path):
    """57 images, and three files that are not."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(57):
        Image.new("RGB", (40, 40), (4 * index, 0, 0)).save(folder / f"{index:02}.jpg")
    whole = (folder / "00.jpg").read_bytes()
    broken = {"truncated.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"no image"}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    return folder


def make_source(folder, **options):
    options = {"train_data_dir": str(folder), "resolution": 32, "train_batch_size": 10} | options
    return ImageSource(ImageOptions("out", **options, dataloader_num_workers=0), Accelerator(cpu=True), (0.0, 1.0))


def test_unreadable_files_are_skipped_and_named_once(folder, caplog):
    source = make_source(folder)
    for batch in source.loader([32], 30, seed=0):
        assert source.to_device(batch).shape == (10, 3, 32, 32)
    for name in ("truncated.jpg", "empty.jpg", "text.jpg"):
        assert caplog.text.count(f"Skipped `{name}`: the image ") == 1
    assert caplog.text.count("Skipped") == 3


def test_fresh_crops_are_other_crops_than_those_of_the_run(folder):
    source = make_source(folder)
    (fresh,) = source.fresh_crops([32], 1)
    (again,) = source.fresh_crops([32], 1)
    (later,) = source.fresh_crops([32], 1, step=3)
    (batch,) = source.loader([32], 1, seed=0)
    assert torch.equal(fresh, again)
    assert not torch.equal(fresh, later)
    assert not torch.equal(fresh, batch.sample)
