"""Denoisers and masked models trained on tiny SVQVAEs, and their pipelines."""

import json
import logging
import re
import shutil
import sys
from functools import partial

import datasets
import measure_scaling_factor
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_latent_diffusion
import train_masked
from accelerate import Accelerator
from conftest import ROOT, make_tiny
from diffusers import AmusedPipeline, DiffusionPipeline, DiTPipeline, LDMPipeline
from hub_server import serve_hub, use_hub
from PIL import Image
from pipeline_parts import amused_parts
from train_latent_diffusion import NUM_CLASSES, DiffusionOptions, drop_labels, make_denoiser
from train_masked import MaskedOptions, draw_mask, make_captions, masked_loss
from training_runs import (
    NEW_RUN_OPTIONS,
    UNREAD_OPTIONS,
    assert_no_private_path,
    assert_resumed_run_reads_changed_options,
    cpu,
    logged,
    run,
    train_at_once_and_resumed,
)

import svqvae_hf
from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.trainer.data.image_source import ImageSource

UNET = {
    **{"_class_name": "UNet2DModel", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]},
    **{"add_attention": False, "dropout": 0.1},
}
DIT = {
    **{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2},
    "dropout": 0.1,
}
TINY_RUN = {
    **{"resolution": 16, "train_batch_size": 2, "max_train_steps": 2, "lr_warmup_steps": 0},
    **{"dataloader_num_workers": 0, "num_validation_images": 2, "logging_steps": 1},
}

pytestmark = [
    pytest.mark.usefixtures("one_accelerator"),
]
diffuse = partial(run, train_latent_diffusion.main, DiffusionOptions)
fill_masks = partial(run, train_masked.main, MaskedOptions)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny SVQVAE and a tiny CLIP, configs of networks, and photographs in folders of two classes."""
    folder = tmp_path_factory.mktemp("parts")
    make_tiny().save_pretrained(folder / "vqvae")
    amused = amused_parts()
    amused["tokenizer"].save_pretrained(folder / "clip")
    amused["text_encoder"].save_pretrained(folder / "clip")
    amused["transformer"].save_config(folder / "uvit")
    for name, config in (("unet", UNET), ("dit", DIT)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(4):
            path = folder / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.convert("RGB").crop((90 * index, 0, 90 * index + 64, 64)).save(path)
    return folder


@pytest.fixture
def options(parts, tmp_path):
    """Options of a tiny run of a UNet."""
    return TINY_RUN | {
        "vqvae_name_or_path": str(parts / "vqvae"),
        "model_config_name_or_path": str(parts / "unet.json"),
        "train_data_dir": str(parts / "photos"),
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def dit_options(options, parts):
    return options | {"model_config_name_or_path": str(parts / "dit.json"), "label_column": "label"}


@pytest.fixture
def masked_options(options, parts):
    clip = {"text_encoder_name_or_path": str(parts / "clip"), "label_column": "label"}
    return options | clip | {"model_config_name_or_path": str(parts / "uvit")}


# What is trained


def test_denoiser_of_one_image_generates_that_image(options, photo, tmp_path):
    """With the bundled model, whose latents vary little beside their mean; docs/diffusion.md has a longer run."""
    one = tmp_path / "one"
    one.mkdir()
    photo.crop((100, 0, 400, 300)).resize((32, 32)).save(one / "chelsea.png")
    shutil.copytree(svqvae_hf.DEFAULT_MODEL, tmp_path / "vqvae")
    crops = measure_scaling_factor.read_crops(str(one), 1, 32, (0.0, 1.0))
    factor = measure_scaling_factor.measure_scaling_factor(
        SVQVAE.from_pretrained(tmp_path / "vqvae"), (batch.sample for batch in crops)
    )
    config = json.loads((tmp_path / "vqvae" / "config.json").read_text()) | {"scaling_factor": factor}
    (tmp_path / "vqvae" / "config.json").write_text(json.dumps(config))
    unet = UNET | {"block_out_channels": [32, 64], "norm_num_groups": 8, "dropout": 0.0}
    (tmp_path / "unet.json").write_text(json.dumps(unet))
    options |= {
        "vqvae_name_or_path": str(tmp_path / "vqvae"),
        "model_config_name_or_path": str(tmp_path / "unet.json"),
    }
    options |= {"train_data_dir": str(one), "resolution": 32, "random_flip": False, "num_validation_images": 0}
    options |= {"max_train_steps": 500, "learning_rate": 3e-3, "train_batch_size": 4, "lr_warmup_steps": 10}
    diffuse(**options, use_ema=True, ema_decay=0.9)
    pipeline = LDMPipeline.from_pretrained(options["output_dir"])
    pipeline.set_progress_bar_config(disable=True)
    sample = SVQVAEImageProcessor(pixel_range=(-1, 1)).preprocess(Image.open(one / "chelsea.png"))["pixel_values"]
    with torch.no_grad():
        reconstruction = pipeline.vqvae.decode(pipeline.vqvae.encode(sample).latents).sample
    expected = (reconstruction / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
    for image in images:
        psnr = -10 * np.log10(np.square(image - expected).mean())
        assert psnr > 22, psnr


@pytest.mark.parametrize("kind", ["unet", "dit", "masked"])
def test_resumed_run_equals_an_unbroken_one(request, kind):
    options = request.getfixturevalue({"unet": "options", "dit": "dit_options", "masked": "masked_options"}[kind])
    part = "unet" if kind == "unet" else "transformer"
    train = fill_masks if kind == "masked" else diffuse
    whole, resumed = train_at_once_and_resumed(train, f"{part}/diffusion_pytorch_model.safetensors", options)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dit", "masked"])
def test_resumed_run_applies_each_changed_option(request, parts, tmp_path, monkeypatch, kind):
    shutil.copytree(parts / "photos", tmp_path / "pictures")
    changes = NEW_RUN_OPTIONS | {
        **{"train_data_dir": str(tmp_path / "pictures"), "dataset_name": None, "data_files": [], "center_crop": True},
        **{"random_flip": False, "random_rotation": True, "resize_range": [0.5, 1.0]},
        **{"dataloader_num_workers": 1, "label_dropout": 0.5},
        "num_validation_images": 1,
        "min_side": 8,
        "image_column": "image",
    }
    options = request.getfixturevalue(f"{kind}_options") | {"use_ema": True}
    if kind == "dit":
        script, changes = (train_latent_diffusion.main, DiffusionOptions), changes | {"gradient_checkpointing": True}
        changes["num_inference_steps"] = 2
    else:
        script, changes = (train_masked.main, MaskedOptions), changes | {"validation_prompts": ["a cat"]}
    resumed = assert_resumed_run_reads_changed_options(monkeypatch, *script, options, changes, UNREAD_OPTIONS)
    assert resumed.lr_scheduler.base_lrs == [0.5, 0.5]
    assert resumed.ema.decay == 0.5


def test_latents_far_from_the_noise_start_with_one_warning(options, caplog):
    diffuse(**options, gradient_accumulation_steps=2)
    (std,) = re.findall("standard deviation near 1, as the noise has, but have (\\S+)\\. Set the", caplog.text)
    assert not 0.5 < float(std) < 2


def test_bf16_run_with_everything_on_learns_and_shows_samples(dit_options, caplog):
    caplog.set_level(logging.INFO)
    dit_options |= {"max_train_steps": 30, "learning_rate": 3e-3, "logging_steps": 10, "validation_steps": 20}
    diffuse(**dit_options, mixed_precision="bf16", use_ema=True, gradient_checkpointing=True, report_to="tensorboard")
    losses = logged(caplog, "train/loss")
    assert losses[30] < losses[10]
    assert not any(logged(caplog, "train/skipped").values())
    output_dir = ROOT / dit_options["output_dir"]
    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == ["step-0000020.png", "step-0000030.png"]
    with Image.open(output_dir / "samples" / "step-0000030.png") as grid:
        assert grid.size == (2 * 16 + 3 * 4, 16 + 2 * 4)


def test_transformer_embeds_each_label_or_the_label_of_no_class_in_all_blocks(dit_options, parts):
    given = list(range(64))
    labels = drop_labels(given, 0.5, torch.Generator().manual_seed(0))
    kept = labels != NUM_CLASSES
    assert 16 < kept.sum() < 48
    assert labels[kept].tolist() == [label for label, keep in zip(given, kept.tolist(), strict=True) if keep]
    denoiser = make_denoiser(DiffusionOptions(**dit_options), SVQVAE.from_pretrained(parts / "vqvae"))
    for block in denoiser.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        assert torch.equal(embedder(labels), embedder.embedding_table(labels))


def test_pipeline_of_classes_has_their_names(dit_options):
    diffuse(**dit_options)
    pipeline = DiTPipeline.from_pretrained(dit_options["output_dir"])
    assert pipeline.labels == {"cat": 0, "dog": 1}
    images = pipeline(pipeline.get_label_ids(["dog"]), num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_mask_covers_at_least_one_id_and_a_cosine_fraction():
    generator = torch.Generator().manual_seed(0)
    fractions = draw_mask(torch.Size((4000, 8, 8)), generator).float().mean((1, 2))
    assert fractions.min() == 1 / 64
    assert fractions.mean() == pytest.approx(2 / torch.pi, abs=0.02)
    assert (fractions > np.cos(np.pi / 4)).float().mean() == pytest.approx(0.5, abs=0.03)


def test_masked_model_learns(masked_options, caplog):
    caplog.set_level(logging.INFO)
    masked_options |= {"max_train_steps": 30, "learning_rate": 3e-3, "logging_steps": 10, "train_batch_size": 4}
    fill_masks(**masked_options, validation_prompts=["cat", "dog"])
    losses = logged(caplog, "train/loss")
    assert losses[30] < losses[10]
    pipeline = AmusedPipeline.from_pretrained(masked_options["output_dir"])
    assert pipeline("cat", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_each_masked_id_counts_alike_on_all_processes():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 64, 3, 3), torch.randint(64, (2, 3, 3))
    masked = torch.zeros(2, 3, 3, dtype=torch.bool)
    masked[0, :2] = masked[1, 0, 0] = True
    losses = F.cross_entropy(logits, ids, reduction="none")[masked]
    alone = masked_loss(logits, ids, masked, torch.tensor(7.0))
    torch.testing.assert_close(alone, losses.mean())
    # Two processes with one image each: the mean of their losses is the loss of the joined batch.
    halves = [masked_loss(logits[i : i + 1], ids[i : i + 1], masked[i : i + 1], torch.tensor(3.5)) for i in range(2)]
    torch.testing.assert_close(torch.stack(halves).mean(), alone)


def test_captions_are_names_of_classes_some_left_empty(masked_options):
    images = ImageSource(MaskedOptions(**masked_options), Accelerator(cpu=True), (0.0, 1.0), "label")
    found = make_captions([0, 1] * 16, images.label_feature, 0.5, torch.Generator().manual_seed(0))
    assert set(found[::2]) == {"", "cat"}
    assert set(found[1::2]) == {"", "dog"}


# The Hub


def test_pushed_pipelines_load_as_documented_and_have_cards(
    options, dit_options, masked_options, parts, tmp_path, monkeypatch
):
    runs = {
        "out-ldm": (diffuse, options),
        "out-dit": (diffuse, dit_options),
        "out-masked": (fill_masks, masked_options),
    }
    with serve_hub(tmp_path) as hub:
        use_hub(monkeypatch, hub)
        for name, (train, each) in runs.items():
            pushed = {"max_train_steps": 1, "output_dir": str(tmp_path / name), "push_to_hub": True}
            train(**(each | pushed), hub_model_id=f"org/{name}", license="mit")
    for name, call in {"ldm": {}, "dit": {"class_labels": [1]}, "masked": {"prompt": "cat"}}.items():
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "hub" / "org" / f"out-{name}" / "main")
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(**call, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert_no_private_path(parts, tmp_path / "hub")
    repository = tmp_path / "hub" / "org" / "out-ldm" / "main"
    assert {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")} == {
        *("README.md", "model_index.json", "train_config.yaml", "scheduler/scheduler_config.json"),
        *(f"{part}/config.json" for part in ("unet", "vqvae")),
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vqvae")),
        "vqvae/preprocessor_config.json",
        "samples/step-0000001.png",
    }
    card = (repository / "README.md").read_text()
    assert 'LDMPipeline.from_pretrained("org/out-ldm")' in card
    assert "only after\n`import svqvae_hf`" in card
    assert "license: mit" in card
    assert "Not stated" not in card
    assert "trained by | `training/train_latent_diffusion.py` of svqvae-hf" in card
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        "^```python\n(.*?)^```", (ROOT / "docs" / "diffusion.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == len(runs)
    for block in blocks:
        exec(block, {})


# The scaling factor


def measure(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["measure_scaling_factor.py", *map(str, arguments)])
    measure_scaling_factor.main()


def test_scaling_factor_is_measured_and_stored(parts, tmp_path, monkeypatch, capsys):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(parts / "vqvae", model)
    data.mkdir()
    for index, path in enumerate(sorted((parts / "photos").rglob("*.png"))):
        shutil.copy(path, data / f"{index}.png")
    before = json.loads((model / "config.json").read_text())
    measure(monkeypatch, model, data, "--resolution", 64)
    vqvae = SVQVAE.from_pretrained(model)
    images = [Image.open(path) for path in sorted(data.iterdir())]
    sample = SVQVAEImageProcessor().preprocess(images)["pixel_values"]
    with torch.no_grad():
        expected = 1 / vqvae.encode(sample).latents.std(correction=0).item()
    assert vqvae.config["scaling_factor"] == pytest.approx(expected, rel=1e-4)
    assert f"{expected:.4g}"[:4] in capsys.readouterr().out
    after = json.loads((model / "config.json").read_text())
    assert after == before | {"scaling_factor": after["scaling_factor"]}


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": "label"}, "and only then, but the model is a UNet2DModel, and the column is 'label'"),
        ({"model_config_name_or_path": "dit.json"}, "is a DiTTransformer2DModel, and the column is None"),
        ({"model_config_name_or_path": "vqvae"}, "must be one of UNet2DModel, DiTTransformer2DModel, but is SVQVAE"),
        ({"model_config_name_or_path": "nowhere.json"}, "but there is no 'nowhere.json'"),
        ({"vqvae_name_or_path": "no where"}, "`--vqvae_name_or_path` must be a file, a folder or a Hub id"),
        ({"resolution": 18}, "`--resolution` must be a multiple of f = 4 of the SVQVAE, but is 18"),
        ({"resolution": 20}, "whose side is a multiple of 2, by `.*unet.json`, but 20 gives 5"),
        ({"label_dropout": 2.0}, r"`--label_dropout` must lie in \[0, 1\], but is 2.0"),
        ({"num_inference_steps": 0}, "`--num_inference_steps` must be more than 0, but is 0"),
    ],
)
def test_mismatched_options_are_refused(options, parts, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    with cpu(), pytest.raises(ValueError, match=message):
        train_latent_diffusion.main(DiffusionOptions(**(options | changes)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3, 1000], r"Labels must be integers in \[0, 1000\), but one is 1000"),
        ([3, -1], "but one is -1"),
        ([0.5, 1.5], "must hold integers, or at most 1000 classes, but it holds Value"),
    ],
)
def test_labels_outside_the_classes_are_refused(dit_options, tmp_path, photo, labels, message):
    rows = {"image": [photo.resize((16, 16))] * 2, "label": labels}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "set.parquet")
    dit_options |= {"train_data_dir": None, "dataset_name": "parquet", "data_files": [str(tmp_path / "set.parquet")]}
    with pytest.raises(ValueError, match=message):
        diffuse(**dit_options)


def test_captions_without_text_are_refused(masked_options, tmp_path, photo):
    rows = {"image": [photo.resize((16, 16))] * 2, "label": [1, 2]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "set.parquet")
    set_options = {"train_data_dir": None, "dataset_name": "parquet", "data_files": [str(tmp_path / "set.parquet")]}
    with pytest.raises(ValueError, match="must hold captions or classes with names, but has [12]"):
        fill_masks(**(masked_options | set_options))


def test_text_encoder_without_the_files_of_its_tokenizer_is_refused(masked_options, parts, tmp_path):
    """transformers then makes a tokenizer of two words, in silence."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "clip").mkdir(exist_ok=True)
        shutil.copy(parts / "clip" / name, tmp_path / "clip" / name)
    with pytest.raises(ValueError, match="must have the 5 words of its text encoder, but has 2"):
        fill_masks(**(masked_options | {"text_encoder_name_or_path": str(tmp_path / "clip")}))
