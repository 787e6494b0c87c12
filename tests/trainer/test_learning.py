"""A model trained from scratch is above k-means of blocks at the same bits, on photographs that neither has seen."""

import json
from functools import partial
from pathlib import Path

import pytest
import skimage.data
import torch
import train
import training_runs
from conftest import ROOT
from PIL import Image
from training_runs import logged

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.trainer.data.crops import centre_crops
from svqvae_hf.trainer.train_options import TrainOptions

PHOTOS = Path(skimage.data.__file__).parent
TRAINED, HELD_OUT = ("coffee.png", "rocket.jpg", "motorcycle_left.png"), ("astronaut.png", "chelsea.png")
SIDE = 64
# The bundled model's config at half the width, with blocks of 4 x 4 pixels and 64 codes: with f = 8 it needs minutes.
CONFIG = {"base_channels": 8, "encoder_ch_mult": [1, 2, 4], "decoder_ch_mult": [1, 2, 4], "codebook_size": 64}
OPTIONS = {
    **{"start": "linear", "resolution": SIDE, "per_device_train_batch_size": 8, "scales": [1.0]},
    **{"optimizer": "soap", "adam_beta1": 0.95, "max_steps": 40, "learning_rate": 3e-3, "warmup_steps": 4},
    **{"weight_decay": 0.0, "kmeans_steps": [1, 28], "kmeans_batches": 8, "use_ema": True, "ema_decay": 0.9},
    **{"validation_scales": [1.0], "num_validation_images": 100, "dataloader_num_workers": 0},
}

run = partial(training_runs.run, train.train, TrainOptions)


@pytest.fixture
def options(tmp_path):
    """Options of a new model on three photographs, validated on two others in pieces."""
    for name in ("trained", "held_out"):
        (tmp_path / name).mkdir()
    for name in TRAINED:  # as BMP, because each crop decodes its whole photograph
        with Image.open(PHOTOS / name) as photo:
            photo.convert("RGB").save(tmp_path / "trained" / f"{name}.bmp")
    for name in HELD_OUT:
        with Image.open(PHOTOS / name) as photo:
            for top in range(0, photo.height - SIDE + 1, SIDE):
                for left in range(0, photo.width - SIDE + 1, SIDE):
                    piece = photo.convert("RGB").crop((left, top, left + SIDE, top + SIDE))
                    piece.save(tmp_path / "held_out" / f"{name}-{top}-{left}.png")
    config = json.loads((ROOT / "training" / "configs" / "model_small.json").read_text()) | CONFIG
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = {"train_data_dir": f"{tmp_path}/trained", "validation_data_dir": [f"{tmp_path}/held_out"]}
    return OPTIONS | data | {"model_config_name_or_path": f"{tmp_path}/config.json", "output_dir": f"{tmp_path}/out"}


def blocks_of(images, count, side):
    """Blocks of 4 x 4 pixels as rows."""
    sample = centre_crops(open_images([images]), count, side, (0.0, 1.0)).sample
    return sample.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48)


def kmeans_psnr(options):
    trained = blocks_of(options["train_data_dir"], 3, 192)
    held_out = blocks_of(*options["validation_data_dir"], 100, SIDE)
    generator = torch.Generator().manual_seed(0)
    codes = trained[torch.randperm(len(trained), generator=generator)[: CONFIG["codebook_size"]]]
    for _ in range(20):
        nearest = torch.cdist(trained, codes).argmin(1)
        groups = [trained[nearest == code] for code in range(len(codes))]
        codes = torch.stack([group.mean(0) if len(group) else code for group, code in zip(groups, codes, strict=True)])
    decoded = codes[torch.cdist(held_out, codes).argmin(1)]
    return psnr(decoded.view(-1, 1, 256, 48), held_out.view(-1, 1, 256, 48), data_range=1.0).mean().item()


@pytest.mark.slow  # only training can show it
def test_a_few_seconds_of_training_beat_kmeans_of_blocks(options, caplog):
    run(**options)
    assert logged(caplog, "validation/psnr@1")[40] > kmeans_psnr(options) + 0.3
