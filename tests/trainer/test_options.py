import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from conftest import ROOT
from train_autoregressive import AutoregressiveOptions
from train_latent_diffusion import DiffusionOptions
from train_masked import MaskedOptions
from train_next_scale import NextScaleOptions

from svqvae_hf import SVQVAE
from svqvae_hf.trainer.options import LOCATION, changed_options, public_options, read_options
from svqvae_hf.trainer.train_options import TrainOptions

NEEDED = {"output_dir": "out", "model_config_name_or_path": "model.json", "train_data_dir": "photos"}


def test_flags_and_file_are_equal_and_flags_override_the_file(tmp_path):
    options = {
        "crop_sizes": [64, 128],
        "learning_rate": 1e-3,
        "use_ema": True,
        "random_flip": False,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(NEEDED | options | {"checkpoints_total_limit": None}))
    flags = [f"--{name}={value}" for name, value in NEEDED.items()]
    flags += ["--crop_sizes", "64", "128", "--learning_rate=1e-3", "--use_ema", "--no_random_flip"]
    expected = TrainOptions(**NEEDED, **options)
    assert read_options(TrainOptions, [str(file)]) == read_options(TrainOptions, flags) == expected
    assert read_options(TrainOptions, [str(file), "--learning_rate", "1e-4"]).learning_rate == 1e-4


def test_options_written_by_a_run_are_read_back(tmp_path):
    file = tmp_path / "train_config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(TrainOptions(**NEEDED, crop_sizes=[64]))))
    assert read_options(TrainOptions, [str(file)]) == TrainOptions(**NEEDED, crop_sizes=[64])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "must have only options of the script, but has lerning_rate"),
        ("- output_dir", "must map options to values, but is list"),
        ("a: [", "must be a YAML file, but is not"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_options(TrainOptions, [str(file)])


@pytest.mark.parametrize("flag", ["--lerning_rate=1", "--learning=1"])
def test_unknown_flags_are_refused(flag):
    with pytest.raises(ValueError, match=flag):
        read_options(TrainOptions, [*(f"--{name}={value}" for name, value in NEEDED.items()), flag])


@pytest.mark.parametrize("flag", ["--learning_rate=fast", "--lpips_net=resnet", "--lr_scheduler=piecewise_constant"])
def test_wrong_values_of_flags_are_refused(flag, capsys):
    with pytest.raises(ValueError, match=f"^argument {flag.split('=')[0]}.*: invalid .*{flag.split('=')[1]}") as error:
        read_options(TrainOptions, [*(f"--{name}={value}" for name, value in NEEDED.items()), flag])
    assert "\n" not in str(error.value)
    assert not "".join(capsys.readouterr())


def test_missing_options_are_named():
    with pytest.raises(ValueError, match="^the following arguments are required: --output_dir"):
        read_options(TrainOptions, [])


def test_flags_override_a_file_with_nothing(tmp_path):
    file = tmp_path / "config.yaml"
    set_by_file = {"kmeans_steps": [5], "report_to": "tensorboard", "checkpoints_total_limit": 3, "crop_sizes": []}
    file.write_text(yaml.safe_dump(NEEDED | set_by_file))
    flags = ["--kmeans_steps", "--report_to", "none", "--checkpoints_total_limit=none"]
    assert read_options(TrainOptions, [str(file), *flags]) == TrainOptions(**NEEDED)


def test_recipe_of_photographs_can_be_tried_for_a_few_steps():
    recipe = str(ROOT / "training" / "configs" / "train_photos.yaml")
    flags = ["--train_data_dir", "photos", "--output_dir", "out", "--max_train_steps", "500"]
    options = read_options(TrainOptions, [recipe, *flags])
    assert options.kmeans_steps == [1, 8000, 17000]
    assert options.never_reached == ["--kmeans_steps 8000 17000", "--full_crops_from 17000"]
    assert read_options(TrainOptions, [recipe, *flags[:4]]).never_reached == []


def test_no_in_a_file_is_a_choice(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(NEEDED) + "mixed_precision: no\n")
    assert read_options(TrainOptions, [str(file)]).mixed_precision == "no"


def test_the_first_kmeans_step_must_stay_when_a_run_resumes():
    first, later, moved = (TrainOptions(**NEEDED, kmeans_steps=steps) for steps in ([5, 80], [5, 90], [6, 80]))
    assert changed_options(public_options(first), later, Path("checkpoint")) == {"kmeans_steps": ([5, 80], [5, 90])}
    with pytest.raises(ValueError, match=r"`--kmeans_steps` must stay \[5, 80\]"):
        changed_options(public_options(first), moved, Path("checkpoint"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_sizes": [24]}, "`--crop_sizes` must divide `--resolution` = 256, but 24 does not"),
        (
            {"output_dir": "s3://bucket/run"},
            "`s3://bucket/run` must be a local path .* because `s3://` is not supported",
        ),
        ({"max_train_steps": 0}, "`--max_train_steps` must be more than 0, but is 0"),
        ({"lpips_weight": -1.0}, "`--lpips_weight` must not be negative, but is -1.0"),
        ({"max_unreadable_share": 2.0}, r"must lie in \[0, 1\], but is 2.0"),
        ({"scales": [0.5]}, "`--scales` must contain 1"),
        ({"validation_scales": [0.0]}, "`--validation_scales` must be more than 0"),
        ({"max_grad_norm": 0.0}, "`--max_grad_norm` must be more than 0, but is 0.0"),
        ({"private": True}, "`--private` needs `--push_to_hub`"),
        ({"hub_model_id": "org/name"}, "`--hub_model_id` needs `--push_to_hub`"),
        ({"push_to_hub": True, "hub_model_id": "my name"}, "`--hub_model_id` must be `org/name`, got 'my name'"),
        ({"seed": -1}, "`--seed` must not be negative, but is -1"),
        (
            {"lpips_weight": 1.0, "lpips_start": 9, "max_train_steps": 9},
            "`--lpips_start` must be less than .* = 9, but",
        ),
        ({"data_files": ["x"]}, "`--data_files` belongs to `--dataset_name`"),
        ({"scales": [1.0], "token_budget": 2.0}, "`--token_budget` drops random scales"),
        ({"spread_weight": 1.0, "train": "decoder"}, "`--spread_weight` moves latents or codes"),
        ({"token_budget": 0.5}, "must be at least 1, the tokens of the full scale, but is 0.5"),
        ({"resize_range": [2.0, 1.0]}, "the smaller first"),
        ({"l2_start": 5}, "One of `--l2_weight` and `--l1_weight`"),
        (
            {"kmeans_steps": [100_001, 100_000]},
            "The first of `--kmeans_steps` must lie between 0 and .* = 100000, but is 100000",
        ),
        ({"kmeans_steps": [5], "freeze_codebook": True}, "changes the codebook, but `--freeze_codebook`"),
        ({"dead_code_reset_steps": 5, "freeze_codebook": True}, "changes the codebook, but `--freeze_codebook`"),
        ({"codebook_decay": 0.9, "freeze_codebook": True}, "`--codebook_decay` changes the codebook, but"),
        ({"adversarial_weight": 1.0, "crop_sizes": [16]}, "at least 24 pixels a side, but one has 16"),
        ({"full_crops_from": 5}, "needs smaller `--crop_sizes` for the steps before"),
        ({"full_crops_from": -5}, "must not be negative, but is -5"),
        ({"scales": [1.0], "scale_probabilities": [0.5, 0.5]}, "one value for each of `--scales`, 1, but has 2"),
        ({"scales": [1.0, 0.5], "scale_probabilities": [0.5, 0.4]}, "must sum to 1, but their sum is 0.9"),
        ({"scales": [1.0, 0.5], "scale_probabilities": [1.5, -0.5]}, r"must lie in \[0, 1\], but are \[1.5, -0.5\]"),
        (
            {"scales": [1.0, 0.25], "scale_probabilities": [0.5, 0.5], "resolution": 64, "adversarial_weight": 1.0},
            "at least 24 pixels a side, but one has 16",
        ),
        ({"train": "decoder"}, "so it needs `--pretrained_model_name_or_path`"),
        ({"validation_floor": True}, "measured on validation images, so it needs `--validation_data_dir`"),
        ({"train_data_dir": None}, "Exactly one of `--dataset_name` and `--train_data_dir`"),
        ({"pretrained_model_name_or_path": "x"}, "Exactly one of `--model_config_name_or_path`"),
    ],
)
def test_invalid_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**(NEEDED | options))


def test_decoder_training_needs_validation_images():
    with pytest.raises(ValueError, match="compares ids before and .*, so it needs `--validation_data_dir`"):
        TrainOptions("out", pretrained_model_name_or_path="x", train_data_dir="y", train="decoder")


# Resumed runs

OPTIONS = {
    "train": TrainOptions,
    "train_autoregressive": AutoregressiveOptions,
    "train_latent_diffusion": DiffusionOptions,
    "train_masked": MaskedOptions,
    "train_next_scale": NextScaleOptions,
}
EACH_OPTION = [
    pytest.param(options_class, each, id=f"{script}-{each.name}")
    for script, options_class in OPTIONS.items()
    for each in dataclasses.fields(options_class)
    if each.name not in LOCATION
]


def other_values(option, value):
    """Values of an option other than its own."""
    if option.metadata.get("choices"):
        return [choice for choice in option.metadata["choices"] if choice != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, list):
        return [[*value, 0.5]]
    return [f"not-{value}"] if value is None or isinstance(value, str) else [value + 1]


@pytest.mark.parametrize(("options_class", "option"), EACH_OPTION)
def test_each_option_that_changed_is_returned_or_refused_with_both_values(options_class, option):
    """Run by run, tests of each script show that what is returned is also applied."""
    required = {each.name: "x" for each in dataclasses.fields(options_class) if each.kw_only}
    options = options_class("out", **(required | {"model_config_name_or_path": "x"} | sources(options_class)))
    new = public_options(options)[option.name]
    for old in other_values(option, new):
        try:
            changed = changed_options(public_options(options) | {option.name: old}, options, Path("checkpoint-1"))
        except ValueError as error:
            assert str(error).startswith(f"`--{option.name}` must stay {old!r} as in the run that wrote")  # noqa: PT017
            assert f", but is {new!r}. " in str(error)  # noqa: PT017
        else:
            assert changed == {option.name: (old, new)}
            assert "changeable" in option.metadata, "an option must stay unless it says otherwise"


def sources(options_class):
    names = {each.name for each in dataclasses.fields(options_class)}
    return {"train_data_dir": "x"} if "train_data_dir" in names else {}


def test_options_that_hold_the_same_data_elsewhere_have_not_changed():
    old = TrainOptions(**NEEDED, lpips_weights="/scratch/job-1/vgg.pth")
    new = dataclasses.replace(old, lpips_weights="/scratch/job-2/vgg.pth", train_data_dir="/scratch/job-2/photos")
    assert changed_options(public_options(old), new, Path("checkpoint-1")) == {}


COMMANDS = sorted((ROOT / "training" / "configs").glob("train_*.yaml"))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_command_of_a_recipe_is_valid_and_names_files_that_exist(path):
    (command,) = re.findall(r"^#   (.*)$", path.read_text(), re.MULTILINE)
    script, options = re.search(r"training/(\w+)\.py (.*)", command).groups()
    arguments = shlex.split(options)
    assert arguments[0] == path.relative_to(ROOT).as_posix()
    config = read_options(OPTIONS[script], [str(path), *arguments[1:]])
    if config.model_config_name_or_path is not None:
        assert SVQVAE.load_config(str(ROOT / config.model_config_name_or_path))
    launcher = re.search(r"--config_file (\S+)", command)
    assert launcher is None or (ROOT / launcher[1]).is_file()


def test_new_model_quantises_from_its_first_kmeans_and_a_pretrained_one_at_once():
    assert TrainOptions(**NEEDED, kmeans_steps=[7, 5]).quantize_from == 5
    assert TrainOptions(**NEEDED).quantize_from == 0
    trained = NEEDED | {"model_config_name_or_path": None, "pretrained_model_name_or_path": "org/svqvae"}
    assert TrainOptions(**trained, kmeans_steps=[7, 5]).quantize_from == 0


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_launcher_settings_are_known_to_accelerate(name):
    settings = load_config_from_file(str(ROOT / "training" / "configs" / f"{name}.yaml"))
    assert settings.num_processes == 8
