"""Fixtures. Imports of torch are in functions, because the process that starts the others reads this file, too."""

import gc
import importlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # no test depends on what an earlier run has cached

import numpy as np
import pytest
import tifffile
from PIL import Image

if TYPE_CHECKING:
    from svqvae_hf import SVQVAE

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
SCREENSHOTS = ROOT / "outputs" / "screenshots"
SLOWEST = "test_docs.py"  # runs the commands of the README


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, the slowest before all, so that all processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != SLOWEST, item.path not in slow))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Imports all tests without garbage collection, and lets no later one visit the objects that libraries made."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def skip_or_fail(reason: str) -> None:
    """Skips a test, but fails it in CI, which runs all tests."""
    if os.environ.get("SVQVAE_TESTS") == "all":
        pytest.fail(reason)
    pytest.skip(reason)


def require_package(name: str) -> None:
    """Skips a test whose package is not installed, but fails it in CI."""
    if importlib.util.find_spec(name) is None:
        skip_or_fail(f"The package {name} is missing. Run `make EXTRA=ci install`.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    require_package("playwright")
    import demo_pictures

    if demo_pictures.find_browser() is None:
        skip_or_fail(f"none of {', '.join(demo_pictures.BROWSERS)} is installed. Run `make browser`.")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with demo_pictures.open_browser() as opened:
        yield opened


class Lazy:
    """A module that is imported at its first use, because each process collects all tests and runs a part of them."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks for marks
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


def make_tiny(**config) -> "SVQVAE":
    import torch

    from svqvae_hf import SVQVAE

    torch.manual_seed(0)
    tiny = {"base_channels": 8, "encoder_ch_mult": (1, 2, 2), "decoder_ch_mult": (1, 2, 2), "num_res_blocks": 1}
    tiny |= {"norm_num_groups": 2, "z_channels": 8, "codebook_size": 64, "codebook_embed_dim": 8}
    return SVQVAE(**(tiny | config)).eval()


@pytest.fixture
def tiny_model() -> "SVQVAE":
    return make_tiny()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> str:
    """Folder of a tiny model, f = 4. Read-only."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def two_images(tmp_path, photo) -> Path:
    """Folder of `a.png`, 57 x 35 pixels, `b.jpg`, 40 x 24 pixels, and a text file."""
    folder = tmp_path / "two_images"
    folder.mkdir()
    photo.crop((100, 100, 157, 135)).save(folder / "a.png")
    photo.crop((200, 100, 240, 124)).save(folder / "b.jpg", quality=95)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """Path of a folder that does not exist yet."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Folders of numbered images as each kind of set, `whole` and with `broken` ones among them."""
    from numbered_images import write_sets

    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def few_windows(monkeypatch):
    """Limits the sample that tiles share to two windows, which takes less time."""
    monkeypatch.setattr("svqvae_hf.models.tiling.CONTEXT_WINDOWS", 2)


@pytest.fixture(autouse=True)
def process():
    """Restores the signal handlers, log levels and progress bars that a command sets for its process."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub", "transformers")]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    levels = [logger.level for logger in loggers]
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for logger, level in zip(loggers, levels, strict=True):
        if logger.level != level:  # setting it takes longer, because it clears what all loggers remember
            logger.setLevel(level)
    import diffusers
    import transformers

    for bars in (diffusers.utils.logging, transformers.utils.logging):
        bars.enable_progress_bar()


@pytest.fixture(autouse=True)
def one_accelerator():
    """Lets each run set up accelerate anew, and leaves the log as it was."""
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`, and no Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def golden_dir() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture
def photo() -> Image.Image:
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as image:
        return image.convert("RGB")


@pytest.fixture
def no_grad():
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def disk(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def save_tiff(path: Path, pixels: np.ndarray, **options) -> Path:
    """Writes a TIFF, RGB unless `photometric` is given, and returns its path."""
    tifffile.imwrite(path, pixels, **({"photometric": "rgb", "tile": (16, 32)} | options))
    return path


def fill(disk: Path) -> None:
    """Leaves one page of the disk."""
    with (disk / "ballast").open("wb") as file:
        free = shutil.disk_usage(disk).free
        file.write(bytes(max(0, free - 4096)))


def psnr(output, target):
    import torch.nn.functional as F

    return -10 * F.mse_loss(output.float(), target.float()).log10().item()


def smooth_images(*size, batch=1):
    """Images with content at many scales, which a random network answers more evenly than noise."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(1)
    return F.interpolate(torch.rand(batch, 3, 9, 9), size, mode="bicubic").clamp(0, 1)


def gradients_with_checkpointing(make, loss):
    """Gradients of a new model, which checkpointing must not change, and the number of blocks that it recomputes."""
    import torch

    gradients, recomputed = [], []

    def checkpoint_and_count(block, *args):
        recomputed.append(block)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.enable_gradient_checkpointing(checkpoint_and_count)
        loss(model).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(*gradients)
    return gradients[0], len(recomputed)


def offload(model, kind, folder):
    """To disk, because weights offloaded from CPU to CPU never move, and a wrong read of them would pass."""
    import accelerate
    import torch

    if kind == "sequential":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        disk = {"num_blocks_per_group": 1, "offload_to_disk_path": str(folder)}
        model.enable_group_offload(torch.device("cpu"), offload_type=kind, **disk)


@pytest.fixture
def encoder_inputs(tiny_model, monkeypatch):
    """Shapes of all that the encoder is given."""
    shapes = []
    tiny_model.encoder.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes
