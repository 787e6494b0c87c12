import re
import shlex
from dataclasses import fields

import pytest
import torch.distributed.run
import yaml
from conftest import ROOT
from diffusion_options import DiffusionOptions
from train_language_model import LanguageModelOptions
from train_llamagen import LlamaGenOptions
from train_next_scale import NextScaleOptions
from transformers import TrainingArguments

from svqvae_hf import DEFAULT_MODEL, SVQVAE
from svqvae_hf.trainer.options import PATH_OPTIONS, check_models, read_options
from svqvae_hf.trainer.train_options import TrainOptions

NEEDED = {"output_dir": "out", "model_config_name_or_path": "model.json", "train_data_dir": "photos"}


def test_flags_and_file_are_equal_and_flags_override_the_file(tmp_path):
    options = {"crop_sizes": [64, 128], "learning_rate": 1e-3, "use_ema": True, "random_flip": False}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(NEEDED | options | {"save_total_limit": None}))
    flags = [f"--{name}={value}" for name, value in NEEDED.items()]
    flags += ["--crop_sizes", "64", "128", "--learning_rate=1e-3", "--use_ema", "--no_random_flip"]
    expected = TrainOptions(**NEEDED, **options)
    assert read_options([TrainOptions], [str(file)]) == read_options([TrainOptions], flags) == (expected,)
    assert read_options([TrainOptions], [str(file), "--learning_rate", "1e-4"])[0].learning_rate == 1e-4


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (64, 2)])
def test_by_default_there_are_no_more_workers_than_cores(cores, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert TrainOptions(**NEEDED).num_workers == workers
    assert TrainOptions(**NEEDED, dataloader_num_workers=5).num_workers == 5


def test_an_error_says_which_options_the_file_sets(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("load_best_model_at_end: true\nmax_steps: 800\nwarmup_steps: 20\n")
    words = [str(file)] + [f"--{name}={value}" for name, value in NEEDED.items()]
    with pytest.raises(ValueError, match="needs .*_at_end false`. .*/config.yaml sets `--load_best_model_at_end`[.]$"):
        read_options([TrainOptions], words)
    words += ["--load_best_model_at_end", "false"]
    with pytest.raises(ValueError, match="than `--max_steps` = 20, .*/config.yaml sets `--warmup_steps`[.]$"):
        read_options([TrainOptions], [*words, "--max_steps", "20"])
    with pytest.raises(ValueError, match="`--seed` must be .*, got -1.*[.]$"):
        read_options([TrainOptions], [*words, "--seed", "-1"])


def test_values_of_a_file_are_read_as_those_of_flags(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(NEEDED) + "mixed_precision: no\nmax_steps: 0100\nsave_total_limit:\nuse_ema: yes\n")
    (options,) = read_options([TrainOptions], [str(file)])
    assert (options.mixed_precision, options.max_steps, options.use_ema) == ("no", 100, True)
    assert options.save_total_limit is None


def test_only_paths_of_a_file_are_joined_to_its_folder(tmp_path):
    for name in ("train", "linear", "image", "model.json", "held_out"):
        (tmp_path / name).mkdir()
    words = {"split": "train", "start": "linear", "image_column": "image"}
    paths = {"train-data-dir": "train", "model_config_name_or_path": "model.json"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(words | paths | {"output_dir": "out", "validation_data_dir": ["held_out", "x"]}))
    (options,) = read_options([TrainOptions], [str(file)])
    for name, value in words.items():
        assert getattr(options, name) == value
    for name, value in paths.items():
        assert getattr(options, name.replace("-", "_")) == f"{tmp_path}/{value}"
    assert options.validation_data_dir == [f"{tmp_path}/held_out", "x"]
    assert options.output_dir == "out", "there is no such folder yet"


def test_a_folder_named_like_a_bundled_model_makes_the_name_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--output_dir", "out", "--train_data_dir", "photos", "--pretrained_model_name_or_path"]
    (options,) = read_options([TrainOptions], [*words, "bundled"])
    assert options.pretrained_model_name_or_path == DEFAULT_MODEL
    (tmp_path / "bundled").mkdir()
    with pytest.raises(ValueError, match=r"`bundled` is both a bundled model and a file or folder here"):
        read_options([TrainOptions], [*words, "bundled"])
    (options,) = read_options([TrainOptions], [*words, "./bundled"])
    assert options.pretrained_model_name_or_path == "./bundled"


def test_a_folder_beside_an_options_file_makes_the_name_of_a_bundled_model_ambiguous(tmp_path):
    (tmp_path / "bundled").mkdir()
    file = tmp_path / "config.yaml"
    words = {"output_dir": "out", "train_data_dir": "photos"}
    file.write_text(yaml.safe_dump(words | {"pretrained-model-name-or-path": "bundled"}))
    with pytest.raises(ValueError, match=r"`bundled` is both a bundled model and a file or folder beside `.*yaml`"):
        read_options([TrainOptions], [str(file)])
    file.write_text(yaml.safe_dump(words | {"pretrained_model_name_or_path": "./bundled"}))
    (options,) = read_options([TrainOptions], [str(file)])
    assert options.pretrained_model_name_or_path == str(tmp_path / "bundled")


def test_options_that_are_paths_are_options_of_scripts():
    names = set()
    for options_class in (TrainOptions, DiffusionOptions, NextScaleOptions, LanguageModelOptions, TrainingArguments):
        names |= {field.name for field in fields(options_class)}
    assert names.issuperset(PATH_OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml.safe_dump(NEEDED | {"learning_rate": [1, 2]}), "`2` must follow an option that takes it"),
        ("- output_dir", "must map options to values, but is list"),
        ("a: [", "must be a YAML file, but is not"),
        ("max_steps: 1\nmax_steps: 2\n", "must be a YAML file, but is not: `max_steps` occurs twice"),
        ("max_steps: 1\nmax-steps: 2\n", "`--max-steps` must be given once"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_options([TrainOptions], [str(file)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--outptu_dir=out", "--seed", "x"],
            "`--outptu_dir` is not an option of the script. Did you mean `--output_dir`",
        ),
        (["--qwertyuiop", "1"], "`--qwertyuiop` is not an option of the script. Pass `--help` to see all."),
        (["--seed", "1", "2", "--output_dir", "out"], "`2` must follow an option that takes it"),
        (["--max_steps=many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--seed", "1"], "the following arguments are required: --output_dir"),
        (["--output_dir", "a", "--output-dir=b"], "`--output-dir` must be given once, but is given twice"),
        (["--random_flip", "--no_random_flip"], "`--no_random_flip` must be given once"),
    ],
)
def test_the_first_wrong_flag_is_named(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_options([TrainOptions], flags)


def test_models_are_files_folders_or_hub_ids(tmp_path):
    for model in ("org/name", str(tmp_path)):
        check_models(LlamaGenOptions(pipeline_name_or_path=model, token_set="tokens"))
    for model in ("name", "./org/name", "a/b/c", "org/config.json"):
        with pytest.raises(ValueError, match="must be a file, folder or Hub id, org/name, but there is no"):
            check_models(LlamaGenOptions(pipeline_name_or_path=model, token_set="tokens"))


def test_an_adapter_is_not_a_model_to_train_further(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for options in (
        LlamaGenOptions(pipeline_name_or_path=str(tmp_path), token_set="tokens"),
        LanguageModelOptions(model_name_or_path=str(tmp_path), token_set="tokens"),
    ):
        with pytest.raises(ValueError, match="must be a whole model, but `.*` is a LoRA adapter. Merge it into its"):
            check_models(options)


def test_help_explains_the_options_of_the_script_first(capsys):
    with pytest.raises(SystemExit):
        read_options([LanguageModelOptions, TrainingArguments], ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("[CONFIG.yaml] [--option VALUE ...]")
    explained = [line.split()[0] for line in lines if line.startswith("  --")]
    assert explained[0] == "--token_set"
    assert explained.index("--model_name_or_path") < explained.index("--output_dir")


def test_all_values_out_of_range_are_named_at_once():
    with pytest.raises(
        ValueError, match=r"`--max_steps` must be .* `--seed` must be at least 0.* Exactly one of .* Exactly one"
    ):
        read_options([TrainOptions], ["--output_dir", "out", "--max_steps", "-1", "--seed", "-1"])


def test_flags_override_a_file_with_nothing(tmp_path):
    file = tmp_path / "config.yaml"
    set_by_file = {"kmeans_steps": [5], "report_to": "tensorboard", "save_total_limit": 3, "crop_sizes": []}
    file.write_text(yaml.safe_dump(NEEDED | set_by_file))
    flags = ["--kmeans_steps", "--report_to", "none", "--save_total_limit=none", "--output_dir", "lr=0.1"]
    assert read_options([TrainOptions], [str(file), *flags]) == (TrainOptions(**NEEDED | {"output_dir": "lr=0.1"}),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_sizes": [24]}, r"`--crop_sizes` must divide `--resolution` = 256, but are \[24\]"),
        ({"max_steps": 0}, "`--max_steps` must be above 0, got 0"),
        ({"lpips_weight": -1.0}, "`--lpips_weight` must be at least 0, got -1.0"),
        ({"mix_fraction": 2.0}, r"`--mix_fraction` must be in \[0, 1\], got 2.0"),
        ({"shuffle_buffer": 0}, "`--shuffle_buffer` must be above 0, got 0"),
        ({"scales": [0.5]}, "`--scales` must contain 1"),
        ({"hub_private_repo": True}, "`--hub_private_repo` needs `--push_to_hub`"),
        ({"hub_model_id": "name"}, "`--hub_model_id` must be `org/name`, got 'name'"),
        ({"adversarial_weight": 1.0, "adversarial_start": 9, "max_steps": 9}, "start` must be less than .* = 9, but"),
        ({"max_steps": 9, "warmup_steps": 9}, "`--warmup_steps` must be at least 0, and less than .* = 9, but"),
        ({"dataset_config_name": "x"}, "`--dataset_config_name` belongs to `--dataset_name`. Leave it"),
        ({"load_best_model_at_end": True}, "`--load_best_model_at_end` needs `--validation_data_dir`"),
        ({"scales": [1.0], "token_budget": 2.0}, "and not be used with `--scales`"),
        ({"codebook_decay": 0.9, "train": "decoder"}, "keeps the codes, but `--codebook_decay` moves them"),
        ({"token_budget": 0.5}, "`--token_budget` must be at least 1, the full scale"),
        (
            {"kmeans_steps": [10**6, 10**5]},
            "`--kmeans_steps` must lie between 0 and .* = 100000, got .1000000, 100000",
        ),
        ({"validation_scales": [1.0, float("nan")]}, "`--scales` must be finite and more than 0"),
        ({"validation_scales": []}, "`--validation_scales` must not be empty"),
        ({"adversarial_weight": 1.0, "crop_sizes": [16]}, "at least 24 pixels, but one has 16"),
        ({"scales": [1.0], "scale_probabilities": [0.5, 0.5]}, "one fraction for each of `--scales`"),
        ({"scales": [1.0, 0.5], "scale_probabilities": [0.5, 0.4]}, r"and sum to 1, but are \[0.5, 0.4\]"),
        (
            {"scales": [1.0, 0.25], "scale_probabilities": [0.5, 0.5], "resolution": 64, "adversarial_weight": 1.0},
            "at least 24 pixels, but one has 16",
        ),
        ({"train": "decoder"}, "so it needs `--pretrained_model_name_or_path`"),
        ({"mix_split": "test"}, "`--mix_split` belongs to `--mix_data_dir`"),
        ({"validation_split": "test"}, "`--validation_split` belongs to `--validation_data_dir`"),
        ({"gradient_accumulation_steps": 0}, "`--gradient_accumulation_steps` must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "`--learning_rate` must be above 0, got nan"),
        ({"train_data_dir": None}, "Exactly one of `--dataset_name` and `--train_data_dir`"),
    ],
)
def test_invalid_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**(NEEDED | options))


# Recipes

OPTIONS = {"train": [TrainOptions], "train_latent_diffusion": [DiffusionOptions]}
OPTIONS |= {"train_llamagen": [LlamaGenOptions, TrainingArguments], "train_next_scale": [NextScaleOptions]}
OPTIONS |= {"train_language_model": [LanguageModelOptions, TrainingArguments]}


ON_CPU = {"train_llamagen": ["--use_cpu"]}  # else bf16 is refused
COMMANDS = sorted((ROOT / "training" / "configs").glob("[!d]*.yaml"))  # not ddp.yaml, of accelerate


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_command_of_a_recipe_is_valid_from_any_folder(path, tmp_path, monkeypatch):
    commands = re.findall(r"^#   (.*)$", path.read_text(), re.MULTILINE)
    (command,) = [line for line in commands if "training/train" in line]
    script, options = re.search(r"training/(\w+)\.py (.*)", command).groups()
    arguments = shlex.split(options)
    assert arguments[0] == path.relative_to(ROOT).as_posix()
    monkeypatch.chdir(tmp_path)
    config, *_ = read_options(OPTIONS[script], [str(path), *arguments[1:], *ON_CPU.get(script, [])])
    if getattr(config, "model_config_name_or_path", None) is not None:
        assert SVQVAE.load_config(config.model_config_name_or_path)
    launcher = re.search(r"--config_file (\S+)", command)
    assert launcher is None or (ROOT / launcher[1]).is_file()


def test_torchrun_leaves_the_options_of_the_script_alone():
    text = (ROOT / "docs" / "training.md").read_text().replace("\\\n", "")
    (words,) = re.findall("^ACCELERATE_USE_CPU=true torchrun (.*)$", text, re.MULTILINE)
    launcher = torch.distributed.run.parse_args([*shlex.split(words), "--start", "linear"])
    assert launcher.training_script == "training/train.py"
    config, *flags = launcher.training_script_args
    (options,) = read_options([TrainOptions], [str(ROOT / config), *flags])
    assert options.start == "linear"


def test_new_model_quantises_from_its_first_kmeans_and_a_pretrained_one_at_once():
    assert TrainOptions(**NEEDED, kmeans_steps=[7, 5]).quantize_from == 5
    assert TrainOptions(**NEEDED).quantize_from == 0
    trained = NEEDED | {"model_config_name_or_path": None, "pretrained_model_name_or_path": "org/svqvae"}
    assert TrainOptions(**trained, kmeans_steps=[7, 5]).quantize_from == 0
