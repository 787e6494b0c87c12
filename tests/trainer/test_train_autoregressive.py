"""LlamaGen models trained on the ids of a tiny SVQVAE, and their pipelines."""

import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import train_autoregressive
from conftest import ROOT, make_tiny
from PIL import Image
from s3_server import make_bucket, s3_server
from train_autoregressive import AutoregressiveOptions, next_code_loss
from training_runs import assert_no_private_path, cpu, forget_accelerate, logged, run, train_at_once_and_resumed

import svqvae_cli
from svqvae_hf import SVQVAE, LlamaGenForCausalLM
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource
from svqvae_hf.trainer.options import read_options
from svqvae_hf.trainer.run import run_training

LLAMAGEN = {"model_type": "llamagen", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMAGEN["num_attention_heads"] = 2
SCALES = (1.0, 0.5)  # not in the order of the sequence
CROP = 32
IMAGES = 6
WEIGHTS = "language_model/model.safetensors"

train = partial(run, train_autoregressive.train, AutoregressiveOptions)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny SVQVAE, one of another codebook, a config, and token sets of six photographs in two classes."""
    folder = tmp_path_factory.mktemp("parts")
    vqvae = make_tiny()
    vqvae.save_pretrained(folder / "vqvae")
    make_tiny(codebook_size=65).save_pretrained(folder / "other")
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(IMAGES):
            path = folder / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.convert("RGB").crop((60 * index, 0, 60 * index + 64, 64 + index)).save(path)
            other = folder / "others" / path.relative_to(folder / "photos")  # of the same names
            other.parent.mkdir(parents=True, exist_ok=True)
            photo.convert("RGB").crop((60 * index, 80, 60 * index + 64, 144)).save(other)
    centre = {"crops": "centre", "resolution": CROP}
    for name, source, options in (
        ("tokens", "photos", centre),
        ("held_out", "others", centre),
        ("small", "others", centre | {"resolution": 16}),
        ("mixed", "photos", {}),
        ("two_scales", "photos", centre | {"scales": SCALES}),
    ):
        settings = {"model_name": "vqvae", "scales": (1.0,), "scale_from": "image", **options}
        tokenize_set(vqvae, open_images([str(folder / source)]), folder / name, **settings)
    for name, config in {
        "llamagen": LLAMAGEN,
        "typo": LLAMAGEN | {"hiden_size": 64},
        "llama": LLAMAGEN | {"model_type": "llama"},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "text_model").mkdir()
    (folder / "text_model" / "config.json").write_text(json.dumps(LLAMAGEN))
    (folder / "text_model" / "model.safetensors").touch()
    return folder


@pytest.fixture
def options(parts, tmp_path):
    """Options of a tiny run."""
    return {
        "vqvae_name_or_path": str(parts / "vqvae"),
        "model_config_name_or_path": str(parts / "llamagen.json"),
        "token_set": str(parts / "tokens"),
        "label_column": "label",
        "output_dir": str(tmp_path / "out"),
        **{"train_batch_size": 3, "max_train_steps": 2, "lr_warmup_steps": 0, "logging_steps": 1},
        "num_validation_images": 2,
    }


def read_rows(folder) -> dict[str, np.ndarray]:
    """Columns of a token set in the order of its rows."""
    paths = sorted(str(path) for path in folder.rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    return {
        name: np.array(table[name].to_pylist()) for name in table.column_names if name in ("ids_0", "ids_1", "label")
    }


def test_sequences_are_the_ids_of_the_images_coarse_to_fine(parts):
    source = TokenSource(str(parts / "two_scales"), "label")
    assert source.layout.scales == (0.5, 1.0)
    assert source.layout.num_classes == 2
    assert source.class_names == ["cat", "dog"]
    assert source.layout.scale_from == "image"
    order = [4, 0, 5]
    ids, labels = source.layout.decode(source.batch(order).sequences)
    rows = read_rows(parts / "two_scales")
    assert np.array_equal(labels.numpy(), rows["label"][order])
    for column, grids in zip(("ids_1", "ids_0"), ids, strict=True):
        assert np.array_equal(grids.flatten(1).numpy(), rows[column][order])


def test_every_epoch_has_each_row_once_over_all_processes(parts, monkeypatch):
    source = TokenSource(str(parts / "tokens"), None)
    monkeypatch.setattr(source, "batch", list)
    orders = [sum(SequenceLoader(source, 1, IMAGES, 7, process, 2), []) for process in range(2)]
    epochs = [[row for order in orders for row in order[start : start + IMAGES // 2]] for start in (0, IMAGES // 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(IMAGES))
    assert epochs[0] != epochs[1]
    batches = list(SequenceLoader(source, 4, 3, 7, 0, 1))  # the second goes over the end of an epoch
    order = sum(batches, [])
    assert sorted(order[:IMAGES]) == sorted(order[IMAGES:]) == list(range(IMAGES))
    resumed = SequenceLoader(source, 4, 3, 7, 0, 1)
    resumed.load_state_dict({"batch": 2, "order": resumed.order})
    assert list(resumed) == [order[8:]]
    with pytest.raises(ValueError, match="must have a row for each of the 7 processes, but has 6"):
        SequenceLoader(source, 1, 1, 7, 0, IMAGES + 1)


@pytest.mark.slow
def test_trained_model_gives_the_ids_of_its_images_back(options, parts):
    """docs/generation.md has a longer run, of 64 photographs."""
    for index, path in enumerate(sorted((parts / "photos").rglob("*.png"))):
        (parts / "classes" / str(index)).mkdir(parents=True)
        shutil.copy(path, parts / "classes" / str(index))
    vqvae = SVQVAE.from_pretrained(parts / "vqvae").eval()
    images = open_images([str(parts / "classes")])
    crops = {"crops": "centre", "resolution": CROP}
    tokenize_set(vqvae, images, parts / "six_tokens", model_name="vqvae", **crops)
    options |= {"token_set": str(parts / "six_tokens"), "max_train_steps": 300, "learning_rate": 5e-3}
    options |= {"train_batch_size": IMAGES, "label_dropout": 0.0, "logging_steps": 50, "num_validation_images": 0}
    train(**options)
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(options["output_dir"])
    labels = list(range(IMAGES))
    ids = pipeline(labels, temperature=0, output_type="latent").images
    rows = read_rows(parts / "six_tokens")
    for index, label in enumerate(rows["label"].tolist()):
        assert np.array_equal(ids[label].flatten().numpy(), rows["ids_0"][index])


@pytest.mark.slow
def test_from_photographs_to_a_grid_of_new_ones(options, parts, tmp_path):
    """The commands of docs/generation.md."""
    tokens, out = tmp_path / "token-set", tmp_path / "new"
    crops = ["--crops", "centre-flip", "--resolution", str(CROP)]
    model = ["--model", str(parts / "vqvae"), "--device", "cpu"]
    assert svqvae_cli.main(["tokenize", str(parts / "photos"), str(tokens), *crops, *model]) == 0
    train(**(options | {"token_set": str(tokens)}))
    call = ["--class", "cat", "1", "--num-images", "3", "--guidance-scale", "2"]
    assert svqvae_cli.main(["generate", options["output_dir"], *call, "--output", str(out), "--device", "cpu"]) == 0
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (3 * CROP, 2 * CROP)
    assert (out / "class_cat_2.png").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_resumed_runs_from_a_folder_and_a_url_equal_an_unbroken_one(options, parts, monkeypatch):
    def train_by_command(**options):
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        with cpu():
            run_training(train_autoregressive.train, read_options(AutoregressiveOptions, flags))
        forget_accelerate()

    whole, resumed = train_at_once_and_resumed(train_by_command, WEIGHTS, options)
    options |= {"token_set": "s3://bucket/tokens", "output_dir": f"{options['output_dir']}-remote"}
    with s3_server() as (address, faults):
        make_bucket("bucket", address, monkeypatch)
        fsspec.filesystem("s3").put(f"{parts}/tokens/", "bucket/tokens/", recursive=True)
        remote = train_at_once_and_resumed(train_by_command, WEIGHTS, options)
        assert any(request.startswith("GET") and request.endswith(".parquet") for request in faults.requests)
    for weights in (resumed, *remote):
        torch.testing.assert_close(weights, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_bf16_run_with_everything_on_learns_validates_and_shows_samples(options, parts, caplog):
    caplog.set_level(logging.INFO)
    options |= {"max_train_steps": 20, "learning_rate": 1e-2, "logging_steps": 10, "validation_steps": 20}
    train(
        **options, mixed_precision="bf16", use_ema=True, guidance_scale=2.0,
        report_to="tensorboard", validation_token_set=str(parts / "held_out"),
    )  # fmt: skip
    losses = logged(caplog, "train/loss")
    assert losses[20] < losses[10]
    validation = {name: logged(caplog, f"validation/{name}")[20] for name in ("loss", "accuracy", "bits_per_id")}
    assert losses[20] < validation["loss"]
    assert validation["bits_per_id"] == pytest.approx(validation["loss"] / np.log(2), rel=1e-3)
    output_dir = ROOT / options["output_dir"]
    with Image.open(output_dir / "samples" / "step-0000020.png") as grid:
        assert grid.size == (2 * CROP + 3 * 4, CROP + 2 * 4)


def test_dropped_labels_become_the_label_of_no_class(options, monkeypatch):
    seen = []

    def record(self, *args, **kwargs):
        if self.training:
            seen.append(kwargs["input_ids"].clone())
        return forward(self, *args, **kwargs)

    forward = LlamaGenForCausalLM.forward
    monkeypatch.setattr(LlamaGenForCausalLM, "forward", record)
    train(**(options | {"label_dropout": 1.0, "max_train_steps": 1, "num_validation_images": 0}))
    source = TokenSource(options["token_set"], "label")
    (batch,) = SequenceLoader(source, 3, 1, 0, 0, 1)
    assert (seen[0][:, 0] == source.layout.unconditional_token).all()
    assert torch.equal(seen[0][:, 1:], batch.sequences[:, 1:-1])


def test_only_codes_are_learned(parts):
    """Logits of separators and labels do not matter, nor do targets that are no codes."""
    layout = TokenSource(str(parts / "tokens"), "label").layout
    targets = torch.tensor([[3, layout.codebook_size, 5]])
    logits = torch.zeros(1, 3, layout.vocab_size)
    logits[..., layout.codebook_size :] = 100
    logits[0, 0, 3], logits[0, 1, 7] = 1e-4, 100
    loss, accuracy = next_code_loss(logits, targets, layout.codebook_size)
    assert loss.item() == pytest.approx(np.log(layout.codebook_size), abs=1e-3)
    assert accuracy == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_set": "mixed"}, "All rows of the token set must be of one size, but it has heights from 64 to 69"),
        ({"token_set": "photos"}, "a token set must be a folder with svqvae_tokens.json"),
        ({"vqvae_name_or_path": "other"}, "codebook"),
        (
            {"label_column": "key"},
            "`--label_column` must hold a class, or an integer of at least 0, in each row, but 'key'",
        ),
        ({"model_config_name_or_path": "typo.json"}, "must have only keys of its class, but has hiden_size"),
        ({"model_config_name_or_path": "llama.json"}, "of type llamagen, but `llama.json` is of type llama"),
        ({"model_config_name_or_path": "text_model"}, "`text_model` holds weights, which would be dropped"),
        ({"token_set": "two_scales"}, "reads ids of a square at one scale, but the token set has"),
        ({"validation_token_set": "tokens"}, "images that are not trained on, but `cat/0.png` is in both sets"),
        ({"validation_token_set": "small"}, "`--validation_token_set` must have the sequences of the token set"),
    ],
)
def test_mismatched_tokens_model_and_labels_are_refused(options, parts, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    with cpu(), pytest.raises((ValueError, OSError), match=message):
        run_training(train_autoregressive.train, AutoregressiveOptions(**(options | changes)))


def test_saved_pipeline_loads_and_has_a_card(options, parts):
    held_out = {"validation_token_set": str(parts / "held_out"), "max_train_steps": 1}
    train(**(options | held_out), hub_model_id="org/dreams", license="mit")
    repository = Path(options["output_dir"])
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(repository)
    assert isinstance(pipeline, SVQVAEAutoregressivePipeline)
    assert pipeline(class_labels=[1], output_type="np").images.shape == (1, CROP, CROP, 3)
    assert_no_private_path(parts, repository)
    card = (repository / "README.md").read_text()
    assert "from svqvae_hf import SVQVAEAutoregressivePipeline" in card
    assert "trained by | `training/train_autoregressive.py`" in card
    for row in ("classes | cat, dog", "token set | `tokens`", "train/loss | \\d", "validation/bits per id | \\d"):
        assert re.search(row.replace("|", r"\|"), card), row
