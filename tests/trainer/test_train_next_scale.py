"""Next-scale transformers trained on the ids of a tiny SVQVAE, and their pipelines."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import train_next_scale
from conftest import ROOT, make_tiny
from PIL import Image
from token_set_parts import replace_column
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from train_next_scale import NextScaleOptions, count_ids, draw_schedule
from training_runs import assert_no_private_path, cpu, forget_accelerate, logged, run, train_at_once_and_interrupted
from transformers import PreTrainedTokenizerFast

import svqvae_cli
from svqvae_hf import SVQVAENextScalePipeline
from svqvae_hf.pipelines.schedules import make_schedule
from svqvae_hf.token_sets.manifest import load_rows
from svqvae_hf.trainer.run import run_training
from svqvae_hf.trainer.tracking import LABEL_HEIGHT

CONFIG = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}
CROP, SIDE = 32, 8  # of images in pixels and in ids
IMAGES = 6

train = partial(run, train_next_scale.train, NextScaleOptions)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny SVQVAE, one of another codebook, a config, and token sets of six photographs, each a class of its own."""
    folder = tmp_path_factory.mktemp("parts")
    vqvae = make_tiny()
    vqvae.save_pretrained(folder / "vqvae")
    make_tiny(codebook_size=65).save_pretrained(folder / "other")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(IMAGES):
            path = folder / "photos" / f"class{index}" / "photo.png"
            path.parent.mkdir(parents=True)
            photo.convert("RGB").crop((60 * index, 0, 60 * index + 64, 64)).save(path)
            other = folder / "others" / f"class{index}" / "photo.png"
            other.parent.mkdir(parents=True)
            photo.convert("RGB").crop((60 * index, 80, 60 * index + 64, 144)).save(other)
    photos = str(folder / "photos")
    crops = ["--crops", "centre", "--resolution", str(CROP), "--workers", "0"]
    model = ["--model", str(folder / "vqvae"), "--device", "cpu", "--license", "cc-by-4.0"]
    sides = ["--sides", *map(str, range(1, SIDE + 1))]
    for name, scales in {
        "latents": ["--scale-from", "latents", *sides],
        "image": ["--scale-from", "image", *sides],
        "held_out": ["--scale-from", "latents", *sides],
        "halves": ["--scales", "0.5", "1"],
    }.items():
        images = str(folder / "others") if name == "held_out" else photos
        output = ["--output", str(folder / name)]
        assert svqvae_cli.main(["tokenize", images, *output, *scales, *crops, *model]) == 0
    return folder


@pytest.fixture
def options(parts, tmp_path):
    """Options of a tiny run."""
    paths = {"vqvae_name_or_path": f"{parts}/vqvae", "model_config_name_or_path": f"{parts}/config.json"}
    paths |= {"token_set": f"{parts}/latents", "output_dir": f"{tmp_path}/out", "label_column": "label"}
    steps = {"per_device_train_batch_size": 3, "max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    return paths | steps | {"num_inference_steps": 4, "num_validation_images": 2}


def test_a_run_is_not_resumed_with_other_rows_or_another_tokenizer_of_the_same_name(options, parts, tmp_path):
    for work, token_set in (("w1", "latents"), ("w2", "held_out")):
        shutil.copytree(parts / token_set, tmp_path / work / "tokens")
        make_tiny(dropout_p=0.0 if work == "w1" else 0.1).save_pretrained(tmp_path / work / "vqvae")
    options |= {"resume_from_checkpoint": "latest", "num_validation_images": 0}
    first = {"token_set": f"{tmp_path}/w1/tokens", "vqvae_name_or_path": f"{tmp_path}/w1/vqvae"}
    train(**options | first)
    for name, source in (("token_set", "tokens"), ("vqvae_name_or_path", "vqvae")):
        for steps in (2, 3):
            changed = first | {name: f"{tmp_path}/w2/{source}", "max_steps": steps}
            with cpu(), pytest.raises(ValueError, match=f"`--{name}` must name what .* was made from"):
                run_training(train_next_scale.train, NextScaleOptions(**(options | changed)))
            forget_accelerate()
    shutil.move(tmp_path / "w1" / "tokens", tmp_path / "moved")
    train(**options | first | {"token_set": f"{tmp_path}/moved", "max_steps": 3})


@pytest.mark.slow
def test_images_of_captions_learned_by_heart_come_back(options, parts, tmp_path):
    words = [f"photo{index}" for index in range(IMAGES)]
    rows = load_rows(parts / "latents")
    shutil.copytree(parts / "latents", tmp_path / "captioned")
    replace_column(tmp_path / "captioned", "caption", [[word] for word in words])
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "words")
    captions = {"label_column": None, "caption_column": "caption", "max_text_length": 0}
    longer = {"max_steps": 150, "learning_rate": 4e-3, "schedule_share": 1.0, "guidance_scale": 2.0}
    paths = {"token_set": str(tmp_path / "captioned"), "tokenizer_name_or_path": str(tmp_path / "words")}
    with pytest.raises(ValueError, match="A caption must have at most 0 tokens, but 'photo0' has 1"):
        train(**options | captions | longer | paths)
    captions["max_text_length"] = 2
    train(**options | captions | longer | paths | {"per_device_train_batch_size": IMAGES})
    pipeline = SVQVAENextScalePipeline.from_pretrained(options["output_dir"])
    ids = pipeline(prompt=words, temperature=0, guidance_scale=1.5, output_type="latent").images
    expected = torch.tensor(rows[f"ids_{SIDE - 1}"]).view_as(ids)
    assert (ids == expected).float().mean() > 0.9
    assert pipeline.task == "text-to-image"
    with pytest.raises(ValueError, match="at most 2 tokens"):
        pipeline(prompt="photo1 photo2 photo3")
    with pytest.raises(ValueError, match="`class_labels` must be left out, because the model has no classes"):
        pipeline(class_labels=0)


@pytest.mark.slow
def test_images_learned_by_heart_come_back_at_each_scale(options, parts):
    options |= {"token_set": str(parts / "image"), "max_steps": 200, "learning_rate": 5e-3}
    options |= {"per_device_train_batch_size": IMAGES, "condition_dropout": 0.0}
    train(**(options | {"num_validation_images": 0, "logging_steps": 50, "schedule_share": 0.5}))
    pipeline = SVQVAENextScalePipeline.from_pretrained(options["output_dir"])
    assert pipeline.config["scale_from"] == "image"
    assert pipeline.trained_schedule == make_schedule((SIDE, SIDE), 4)
    assert pipeline.config["class_names"] == [f"class{index}" for index in range(IMAGES)]
    photos = [Image.open(parts / f"photos/class{index}/photo.png").resize((CROP, CROP)) for index in range(IMAGES)]
    change_nothing = Image.new("L", (CROP, CROP))
    photo_ids = ids_of_steps(pipeline, image=photos, mask_image=change_nothing)
    drawn_ids = ids_of_steps(pipeline)
    for drawn, of_photos in zip(drawn_ids, photo_ids, strict=True):
        assert torch.equal(drawn, of_photos)


def ids_of_steps(pipeline, **options):
    """Ids of each scale that the pipeline draws for all classes."""
    ids = []

    def record(*step):
        ids.append(step[-1]["ids"])

    pipeline(list(range(IMAGES)), temperature=0, callback_on_step_end=record, **options)
    return ids


@pytest.mark.slow
def test_killed_and_stopped_run_equals_an_unbroken_one(options):
    whole, resumed = train_at_once_and_interrupted(*train.args, options)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_bf16_run_with_everything_on_learns_validates_and_shows_samples(options, parts, caplog):
    caplog.set_level(logging.INFO)
    options |= {"max_steps": 20, "learning_rate": 5e-3, "logging_steps": 10, "eval_steps": 20}
    held_out = {"validation_token_set": str(parts / "held_out")}
    train(**options, **held_out, mixed_precision="bf16", use_ema=True, guidance_scale=2.0, report_to="tensorboard")
    losses = logged(caplog, "train/loss")
    for name in ("loss", "accuracy", "bits_per_id"):
        assert 20 in logged(caplog, f"validation/{name}")
    assert losses[20] < losses[10]
    with Image.open(ROOT / options["output_dir"] / "samples" / "step-0000020.png") as grid:
        assert grid.size == (2 * CROP + 3 * 4, LABEL_HEIGHT + CROP + 2 * 4)


def test_without_labels_images_have_no_class(options):
    train(**(options | {"label_column": None, "max_steps": 1}))
    pipeline = SVQVAENextScalePipeline.from_pretrained(options["output_dir"])
    assert pipeline.transformer.config["num_classes"] == 0
    assert len(pipeline(num_images_per_prompt=2).images) == 2
    assert "num_images_per_prompt=4" in (ROOT / options["output_dir"] / "README.md").read_text()


# Schedules

SQUARES = [(side, side) for side in range(1, 17)]


def test_schedules_are_drawn_as_in_flexvar():
    """Figures of FlexVAR's own code, simulated 20,000 times, without its batches with the pipeline's schedule."""
    schedule = make_schedule((16, 16), 10)
    generator = torch.Generator().manual_seed(0)
    schedules = [draw_schedule(SQUARES, schedule, generator) for _ in range(4000)]
    drawn_sizes = set()
    for sizes in schedules:
        assert sizes == sorted(set(sizes))
        assert count_ids(sizes) <= 680
        drawn_sizes.update(sizes)
    assert drawn_sizes == set(SQUARES)
    assert np.mean([count_ids(sizes) for sizes in schedules]) == pytest.approx(586, abs=6)
    assert np.mean([(16, 16) not in sizes for sizes in schedules]) == pytest.approx(0.347, abs=0.03)
    lengths = np.array([len(sizes) for sizes in schedules])
    assert np.mean(lengths == 8) == pytest.approx(0.41, abs=0.03)
    assert np.mean(lengths == 9) == pytest.approx(0.505, abs=0.03)


# Mistakes and publishing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_set": "halves"}, "must hold the scales of the schedule, 1 x 1, .*, but lacks 1 x 1, 2 x 2"),
        ({"vqvae_name_or_path": "other"}, "codebook"),
        ({"output_dir": "latents"}, "`--output_dir` must not be the folder of `--token_set`, whose files would be"),
        ({"num_inference_steps": 0}, "`--num_inference_steps` must be at least 2, but is 0"),
        ({"schedule_share": 1.5}, r"`--schedule_share` must be in \[0, 1\], got 1.5"),
    ],
)
def test_mistakes_are_refused(options, parts, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    with cpu(), pytest.raises((ValueError, OSError), match=message):
        run_training(train_next_scale.train, NextScaleOptions(**(options | changes)))


def test_saved_pipeline_loads_and_has_a_card(options, parts):
    train(**(options | {"max_steps": 1}), hub_model_id="org/dreams")
    repository = Path(options["output_dir"])
    pipeline = SVQVAENextScalePipeline.from_pretrained(repository)
    assert isinstance(pipeline, SVQVAENextScalePipeline)
    assert pipeline(class_labels=[1], output_type="np").images.shape == (1, CROP, CROP, 3)
    assert_no_private_path(parts, repository)
    card = (repository / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "| token set | `latents` (licence: cc-by-4.0) |" in card
    assert "from svqvae_hf import SVQVAENextScalePipeline" in card
    assert "trained by | `training/train_next_scale.py`" in card
