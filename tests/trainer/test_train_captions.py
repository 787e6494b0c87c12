"""LlamaGen's language models trained on captions, new ones and converted ones, whole or by LoRA."""

import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, make_tiny
from peft import PeftModel
from PIL import Image
from pipeline_parts import text_components
from safetensors.torch import load_file
from train_autoregressive import AutoregressiveOptions, main
from training_runs import (
    NEW_RUN_OPTIONS,
    UNREAD_OPTIONS,
    assert_no_private_path,
    assert_resumed_run_reads_changed_options,
    cpu,
    run,
    train_at_once_and_resumed,
)

from svqvae_hf import SVQVAEAutoregressivePipeline
from svqvae_hf.conversion.convert_generator import convert_generator
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.captions import CaptionEncoder, StoredCaptions, store_captions
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource

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
    pytest.mark.usefixtures("one_accelerator"),
    # peft asks transformers for it, whenever it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
train = partial(run, main, AutoregressiveOptions)


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
    convert_generator(
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


def test_captioned_images_learned_by_heart_come_back(options, parts):
    """docs/generation.md has a longer run, of 64 images."""
    learn = {"max_train_steps": 120, "learning_rate": 5e-3, "train_batch_size": 8, "label_dropout": 0.0}
    train(**(options | learn | {"logging_steps": 50}), caption_features=str(Path(options["output_dir"]) / "features"))
    ids = load(Path(options["output_dir"]))(prompt=CAPTIONS, **GREEDY).images
    assert torch.equal(ids.flatten(1), expected_ids(parts))


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


def test_fine_tuning_starts_from_the_converted_weights(fine_tuning, parts):
    train(**(fine_tuning | {"learning_rate": 1e-9, "max_train_steps": 1}))
    tuned, converted = (load(Path(folder)) for folder in (fine_tuning["output_dir"], parts / "converted"))
    for (name, weight), other in zip(
        tuned.language_model.named_parameters(), converted.language_model.parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=0, msg=name)
    assert torch.equal(tuned.language_model.uncond_embedding, converted.language_model.uncond_embedding)
    assert tuned.text_encoder.dtype == converted.text_encoder.dtype


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_equals_an_unbroken_one(options, fine_tuning, lora):
    chosen = fine_tuning | {"lora_rank": 2} if lora else options
    weights = "adapter_model.safetensors" if lora else "language_model/model.safetensors"
    whole, resumed = train_at_once_and_resumed(train, weights, chosen)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_resumed_run_applies_each_changed_option(options, monkeypatch):
    changes = NEW_RUN_OPTIONS | {"label_dropout": 0.5, "num_validation_images": 1, "guidance_scale": 2.0}
    assert_resumed_run_reads_changed_options(
        monkeypatch,
        main,
        AutoregressiveOptions,
        options | {"use_ema": True},
        changes | {"validation_prompts": ["a cat"]},
        UNREAD_OPTIONS - {"max_unreadable_share"},
    )


def test_a_random_caption_of_several_is_drawn(parts, tmp_path):
    shutil.copytree(parts / "tokens", tmp_path / "tokens")
    several = [["a cat", "the cat on the roof"], ["the roof"], ["on", "on on", "on on on"]]
    write_captions(tmp_path / "tokens", several)
    source = TokenSource(str(tmp_path / "tokens"), None, "caption")
    assert source.layout.num_classes == 1
    encoder = CaptionEncoder(**text_components(), length=8)
    encoder.text_encoder.bfloat16()
    store_captions(tmp_path / "features", source, encoder)
    stored = StoredCaptions(tmp_path / "features", source, encoder)
    lengths: dict[int, set[int]] = {}
    for index, batch in enumerate(SequenceLoader(source, 4, 20, 7, 0, 1)):
        drawn, kept = (each.draw(batch, torch.Generator().manual_seed(index)) for each in (encoder, stored))
        assert torch.equal(drawn["prompt_attention_mask"], kept["prompt_attention_mask"])
        torch.testing.assert_close(drawn["prompt_embeds"], kept["prompt_embeds"], atol=0.05, rtol=0)
        for row, length in zip(batch.rows.tolist(), drawn["prompt_attention_mask"].sum(1).tolist(), strict=True):
            lengths.setdefault(row, set()).add(length)
    assert lengths == {row: [{3, 6}, {3}, {2, 3, 4}][row % 3] for row in range(8)}


@pytest.mark.parametrize("kept", [False, True])
def test_long_captions_are_cut(options, parts, tmp_path, kept):
    """Features are of the first 7 words and the token that ends a text."""
    tuned = []
    for name, caption in (("long", "a cat on the roof on the roof"), ("cut", "a cat on the roof on the")):
        shutil.copytree(parts / "tokens", tmp_path / name)
        write_captions(tmp_path / name, [caption])
        folders = {"token_set": str(tmp_path / name), "output_dir": str(tmp_path / f"{name}_out")}
        features = str(tmp_path / f"{name}_features") if kept else None
        train(**(options | folders | {"num_validation_images": 1}), caption_features=features)
        tuned.append(load_file(tmp_path / f"{name}_out" / "language_model" / "model.safetensors"))
    torch.testing.assert_close(*tuned, rtol=0, atol=0)


def test_dropped_captions_are_not_read(options, monkeypatch):
    seen = []
    draw = CaptionEncoder.draw
    monkeypatch.setattr(CaptionEncoder, "draw", lambda *args: seen.append(draw(*args)) or seen[-1])
    once = options | {"label_dropout": 1.0, "max_train_steps": 1}
    train(**once)
    monkeypatch.setattr(CaptionEncoder, "draw", lambda *args: {name: each * 2 for name, each in draw(*args).items()})
    train(**(once | {"output_dir": options["output_dir"] + "2"}))
    files = [
        Path(folder) / "language_model" / "model.safetensors"
        for folder in (once["output_dir"], once["output_dir"] + "2")
    ]
    torch.testing.assert_close(load_file(files[0]), load_file(files[1]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "key2"}, "must hold texts or lists of texts, but 'key2' holds None"),
        ({"caption_column": "height"}, "must hold texts or lists of texts, but 'height' holds Value"),
        ({"text_encoder_name_or_path": None}, "`--caption_column` needs a text encoder"),
        ({"model_config_name_or_path": "llama.json"}, "LlamaForCausalLM takes none. Use a config of type llamagen"),
        ({"label_column": "label"}, "Only one of `--caption_column` and `--label_column`"),
        ({"caption_column": None}, "`--text_encoder_name_or_path` needs `--caption_column`"),
        ({"lora_rank": 2}, "`--lora_rank` needs `--pretrained_model_name_or_path`"),
        ({"pretrained_model_name_or_path": "converted"}, "Exactly one of `--model_config_name_or_path`"),
        ({"token_set": "no_captions"}, "must hold a caption in each row, but 'caption' has empty"),
        ({"token_set": "empty"}, "must hold a caption in each row, but 'caption' has empty"),
        ({"token_set": "empty_lists"}, "must hold a caption in each row, but 'caption' has empty"),
        ({"token_set": "wide"}, "has 4 x 4 ids per image, but images of 16 x 32"),
        ({"caption_features": "features"}, "must hold features of this token set by this text encoder"),
    ],
)
def test_wrong_inputs_are_one_error(options, parts, tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    if not (parts / "wide").exists():
        make_wrong_parts(parts)
    with cpu(), pytest.raises((ValueError, OSError), match=message):
        main(AutoregressiveOptions(**(options | changes)))


def make_wrong_parts(parts: Path) -> None:
    (parts / "llama.json").write_text(json.dumps(LLAMAGEN | {"model_type": "llama"}))
    for name, captions in (
        ("no_captions", ["a cat", None]),
        ("empty", ["a cat", ""]),
        ("empty_lists", [["a cat"], []]),
        ("other", ["the cat"]),
        ("wide", CAPTIONS),
    ):
        shutil.copytree(parts / "tokens", parts / name)
        write_captions(parts / name, captions)
    (file,) = (parts / "wide").rglob("*.parquet")
    table = pq.read_table(file)
    width = table.column_names.index("width")
    table = table.set_column(width, "width", pa.array([32] * len(table)))
    pq.write_table(table, file)
    source = TokenSource(str(parts / "other"), None, "caption")
    store_captions(parts / "features", source, CaptionEncoder(**text_components(), length=16))


def test_another_pipeline_than_the_token_sets_is_an_error(fine_tuning, parts, tmp_path):
    pipeline = load(parts / "converted")
    tokens = tmp_path / "tokens"
    tokenize_set(
        pipeline.vqvae, open_images([str(parts / "photos")]), tokens, model_name="vqvae", crops="centre", resolution=8
    )
    write_captions(tokens, CAPTIONS)
    with cpu(), pytest.raises(ValueError, match="must have the sequences of the pretrained pipeline.*height=16"):
        main(AutoregressiveOptions(**(fine_tuning | {"token_set": str(tokens)})))
