import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "training"))

from codebook import initialise_codebook
from data import Crop, CropDataset, CropSampler, load_images
from losses import Objective
from train import TrainConfig, find_checkpoint, parameter_groups, step_scales

from svqvae_hf import SVQVAE
from svqvae_hf.modeling_svqvae import VectorQuantizer


@pytest.fixture
def image_folder(tmp_path, photo):
    """Photographs of unlike sizes and kinds; one smaller than a crop."""
    folder = tmp_path / "images"
    folder.mkdir()
    photo.save(folder / "colour.png")
    photo.convert("L").resize((90, 70)).save(folder / "grey.jpg")
    photo.crop((0, 0, 20, 300)).save(folder / "narrow.png")
    photo.convert("RGBA").resize((64, 64)).save(folder / "alpha.png")
    return folder


def launch(image_folder, output_dir, *options, processes=1):
    config = output_dir.parent / "model.json"
    tiny = {key: value for key, value in make_tiny(dropout_p=0.1).config.items() if not key.startswith("_")}
    config.write_text(json.dumps({**tiny, "_class_name": "SVQVAE"}))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"),
        *(str(ROOT / "training" / "train.py"), f"--train_data_dir={image_folder}", f"--output_dir={output_dir}"),
        *(f"--model_config_name_or_path={config}", "--resolution=32", "--crop_sizes=16", "--train_batch_size=4"),
        *("--num_scales=2", "--lr_warmup_steps=2", "--dataloader_num_workers=1", "--logging_steps=1"),
        *("--kmeans_batches=2", *options),
    ]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(output_dir.parent / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def test_resumed_run_equals_an_unbroken_one_and_its_model_loads(image_folder, tmp_path):
    options = (
        "--max_train_steps=6",
        "--checkpointing_steps=2",
        "--kmeans_steps=3",
        "--checkpoints_total_limit=2",
    )
    launch(image_folder, tmp_path / "whole", *options)
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    model = SVQVAE.from_pretrained(tmp_path / "whole")
    assert model.config["sample_size"] == 32
    assert model(torch.rand(1, 3, 40, 40)).sample.isfinite().all()

    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    resumed = launch(image_folder, tmp_path / "broken", "--resume_from_checkpoint=latest", *options)
    assert "Resumed from" in resumed.stderr
    weights, expected = (
        load_file(tmp_path / run / "diffusion_pytorch_model.safetensors") for run in ("broken", "whole")
    )
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    untrained = make_tiny().state_dict()
    kept = {key for key, tensor in expected.items() if torch.equal(tensor, untrained[key])}
    assert all(key.endswith(".k.bias") for key in kept), "softmax hides a shift of all keys, and nothing else"


def test_two_processes_train_one_model(image_folder, tmp_path):
    run = launch(image_folder, tmp_path / "out", "--max_train_steps=4", "--kmeans_steps=2", processes=2)
    assert "[RANK 0] step 4" in run.stderr
    assert SVQVAE.from_pretrained(tmp_path / "out").config["sample_size"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop_sizes=24"], "`--crop_sizes` must divide `--resolution` = 32, but 24 does not"),
        (["--max_train_steps=0"], "`--max_train_steps` must be at least 1, but is 0"),
        (["--kmeans_steps=7", "--kmeans_batches=2"], "16384, but `--kmeans_batches` = 2 give 256 in each process"),
        (["--resume_from_checkpoint=nowhere"], "or 'latest', but is 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(image_folder, tmp_path, options, message):
    run = subprocess.run(
        [
            *(sys.executable, str(ROOT / "training" / "train.py"), f"--train_data_dir={image_folder}"),
            *(
                f"--output_dir={tmp_path / 'out'}",
                f"--model_config_name_or_path={ROOT / 'training' / 'runs' / 'default_config.json'}",
            ),
            *("--resolution=32", *options),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert message in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_sources_and_columns_are_checked(image_folder):
    with pytest.raises(ValueError, match="Exactly one of `--dataset_name` and `--train_data_dir`"):
        load_images(None, None, None, "image")
    with pytest.raises(ValueError, match=r"must be one of \['image'\], but is 'picture'"):
        load_images(None, None, str(image_folder), "picture")
    with pytest.raises(ValueError, match="Exactly one of `--model_config_name_or_path`"):
        TrainConfig(output_dir="out")


def test_broken_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    dataset = CropDataset(load_images(None, None, str(tmp_path), "image"), pixel_range=(0, 1))
    with pytest.raises(ValueError, match="row 0 of the image set cannot be read as an image"):
        dataset[Crop(0, 16, seed=0)]


def test_latest_checkpoint_is_the_newest_whole_one(tmp_path):
    config = TrainConfig(str(tmp_path), model_config_name_or_path="x", resume_from_checkpoint="latest")
    assert find_checkpoint(config) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.partial"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(config).name == "checkpoint-10"
    config.resume_from_checkpoint = "checkpoint-9"
    assert find_checkpoint(config) == tmp_path / "checkpoint-9"


# Data


def sampler(**options):
    return CropSampler(**({"num_rows": 10, "sides": [64, 32, 16], "batch_size": 2, "num_batches": 30} | options))


def test_sampler_resumes_anywhere():
    batches = list(sampler())
    assert list(sampler(first_batch=13)) == batches[13:]
    assert len(sampler(first_batch=13)) == 17
    assert list(sampler(seed=1)) != batches


def test_batches_have_one_side_and_equal_pixels():
    for batch in sampler():
        (side,) = {crop.side for crop in batch}
        assert len(batch) * side**2 == 2 * 64**2


def test_processes_share_the_batch_and_never_a_row_of_a_pass():
    joined = list(sampler(sides=[64], batch_size=1, num_rows=12, num_batches=6, num_processes=2))
    first, second = (
        [
            crop
            for batch in sampler(
                sides=[64], batch_size=1, num_rows=12, num_batches=6, num_processes=2, process_index=i
            )
            for crop in batch
        ]
        for i in range(2)
    )
    assert sorted(crop.row for crop in first + second) == list(range(12))
    assert len({crop.seed for crop in first + second}) == 12
    assert joined[0][0] == first[0]


def test_every_row_is_seen_as_often():
    rows = [crop.row for batch in sampler(sides=[64], num_batches=25) for crop in batch]
    assert np.bincount(rows).tolist() == [5] * 10


def test_crops_are_reproducible_of_every_kind_and_in_range(image_folder):
    images = load_images(None, None, str(image_folder), "image")
    assert len(images) == 4
    dataset = CropDataset(images, pixel_range=(-1, 1))
    for row in range(4):
        crop = dataset[Crop(row, 32, seed=5)]
        assert crop.shape == (3, 32, 32)
        assert -1 <= crop.min() < 0 < crop.max() <= 1
        assert torch.equal(crop, dataset[Crop(row, 32, seed=5)])
        assert any(not torch.equal(crop, dataset[Crop(row, 32, seed=seed)]) for seed in range(3))


def test_crop_is_cut_from_the_image(tmp_path):
    ramp = np.arange(48 * 60).reshape(48, 60)
    Image.fromarray(np.stack([ramp // 256, ramp % 256, 0 * ramp], -1).astype(np.uint8)).save(tmp_path / "ramp.png")
    dataset = CropDataset(load_images(None, None, str(tmp_path), "image"), pixel_range=(0, 1))
    flipped = []
    for seed in range(8):
        red, green, _ = (dataset[Crop(0, 16, seed)] * 255).round().long()
        places = red * 256 + green
        steps = {tuple(np.unique(np.diff(places.numpy(), axis=axis))) for axis in (0, 1)}
        assert steps in ({(60,), (1,)}, {(60,), (-1,)})
        flipped.append((-1,) in steps)
    assert len(set(flipped)) == 2


# Losses


@pytest.mark.parametrize("quantize", [False, True])
def test_loss_is_the_mean_over_the_pixels_of_all_scales(quantize):
    model = make_tiny(pixel_range=(-1, 1)).train()
    sample = torch.rand(2, 3, 32, 32) * 2 - 1
    loss, logs = Objective(model, vq_loss_weight=0.5)(sample, [0.25, 1.0], quantize)
    expected = []
    latents = model.encode(sample).latents
    for side in (2, 8):
        scaled = F.adaptive_avg_pool2d(latents, side)
        quantized, losses, _ = model.quantize(scaled)
        decoded = model.decode(quantized if quantize else F.normalize(scaled, dim=1), force_not_quantize=True).sample
        mse = (decoded - F.adaptive_avg_pool2d(sample, side * 4)).square().mean() / 4
        expected.append((mse + 0.5 * (losses.vq + losses.commit) * quantize) * side**2 / (2**2 + 8**2))
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    assert logs["psnr"].item() == pytest.approx(-10 * mse.log10().item(), rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and parameter.grad.isfinite().all()
        assert reached == (quantize or name != "quantize.embedding.weight"), name


def test_scales_of_a_step_hold_the_full_one_last_and_differ():
    seen = [step_scales(8, num_scales=4, seed=0, step=step) for step in range(50)]
    for scales in seen:
        assert scales[-1] == 1
        assert scales == sorted(set(scales))
        assert all(scale * 8 == round(scale * 8) for scale in scales)
    assert {round(scale * 8) for scales in seen for scale in scales} == set(range(1, 9))
    assert step_scales(8, 4, seed=0, step=7) == seen[7]
    assert step_scales(2, num_scales=9, seed=0, step=0) == [0.5, 1.0]


def test_weight_decay_leaves_norms_biases_and_codes_alone():
    model = make_tiny()
    decayed, others = parameter_groups(model, 0.1)
    assert {parameter.ndim for parameter in decayed["params"]} == {4}
    assert any(parameter is model.quantize.embedding.weight for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


# Codebook


@pytest.mark.parametrize("l2_norm", [True, False])
def test_kmeans_finds_planted_centres(l2_norm):
    torch.manual_seed(0)
    centres = torch.randn(16, 8)
    centres = F.normalize(centres, dim=-1) if l2_norm else centres * 3
    latents = centres.repeat(200, 1) + 0.01 * torch.randn(3200, 8)
    quantizer = VectorQuantizer(64, 8, 0.25, 0.0, l2_norm)
    initialise_codebook(quantizer, latents, seed=0)
    codes = quantizer.embedding.weight.detach()
    assert torch.cdist(centres, codes).min(1).values.max() < 0.05
    assert quantizer.embedding(F.normalize(latents, dim=-1) if l2_norm else latents).unique().numel() > 48
    again = VectorQuantizer(64, 8, 0.25, 0.0, l2_norm)
    initialise_codebook(again, latents, seed=0)
    assert torch.equal(again.embedding.weight, codes)


def test_kmeans_needs_as_many_latents_as_codes():
    with pytest.raises(ValueError, match="as many latents as codes, 64, but has 63"):
        initialise_codebook(VectorQuantizer(64, 8, 0.25, 0.0, True), torch.randn(63, 8), seed=0)
