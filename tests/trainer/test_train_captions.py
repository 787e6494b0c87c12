"""LlamaGen's language models trained on captions, new ones and converted ones, whole or by LoRA."""

import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import train_autoregressive
from conftest import ROOT, make_tiny
from peft import PeftModel
from PIL import Image
from pipeline_parts import text_components
from train_autoregressive import AutoregressiveOptions
from training_runs import assert_no_private_path, cpu, run, train_at_once_and_resumed

from svqvae_hf import LlamaGenForCausalLM, SVQVAEAutoregressivePipeline
from svqvae_hf.conversion.convert import convert
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.run import run_training

CAPTIONS = [
    "a cat",
    "the cat",
    "a roof",
    "the roof",
    "a cat on a roof",
    "the cat on the roof",
    "a roof on a cat",
    "on",
]
LLAMAGEN = {
    **{"model_type": "llamagen", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_condition_tokens": 8},
}
GOLDEN = ROOT / "tests" / "golden" / "llamagen_gpt_t2i_tiny.pt"
GREEDY = {"temperature": 0, "output_type": "latent"}

pytestmark = [
    # peft asks transformers for it, whenever it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]
train = partial(run, train_autoregressive.train, AutoregressiveOptions)


def write_captions(folder: Path, captions: list) -> None:
    """Adds a column of captions to a token set."""
    (file,) = folder.rglob("*.parquet")
    table = pq.read_table(file)
    names = [name for name in table.column_names if name != "caption"]
    rows = [captions[index % len(captions)] for index in range(table.num_rows)]
    table = table.select(names).append_column("caption", pa.array(rows))
    metadata = {name: value for name, value in table.schema.metadata.items() if name != b"huggingface"}
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tokenizer, a text encoder, a token set of 8 images of 16 x 16 pixels with captions, a converted pipeline."""
    folder = tmp_path_factory.mktemp("parts")
    vqvae = make_tiny(codebook_size=256)
    vqvae.save_pretrained(folder / "vqvae")
    (folder / "llamagen.json").write_text(json.dumps(LLAMAGEN))
    for component in text_components().values():
        component.save_pretrained(folder / "t5")
    (folder / "photos").mkdir()
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(len(CAPTIONS)):
            corner = 50 * index, 37 * index % 200
            photo.convert("RGB").crop((*corner, corner[0] + 16, corner[1] + 16)).save(
                folder / "photos" / f"{index}.png"
            )
    images, crops = open_images([str(folder / "photos")]), {"crops": "centre", "resolution": 16}
    tokenize_set(vqvae, images, folder / "tokens", model_name="vqvae", scale_from="image", **crops)
    write_captions(folder / "tokens", CAPTIONS)
    convert(
        GOLDEN,
        folder / "converted",
        folder / "vqvae",
        image_size=16,
        num_attention_heads=4,
        text_encoder=str(folder / "t5"),
    )
    return folder


@pytest.fixture
def options(parts, tmp_path):
    """Options of a tiny run of a new model."""
    return {
        "vqvae_name_or_path": str(parts / "vqvae"),
        "model_config_name_or_path": str(parts / "llamagen.json"),
        "text_encoder_name_or_path": str(parts / "t5"),
        "token_set": str(parts / "tokens"),
        "caption_column": "caption",
        "output_dir": str(tmp_path / "out"),
        **{"train_batch_size": 3, "max_train_steps": 2, "lr_warmup_steps": 0, "logging_steps": 1},
        "num_validation_images": 0,
    }


@pytest.fixture
def fine_tuning(options, parts):
    """Options of a tiny run of the converted model."""
    changes = {"model_config_name_or_path": None, "text_encoder_name_or_path": None}
    return options | changes | {"pretrained_model_name_or_path": str(parts / "converted")}


def load(folder: Path) -> SVQVAEAutoregressivePipeline:
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected_ids(parts: Path) -> torch.Tensor:
    (file,) = (parts / "tokens").rglob("*.parquet")
    return torch.tensor(pq.read_table(file)["ids_0"].to_pylist())


@pytest.mark.slow
def test_captioned_images_learned_by_heart_come_back(options, parts):
    learn = {"max_train_steps": 120, "learning_rate": 5e-3, "train_batch_size": 8, "label_dropout": 0.0}
    train(**(options | learn | {"logging_steps": 50}))
    ids = load(Path(options["output_dir"]))(prompt=CAPTIONS, **GREEDY).images
    assert torch.equal(ids.flatten(1), expected_ids(parts))


@pytest.mark.slow
def test_lora_learns_images_by_heart_and_can_be_switched_off(fine_tuning, parts):
    before = load(parts / "converted")(prompt=CAPTIONS, **GREEDY, guidance_scale=2).images
    learn = {"max_train_steps": 60, "learning_rate": 2e-2, "train_batch_size": 8, "label_dropout": 0.0}
    train(**(fine_tuning | learn | {"logging_steps": 50, "adam_weight_decay": 0.0}), lora_rank=16)
    folder = Path(fine_tuning["output_dir"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert_no_private_path(parts, folder)
    assert "`converted`" in (folder / "README.md").read_text()
    pipeline = load(parts / "converted")
    adapter = PeftModel.from_pretrained(pipeline.language_model, folder)
    assert torch.equal(pipeline(prompt=CAPTIONS, **GREEDY).images.flatten(1), expected_ids(parts))
    with adapter.disable_adapter():
        assert torch.equal(pipeline(prompt=CAPTIONS, **GREEDY, guidance_scale=2).images, before)


@pytest.mark.slow
def test_resumed_run_of_an_adapter_equals_an_unbroken_one(fine_tuning):
    whole, resumed = train_at_once_and_resumed(train, "adapter_model.safetensors", fine_tuning | {"lora_rank": 2})
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("label_dropout", [0.0, 1.0])
def test_a_random_caption_of_several_is_read_and_cut_unless_it_is_dropped(
    options, parts, tmp_path, monkeypatch, label_dropout
):
    shutil.copytree(parts / "tokens", tmp_path / "tokens")
    write_captions(tmp_path / "tokens", [["a cat", "the cat on the roof"], ["on the roof on the roof on"]])
    lengths, tokens = set(), set()

    def record(self, *args, **kwargs):
        if self.training:
            lengths.update(kwargs["prompt_attention_mask"].sum(1).tolist())
            tokens.update(kwargs["input_ids"][:, 0].tolist())
        return forward(self, *args, **kwargs)

    forward = LlamaGenForCausalLM.forward
    monkeypatch.setattr(LlamaGenForCausalLM, "forward", record)
    changes = {"token_set": str(tmp_path / "tokens"), "label_dropout": label_dropout, "max_train_steps": 6}
    train(**(options | changes))
    assert lengths == {3, 6, 8}
    assert tokens == {257 if label_dropout else 256}  # "no caption", or "with its caption"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "height"}, "must hold texts or lists of texts, but 'height' holds Value"),
        ({"text_encoder_name_or_path": None}, "`--caption_column` needs a text encoder"),
        ({"label_column": "label"}, "Only one of `--caption_column` and `--label_column`"),
        ({"caption_column": None}, "`--text_encoder_name_or_path` needs `--caption_column`"),
        ({"lora_rank": 2}, "`--lora_rank` needs `--pretrained_model_name_or_path`"),
        ({"token_set": "no_captions"}, "must hold a caption in each row, but 'caption' has empty"),
    ],
)
def test_wrong_inputs_are_one_error(options, parts, tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    if changes.get("token_set") and not (parts / "no_captions").exists():
        shutil.copytree(parts / "tokens", parts / "no_captions")
        write_captions(parts / "no_captions", ["a cat", None])
    with cpu(), pytest.raises((ValueError, OSError), match=message):
        run_training(train_autoregressive.train, AutoregressiveOptions(**(options | changes)))
