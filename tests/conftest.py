import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

import pytest
import torch
from PIL import Image

from svqvae_hf import SVQVAE

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def make_tiny(**config) -> SVQVAE:
    torch.manual_seed(0)
    tiny = {
        "base_channels": 8,
        "encoder_ch_mult": (1, 2, 2),
        "decoder_ch_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "norm_num_groups": 2,
        "z_channels": 8,
        "codebook_size": 64,
        "codebook_embed_dim": 8,
    }
    return SVQVAE(**(tiny | config)).eval()


@pytest.fixture
def tiny_model() -> SVQVAE:
    return make_tiny()


@pytest.fixture
def small_sample(monkeypatch):
    """What tiles share comes from two windows, so that small images are cut into tiles, too."""
    monkeypatch.setattr("svqvae_hf.modeling_svqvae.SAMPLE_WINDOWS", 2)


@pytest.fixture
def golden_dir() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture
def photo() -> Image.Image:
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as image:
        return image.convert("RGB")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
