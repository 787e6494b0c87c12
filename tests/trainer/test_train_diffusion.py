"""Denoisers trained on the latents of tiny SVQVAEs, and their pipelines."""

import json
import logging
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import train_latent_diffusion
from conftest import ROOT, make_tiny
from denoiser import NUM_CLASSES, check_label_names, make_denoiser
from diffusers import DiffusionPipeline, DiTPipeline
from diffusion_options import DiffusionOptions
from PIL import Image
from train_latent_diffusion import drop_labels
from training_runs import assert_no_private_path, cpu, logged, run, train_at_once_and_interrupted

import svqvae_hf
from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.trainer.run import run_training
from svqvae_hf.trainer.tracking import LABEL_HEIGHT

DIT = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2}
DIT |= {"dropout": 0.1}
TINY_RUN = {
    **{"resolution": 16, "per_device_train_batch_size": 2, "max_steps": 2, "warmup_steps": 0},
    **{"dataloader_num_workers": 0, "num_validation_images": 2, "logging_steps": 1},
}

LOSSES: dict[str, float] = {}  # of the first validation, for any batch

diffuse = partial(run, train_latent_diffusion.train, DiffusionOptions)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder of a tiny SVQVAE, configs of networks, and photographs in folders of two classes."""
    folder = tmp_path_factory.mktemp("parts")
    make_tiny().save_pretrained(folder / "vqvae")
    for name, config in (("dit", DIT), ("typo", DIT | {"num_layer": 1})):
        (folder / f"{name}.json").write_text(json.dumps(config))
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(4):
            path = folder / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.convert("RGB").crop((90 * index, 0, 90 * index + 64, 64)).save(path)
    for name in ("cat", "puma"):
        (folder / "cats" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "teal").save(folder / "cats" / name / "0.png")
    return folder


@pytest.fixture
def options(parts, tmp_path):
    """Options of a tiny run without labels."""
    paths = {"vqvae_name_or_path": f"{parts}/vqvae", "model_config_name_or_path": f"{parts}/dit.json"}
    return TINY_RUN | paths | {"train_data_dir": f"{parts}/photos", "output_dir": f"{tmp_path}/out"}


@pytest.fixture
def class_options(options):
    return options | {"label_column": "label"}


# What is trained


@pytest.mark.slow
def test_denoiser_of_one_image_generates_that_image(options, photo, tmp_path):
    """With the bundled model, whose latents vary little beside their mean; docs/diffusion.md has a longer run."""
    one = tmp_path / "one"
    one.mkdir()
    photo.crop((100, 0, 400, 300)).resize((32, 32)).save(one / "chelsea.png")
    network = DIT | {"num_attention_heads": 2, "attention_head_dim": 32, "dropout": 0.0, "patch_size": 1}
    (tmp_path / "dit.json").write_text(json.dumps(network))
    options |= {"vqvae_name_or_path": svqvae_hf.DEFAULT_MODEL, "model_config_name_or_path": str(tmp_path / "dit.json")}
    options |= {"train_data_dir": str(one), "resolution": 32, "random_flip": False, "num_validation_images": 0}
    options |= {"max_steps": 300, "learning_rate": 4e-3, "per_device_train_batch_size": 4, "warmup_steps": 10}
    diffuse(**options, use_ema=True, ema_decay=0.9)
    pipeline = DiTPipeline.from_pretrained(options["output_dir"])
    pipeline.set_progress_bar_config(disable=True)
    sample = SVQVAEImageProcessor(pixel_range=(-1, 1)).preprocess(Image.open(one / "chelsea.png"))["pixel_values"]
    with torch.no_grad():
        reconstruction = pipeline.vae.decode(pipeline.vae.encode(sample).latents).sample
    expected = (reconstruction / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    call = {"guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0), "num_inference_steps": 20}
    images = pipeline([NUM_CLASSES] * 2, **call, output_type="np").images
    for image in images:
        psnr = -10 * np.log10(np.square(image - expected).mean())
        assert psnr > 22, psnr


@pytest.mark.slow
def test_killed_and_stopped_run_equals_an_unbroken_one(class_options):
    whole, resumed = train_at_once_and_interrupted(*diffuse.args, class_options)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_latents_are_scaled_to_the_deviation_of_the_noise_unless_the_tokenizer_has_a_factor(options, factor, caplog):
    caplog.set_level(logging.DEBUG, "svqvae_hf.trainer.log")
    path = Path(options["output_dir"]).with_name("vqvae")
    make_tiny(scaling_factor=factor).save_pretrained(path)
    diffuse(**options | {"vqvae_name_or_path": str(path), "per_device_train_batch_size": 8})
    stored = SVQVAE.from_pretrained(options["output_dir"], subfolder="vae").config["scaling_factor"]
    assert (stored == factor) == (factor != 1)
    assert (0.8 < logged(caplog, "train/latent_std")[1] < 1.25) == (factor == 1)


def test_a_resumed_run_keeps_the_scale_of_its_latents_with_other_crops(options):
    diffuse(**options)
    config_file = Path(options["output_dir"], "vae", "config.json")
    factor = json.loads(config_file.read_text())["scaling_factor"]
    assert factor != 1
    diffuse(**options | {"max_steps": 3, "resume_from_checkpoint": "latest", "resize_range": [0.5, 0.6]})
    assert json.loads(config_file.read_text())["scaling_factor"] == factor


def test_a_validation_measures_the_loss_of_held_out_images(class_options, parts, photo, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for label in ("cat", "dog"):
        (tmp_path / "other" / label).mkdir(parents=True)
        photo.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "other" / label / "0.png")
    changes = {"validation_data_dir": str(tmp_path / "other"), "eval_steps": 1, "learning_rate": 1e-12}
    diffuse(**class_options | changes)
    losses = logged(caplog, "validation/loss")
    assert losses.keys() == {0, 1, 2}
    assert losses[1] == losses[2] > 0  # the same crops, noise and timesteps
    assert "validation/loss |" in Path(class_options["output_dir"], "README.md").read_text()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 2), (5, 0), (8, 0)])
def test_the_loss_of_a_validation_is_a_mean_over_images_for_any_batch(
    batch_size, workers, class_options, photo, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    for number in range(5):
        path = tmp_path / "other" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.rotate(90 + number).save(path)
    (tmp_path / "other" / "cat" / "broken.png").write_bytes(b"no image")
    make_tiny(scaling_factor=2.0).save_pretrained(tmp_path / "vqvae")  # else it is measured, on as many batches
    changes = {"validation_data_dir": str(tmp_path / "other"), "per_device_train_batch_size": batch_size}
    changes["vqvae_name_or_path"] = str(tmp_path / "vqvae")
    changes["dataloader_num_workers"] = workers
    drawn = []
    draw_noise = train_latent_diffusion.Denoising.draw_noise

    def record(denoising, generator, count):
        noise = draw_noise(denoising, generator, count)
        drawn.append(noise)
        return noise

    train_latent_diffusion.Denoising.draw_noise = record
    try:
        diffuse(**class_options | changes | {"max_steps": 1, "num_validation_images": 0})
    finally:
        train_latent_diffusion.Denoising.draw_noise = draw_noise
    (first, *_) = logged(caplog, "validation/loss").values()
    assert len(drawn) == 5 + 1 + 5, "each image once, in both validations"
    assert caplog.text.count("Skipped `cat/broken.png` of `--validation_data_dir`: the image") == 1
    assert first == LOSSES.setdefault("first", first)


def test_a_denoiser_is_not_resumed_with_another_tokenizer_of_the_same_name(options, tmp_path):
    for work, seed in (("w1", 1), ("w2", 2)):
        vqvae = make_tiny()
        torch.manual_seed(seed)
        torch.nn.init.normal_(vqvae.encoder.conv_in.weight)
        vqvae.save_pretrained(tmp_path / work / "vqvae")
    options |= {"resume_from_checkpoint": "latest", "vqvae_name_or_path": f"{tmp_path}/w1/vqvae"}
    diffuse(**options)
    for steps in (2, 3):
        changes = {"vqvae_name_or_path": f"{tmp_path}/w2/vqvae", "max_steps": steps}
        with cpu(), pytest.raises(ValueError, match="`--vqvae_name_or_path` must name what .* was made from"):
            run_training(train_latent_diffusion.train, DiffusionOptions(**(options | changes)))


def test_images_with_the_label_of_no_class_are_skipped(class_options, parts, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for folder, angle in (("photos", 0), ("held_out", 180)):
        (tmp_path / folder).mkdir()
        rows = []
        for path in (parts / "photos").rglob("*.png"):
            with Image.open(path) as photo:
                photo.rotate(angle).save(tmp_path / folder / path.name)
            label = -1 if path.name == "2.png" else 3
            rows.append(json.dumps({"file_name": path.name, "label": label}))
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(rows))
    paths = {"train_data_dir": f"{tmp_path}/photos", "validation_data_dir": f"{tmp_path}/held_out"}
    diffuse(**class_options | paths | {"per_device_train_batch_size": 4})
    assert "Skipped `2.png`: it has no label." in caplog.text


def test_classes_that_diffusers_would_confuse_are_refused(class_options, photo, tmp_path):
    check_label_names(["tench, Tinca tinca", "cat"])
    for name in ("crane, bird", "crane, machine"):
        (tmp_path / "cranes" / name).mkdir(parents=True)
        photo.save(tmp_path / "cranes" / name / "0.png")
    changes = {"train_data_dir": f"{tmp_path}/cranes"}
    with cpu(), pytest.raises(ValueError, match="`crane, bird` and `crane, machine` share `crane`"):
        run_training(train_latent_diffusion.train, DiffusionOptions(**(class_options | changes)))
    assert not Path(class_options["output_dir"]).exists()


@pytest.mark.slow
def test_bf16_run_with_everything_on_stays_finite_and_shows_samples(class_options, caplog):
    caplog.set_level(logging.INFO)
    class_options |= {"max_steps": 3, "logging_steps": 1, "eval_steps": 2}
    diffuse(
        **class_options, mixed_precision="bf16", use_ema=True, gradient_checkpointing=True, report_to="tensorboard"
    )
    assert all(map(math.isfinite, logged(caplog, "train/loss").values()))
    assert not any(logged(caplog, "train/skipped").values())
    output_dir = ROOT / class_options["output_dir"]
    names = sorted(path.name for path in (output_dir / "samples").iterdir())
    assert names == [f"step-{step:07}.png" for step in (0, 2, 3)]
    with Image.open(output_dir / "samples" / "step-0000003.png") as grid:
        assert grid.size == (2 * 16 + 3 * 4, LABEL_HEIGHT + 16 + 2 * 4)


def test_transformer_embeds_each_label_or_the_label_of_no_class_in_all_blocks(class_options, parts):
    given = list(range(64))
    labels = drop_labels(given, torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5)
    kept = labels != NUM_CLASSES
    assert 16 < kept.sum() < 48
    assert labels[kept].tolist() == [label for label, keep in zip(given, kept.tolist(), strict=True) if keep]
    denoiser = make_denoiser(DiffusionOptions(**class_options), SVQVAE.from_pretrained(parts / "vqvae"))
    for block in denoiser.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        assert torch.equal(embedder(labels), embedder.embedding_table(labels))


# The result


@pytest.mark.slow
def test_saved_pipelines_load_as_documented_and_have_cards(options, class_options, parts, tmp_path, monkeypatch):
    runs = {"out": options, "out-dit": class_options}
    for name, each in runs.items():
        changes = {"max_steps": 1, "output_dir": str(tmp_path / name), "hub_model_id": f"org/{name}"}
        diffuse(**(each | changes), license="mit")
    for name, label in {"out": NUM_CLASSES, "out-dit": 1}.items():
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / name)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline([label], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert_no_private_path(parts, tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'DiTPipeline.from_pretrained("org/out")' in card
    assert "class_labels=[1000], guidance_scale=1.0" in card
    card = (tmp_path / "out-dit" / "README.md").read_text()
    assert 'class_labels=pipeline.get_label_ids(["cat"])' in card
    assert "| classes | cat, dog |" in card
    assert "license: mit" in card
    assert "trained by | `training/train_latent_diffusion.py` of svqvae-hf" in card
    monkeypatch.chdir(tmp_path)
    blocks = re.findall("^```python\n(.*?)^```", (ROOT / "docs" / "diffusion.md").read_text(), re.S | re.M)
    assert len(blocks) == len(runs)
    for block in blocks:
        exec(block, {})


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config_name_or_path": "vqvae"}, "must be DiTTransformer2DModel, but is SVQVAE"),
        ({"model_config_name_or_path": "typo.json"}, "must have only keys of its class, but has num_layer"),
        ({"resolution": 18}, "`--resolution` must be a multiple of 8, f of the SVQVAE times the `patch_size` of"),
        ({"validation_data_dir": "photos"}, "hold images that are not trained on, but `cat/0.png` is `cat/0.png`"),
        ({"validation_data_dir": "cats", "label_column": "label"}, "must have the classes of the training images"),
        ({"validation_data_dir": "cats", "mix_data_dir": "cats"}, "hold images that are not trained on"),
        ({"mix_data_dir": "cats", "label_column": "label"}, "`--mix_data_dir` must have the classes of the training"),
    ],
)
def test_mismatched_options_are_refused(options, parts, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    with cpu(), pytest.raises(ValueError, match=message):
        run_training(train_latent_diffusion.train, DiffusionOptions(**(options | changes)))
