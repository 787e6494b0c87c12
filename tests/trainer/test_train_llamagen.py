"""LlamaGen's language models trained on classes and captions, new ones and converted ones, whole or by LoRA."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, make_tiny
from language_options import read_run_options
from peft import PeftModel
from PIL import Image
from pipeline_parts import text_components
from s3_server import make_bucket, s3_server
from safetensors.torch import load_file
from token_set_parts import replace_column
from train_llamagen import LlamaGenOptions, main
from training_runs import assert_no_private_path
from transformers import TrainingArguments

import svqvae_cli
from svqvae_hf import LlamaGenForCausalLM, SVQVAEAutoregressivePipeline
from svqvae_hf.conversion.convert import convert
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.options import read_options
from svqvae_hf.trainer.pipeline_run import open_token_sets
from svqvae_hf.trainer.scripts import one_line_errors

CAPTIONS = ["a cat", "the cat", "a roof", "the roof"]
CAPTIONS += ["a cat on a roof", "the cat on the roof", "a roof on a cat", "on"]
LLAMAGEN = {
    **{"model_type": "llamagen", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_condition_tokens": 8},
}
GOLDEN = ROOT / "tests" / "golden" / "llamagen_gpt_t2i_tiny.pt"
GREEDY = {"temperature": 0, "output_type": "latent"}
LEARN = {"per_device_train_batch_size": 8, "condition_dropout": 0.0, "lr_scheduler_type": "cosine"}
WEIGHTS = "language_model/model.safetensors"

pytestmark = [
    # peft asks transformers for it, whenever it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


def train(**options) -> Path:
    """Trains, and returns the output folder."""
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"} | options
    own = {name: options.pop(name) for name in list(options) if name in LlamaGenOptions.__dataclass_fields__}
    main(LlamaGenOptions(**own), TrainingArguments(**options))
    return Path(options["output_dir"])


def write_captions(folder: Path, captions: list) -> None:
    """Adds a column of captions to a token set of 8 images, or replaces it."""
    repeated = [captions[index % len(captions)] for index in range(len(CAPTIONS))]
    replace_column(folder, "caption", repeated, rows_per_group=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tokenizer, a text encoder, configs, token sets of 8 images of 16 x 16 pixels, and a converted pipeline."""
    folder = tmp_path_factory.mktemp("parts")
    vqvae = make_tiny(codebook_size=256)
    vqvae.save_pretrained(folder / "vqvae")
    make_tiny(codebook_size=65).save_pretrained(folder / "other")
    (folder / "llamagen.json").write_text(json.dumps(LLAMAGEN))
    (folder / "one_token.json").write_text(json.dumps(LLAMAGEN | {"num_condition_tokens": 1}))
    (folder / "typo.json").write_text(json.dumps(LLAMAGEN | {"hiden_size": 64}))
    (folder / "llama.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    for component in text_components().values():
        component.save_pretrained(folder / "t5")
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for name, down in (("photos", 0), ("others", 90)):
            for index in range(len(CAPTIONS)):
                corner = 50 * index, 37 * index % 100 + down
                path = folder / name / f"class{index}" / "photo.png"
                path.parent.mkdir(parents=True)
                photo.convert("RGB").crop((*corner, corner[0] + 20, corner[1] + 16)).save(path)
    shutil.copytree(folder / "others", folder / "renamed")
    (folder / "renamed" / "class7").rename(folder / "renamed" / "cat")
    crops = {"crops": "centre", "resolution": 16}
    for name, source, settings in (
        ("other_names", "renamed", crops),
        ("tokens", "photos", crops),
        ("held_out", "others", crops),
        ("scales", "photos", crops | {"scales": [0.5, 1.0]}),
        ("oblong", "photos", {}),
    ):
        images = open_images([str(folder / source)])
        tokenize_set(vqvae, images, folder / name, model_name="vqvae", scale_from="image", **settings)
    for name, captions in (("captioned", CAPTIONS), ("no_captions", ["a cat", None])):
        shutil.copytree(folder / "tokens", folder / name)
        write_captions(folder / name, captions)
    settings = {"image_size": 16, "num_attention_heads": 4, "text_encoder": str(folder / "t5")}
    convert(GOLDEN, folder / "converted", folder / "vqvae", **settings)
    return folder


@pytest.fixture
def classes(parts, tmp_path):
    """Options of a tiny run of a new model for classes."""
    paths = {"vqvae_name_or_path": f"{parts}/vqvae", "model_config_name_or_path": f"{parts}/llamagen.json"}
    paths |= {"token_set": f"{parts}/tokens", "output_dir": f"{tmp_path}/out", "label_column": "label"}
    return paths | {"per_device_train_batch_size": 3, "max_steps": 2, "logging_steps": 1}


@pytest.fixture
def captions(classes, parts):
    """Options of a tiny run of a new model for captions."""
    encoder = str(parts / "t5")
    changes = {"label_column": None, "caption_column": "caption", "token_set": str(parts / "captioned")}
    return classes | changes | {"text_encoder_name_or_path": encoder}


@pytest.fixture
def fine_tuning(captions, parts):
    """Options of a tiny run of the converted model."""
    names = ("model_config_name_or_path", "text_encoder_name_or_path", "vqvae_name_or_path")
    return captions | dict.fromkeys(names) | {"pipeline_name_or_path": str(parts / "converted")}


def load(folder: Path) -> SVQVAEAutoregressivePipeline:
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected_ids(parts: Path) -> torch.Tensor:
    (file,) = (parts / "tokens").rglob("*.parquet")
    return torch.tensor(pq.read_table(file)["ids_0"].to_pylist())


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["classes", "captions"])
def test_images_learned_by_heart_come_back(condition, request, parts):
    options = request.getfixturevalue(condition) | LEARN | {"max_steps": 120, "learning_rate": 5e-3}
    pipeline = load(train(**options))
    call = {"class_labels": list(range(8))} if condition == "classes" else {"prompt": CAPTIONS}
    assert torch.equal(pipeline(**call, **GREEDY).images.flatten(1), expected_ids(parts))


def test_new_weights_are_a_function_of_the_seed(classes, tmp_path):
    def head_of_run(name, seed):
        options = {"max_steps": 1, "learning_rate": 0.0, "output_dir": str(tmp_path / name), "seed": seed}
        return load_file(train(**classes | options) / WEIGHTS)["lm_head.weight"]

    head = head_of_run("first", seed=1)
    assert torch.equal(head_of_run("again", seed=1), head)
    assert not torch.equal(head_of_run("other", seed=2), head)


def test_the_log_counts_the_passes_over_the_rows(classes, capsys):
    train(**classes, gradient_accumulation_steps=2)  # 6 of 8 rows in a step
    epochs = re.findall(r" epoch (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert epochs == ["0.75", "1.5", "1.5"], "after each step, and at the end"


@pytest.mark.slow
def test_lora_learns_images_by_heart_and_can_be_switched_off(fine_tuning, parts):
    before = load(parts / "converted")(prompt=CAPTIONS, **GREEDY, guidance_scale=2).images
    folder = train(**(fine_tuning | LEARN | {"max_steps": 90, "learning_rate": 2e-2}), lora_rank=16)
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    assert all((folder / name).is_file() for name in names)
    assert_no_private_path(parts, folder)
    card = (folder / "README.md").read_text()
    assert "LoRA adapter for `converted`" in card
    assert 'SVQVAEAutoregressivePipeline.from_pretrained("converted")' in card
    pipeline = load(parts / "converted")
    adapter = PeftModel.from_pretrained(pipeline.language_model, folder)
    assert torch.equal(pipeline(prompt=CAPTIONS, **GREEDY).images.flatten(1), expected_ids(parts))
    with adapter.disable_adapter():
        assert torch.equal(pipeline(prompt=CAPTIONS, **GREEDY, guidance_scale=2).images, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["classes", "captions", "fine_tuning", "remote"])
def test_ten_steps_and_ten_more_equal_twenty(kind, request, tmp_path, monkeypatch, parts):
    options = request.getfixturevalue("classes" if kind == "remote" else kind)
    options |= {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, "replaced_fraction": 0.5}
    options |= {"lora_rank": 2} if kind == "fine_tuning" else {"optimizer": "muon" if kind == "classes" else "soap"}
    weights = "adapter_model.safetensors" if kind == "fine_tuning" else WEIGHTS
    whole = load_file(train(**(options | {"output_dir": str(tmp_path / "whole")})) / weights)
    out = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", out / "checkpoint-10")
    options |= {"output_dir": str(out), "resume_from_checkpoint": "latest"}
    if kind == "remote":
        with s3_server() as (address, faults):
            make_bucket("bucket", address, monkeypatch)
            fsspec.filesystem("s3").put(f"{parts}/tokens/", "bucket/tokens/", recursive=True)
            train(**(options | {"token_set": "s3://bucket/tokens"}))
            assert any(request.startswith("GET") and request.endswith(".parquet") for request in faults.requests)
    else:
        train(**options)
    torch.testing.assert_close(load_file(out / weights), whole, rtol=0, atol=0)


@pytest.mark.slow
def test_commands_of_the_documentation_train_validate_and_draw(classes, parts, tmp_path, monkeypatch, capsys):
    options = classes | {"validation_token_set": str(parts / "held_out"), "eval_strategy": "steps", "eval_steps": 10}
    options |= {"max_steps": 20, "logging_steps": 10, "learning_rate": 1e-2, "hub_model_id": "org/dreams"}
    options |= {"license": "mit", "use_cpu": True, "bf16": True, "report_to": "none", "optimizer": "soap"}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    main(*read_options((LlamaGenOptions, TrainingArguments), flags))
    shown = capsys.readouterr().out
    assert shown.count(" eval_bits_per_id ") == 3, "before the first step, and once after the last"
    assert shown.index("eval_loss_image") < shown.index(" loss_image")
    folder = Path(options["output_dir"])
    assert_no_private_path(parts, folder)
    card = (folder / "README.md").read_text()
    assert "from svqvae_hf import SVQVAEAutoregressivePipeline" in card
    for row in ("trained by | `training/train_llamagen.py`", "classes | class0, class1", "token set | `tokens`"):
        assert row in card
    for row in ("steps | 20 of 3 examples", "| loss image |", "| eval bits per id |", "license: mit"):
        assert row in card
    assert load(folder).config.class_names[:2] == ["class0", "class1"]
    call = ["--class", "class1", "1", "--num-images", "3", "--guidance-scale", "2", "--device", "cpu"]
    assert svqvae_cli.main(["generate", "--model", str(folder), *call, "--output", str(tmp_path / "new")]) == 0
    assert len([*(tmp_path / "new").glob("*.png")]) == 2 * 3


@pytest.fixture
def moved(classes, parts, tmp_path):
    """Options of a run whose folder was moved before its result was saved. Its best checkpoint is the first."""
    changes = {"validation_token_set": str(parts / "held_out"), "eval_strategy": "steps", "eval_steps": 1}
    changes |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    options = classes | changes
    folder = train(**options)
    newest = folder / "checkpoint-2"
    state = json.loads((newest / "trainer_state.json").read_text())
    state |= {"best_model_checkpoint": str(folder / "checkpoint-1"), "best_global_step": 1}
    (newest / "trainer_state.json").write_text(json.dumps(state))
    for path in (newest / "checksums.json", folder / "finished_run.json"):
        path.unlink()
    folder.rename(tmp_path / "moved")
    return options | {"output_dir": str(tmp_path / "moved"), "resume_from_checkpoint": "latest"}


def test_a_moved_run_saves_its_best_weights(moved):
    folder = train(**moved)
    best = load_file(folder / "checkpoint-1" / "model.safetensors")
    torch.testing.assert_close(load_file(folder / WEIGHTS), best, rtol=0, atol=0)
    assert "| weights | after step 1, with the best validation |" in (folder / "README.md").read_text()


def test_a_run_without_its_best_checkpoint_is_not_resumed(moved):
    shutil.rmtree(Path(moved["output_dir"], "checkpoint-1"))
    with pytest.raises(ValueError, match="needs the best checkpoint of the run, checkpoint-1, but it is not beside"):
        train(**moved)


def test_a_run_is_not_resumed_with_other_labels(classes):
    train(**classes | {"save_strategy": "steps"})
    changes = {"label_column": None, "max_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="`--label_column` must be label as in `.*checkpoint-2`, got None"):
        train(**classes | changes)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="the package is there")
def test_an_attention_without_its_package_is_one_line(classes, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train(**classes | {"attn_implementation": "flash_attention_2"})
    assert stop.value.code == 2
    assert "FlashAttention2" in capsys.readouterr().err.splitlines()[-1]


def test_a_recipe_in_bfloat16_is_read_on_a_cpu(classes, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    recipe = str(ROOT / "training" / "configs" / "train_llamagen.yaml")
    words = ["--vqvae_name_or_path", "org/model", "--token_set", "tokens", "--output_dir", classes["output_dir"]]
    options, arguments = read_run_options(LlamaGenOptions, [recipe, *words])
    assert options.label_column == "label"
    assert arguments.bf16
    assert arguments.use_cpu


@pytest.mark.parametrize("condition_dropout", [0.0, 1.0])
def test_a_random_caption_of_several_is_read_and_cut_unless_it_is_dropped(
    captions, parts, tmp_path, monkeypatch, condition_dropout
):
    shutil.copytree(parts / "captioned", tmp_path / "tokens")
    write_captions(tmp_path / "tokens", [["a cat", "the cat on the roof"], ["on the roof on the roof on"]])
    lengths, tokens = set(), set()

    def record(self, *args, **kwargs):
        lengths.update(kwargs["prompt_attention_mask"].sum(1).tolist())
        tokens.update(kwargs["input_ids"][:, 0].tolist())
        return forward(self, *args, **kwargs)

    forward = LlamaGenForCausalLM.forward
    monkeypatch.setattr(LlamaGenForCausalLM, "forward", record)
    changes = {"token_set": str(tmp_path / "tokens"), "condition_dropout": condition_dropout, "max_steps": 6}
    train(**(captions | changes))
    assert lengths == {3, 6, 8}
    assert tokens == {257 if condition_dropout else 256}  # "no caption", or "with its caption"


def test_a_pipeline_is_trained_further_with_its_own_classes(classes, parts):
    names = [f"class{index}" for index in range(8)]
    options = SimpleNamespace(**classes, caption_column=None, validation_token_set=None)
    with pytest.raises(ValueError, match="must have the model's classes, class7, .*, but has class0, "):
        open_token_sets(options, make_tiny(codebook_size=256), names[::-1])


def test_held_out_images_may_lack_classes(classes, parts, tmp_path):
    for name in ("class5", "class2"):
        shutil.copytree(parts / "others" / name, tmp_path / "photos" / name)
    images = open_images([str(tmp_path / "photos")])
    crops = {"crops": "centre", "resolution": 16, "scale_from": "image"}
    vqvae = make_tiny(codebook_size=256)
    tokenize_set(vqvae, images, tmp_path / "few", model_name="vqvae", **crops)
    options = SimpleNamespace(**(classes | {"validation_token_set": str(tmp_path / "few")}), caption_column=None)
    source, held_out = open_token_sets(options, vqvae)
    assert (held_out.num_classes, held_out.class_names) == (source.num_classes, source.class_names)
    assert held_out.batch([0, 1]).labels.tolist() == [2, 5]


def test_the_last_class_without_a_name_may_be_absent_from_held_out_images(classes, parts, tmp_path):
    for name, numbers in (("tokens", [0, 1, 2, 3, 4, 5, 6, 7]), ("held_out", [0, 1, 2, 3, 4, 5, 5, 5])):
        shutil.copytree(parts / name, tmp_path / name)
        replace_column(tmp_path / name, "label", numbers)
    sets = {"token_set": str(tmp_path / "tokens"), "validation_token_set": str(tmp_path / "held_out")}
    options = SimpleNamespace(**(classes | sets), caption_column=None)
    source, held_out = open_token_sets(options, make_tiny(codebook_size=256))
    assert (source.num_classes, held_out.num_classes) == (8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_set": "oblong"}, r"one scale of 4 x 4 ids .* but has scales of \[\(4, 5\)\] ids"),
        ({"token_set": "scales"}, r"but has scales of \[\(2, 2\), \(4, 4\)\] ids"),
        (
            {"vqvae_name_or_path": "other"},
            "codebook.*Pass `--vqvae_name_or_path` with the model that encoded them, `vqvae`",
        ),
        ({"output_dir": "tokens"}, "`--output_dir` must not be the folder of `--token_set`, whose files would be"),
        ({"label_column": "key"}, "`--label_column` must hold a class, or an integer of at least 0, in each row, but"),
        ({"model_config_name_or_path": "nowhere.json"}, "`--model_config_name_or_path` must be a file, folder or Hub"),
        ({"text_encoder_name_or_path": "nowhere"}, "`--text_encoder_name_or_path` must be a file, folder or Hub id"),
        (
            {"vqvae_name_or_path": "out/nowhere"},
            "could not load the model `out/nowhere`: there is no such folder, and",
        ),
        ({"model_config_name_or_path": "typo.json"}, "must have only keys of its class, but has hiden_size"),
        ({"model_config_name_or_path": "llama.json"}, "must be a config of type llamagen, but `llama.json` is"),
        ({"validation_token_set": "tokens"}, "not trained on, but `class0/photo.png` of .* is also in"),
        (
            {"validation_token_set": "other_names"},
            "only classes of the token set, but also has cat. .* `--label_column none`",
        ),
        (
            {"validation_token_set": "scales"},
            r"must have the grids of ids of the token set, \[\(4, 4\)\], but has .*4\)\]. T",
        ),
        ({"caption_column": "caption"}, "Only one of `--caption_column` and `--label_column`"),
        ({"label_column": None, "caption_column": "height"}, "must hold texts or lists of texts, but 'height' holds"),
        ({"label_column": None, "caption_column": "caption", "token_set": "captioned"}, "and only for one"),
        ({"label_column": None, "caption_column": "caption", "token_set": "no_captions"}, "has empty rows"),
        (
            {"label_column": None, "caption_column": "caption", "token_set": "captioned"}
            | {"text_encoder_name_or_path": "t5", "model_config_name_or_path": "one_token.json"},
            "`num_condition_tokens` of `one_token.json` must be the number of tokens of a caption",
        ),
        ({"text_encoder_name_or_path": "t5"}, "`--caption_column` must be given for a LlamaGen with a text encoder"),
        ({"lora_rank": 2}, "`--lora_rank` must be left out"),
        ({"pipeline_name_or_path": "converted"}, "Pass one of `--pipeline_name_or_path` and `--model_config_name_or"),
    ],
)
def test_wrong_inputs_are_one_error(classes, parts, changes, message, monkeypatch):
    monkeypatch.chdir(parts)
    with pytest.raises((ValueError, OSError), match=message):
        train(**(classes | changes))
    assert not list(Path(classes["output_dir"]).glob("checkpoint-*"))
