"""Options of training scripts, and how they are read from flags and YAML files."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from svqvae_files.file_names import BUNDLED
from svqvae_files.inputs import check_local, find_bundled
from svqvae_hf.data.workers import usable_cores
from svqvae_hf.hub.repositories import REPO_ID, check_repo_id, public_name
from svqvae_hf.models.checks import check_number
from svqvae_hf.trainer.scripts import check_no_repeats, script_name

OPTIMIZERS = ("adamw", "soap")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")

# Options of all scripts whose values are files or folders, beside those that end with `MODEL_SUFFIX`
PATH_OPTIONS = (
    "output_dir",
    "dataset_name",
    "train_data_dir",
    "mix_data_dir",
    "validation_data_dir",
    "token_set",
    "validation_token_set",
    "text_files",
    "lpips_weights",
    "fsdp_config",
    "deepspeed",
)
MODEL_SUFFIX = "_name_or_path"  # of all options that name models
MAX_WORKERS = 2  # that cut crops, by default
NULLS = ("", "~", "null")  # how YAML writes that there is no value
USAGE = "%(prog)s [CONFIG.yaml] [--option VALUE ...]"  # argparse would list each option before it explains the first

# Ranges of numbers, as arguments of `check_number`
POSITIVE = {"above": 0.0}
NOT_NEGATIVE = {"least": 0.0}
FRACTION = {"least": 0.0, "most": 1.0}

Options = TypeVar("Options", bound="RunOptions")


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Field of an option with its default, its help and, if any, its choices."""
    metadata: dict[str, Any] = {"help": text}
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(text: str) -> Any:
    """Field of an option that must be given."""
    return field(kw_only=True, metadata={"help": text})


def range_faults(options: Any, bounds: Mapping[str, float], *names: str) -> Iterator[str]:
    """Yields an error message for each option whose value is out of a range. Options that are `None` are skipped.

    Args:
        options: Dataclass of options.
        bounds (`Mapping[str, float]`): The range: `POSITIVE`, `NOT_NEGATIVE` or `FRACTION`.
        *names (`str`): Names of the options to check.
    """
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        try:
            check_number(f"--{name}", value, **bounds)
        except ValueError as error:
            yield str(error)


def check_models(options: Any) -> None:
    """Raises ValueError if an option names a model that is not a file, a folder or a Hub id, or that is an adapter.

    Whether the Hub has a repository is not checked here, but only the form `org/name`.

    Args:
        options: Dataclass of options. Those that end with `MODEL_SUFFIX` name models.
    """
    for name, source in vars(options).items():
        names_model = name.endswith(MODEL_SUFFIX)
        if names_model and source is not None:
            _check_model(f"--{name}", source)


def _check_model(flag: str, source: str) -> None:
    """Checks the value of one option that names a model, see [`check_models`]."""
    if _is_adapter(Path(source)):
        raise ValueError(
            f"`{flag}` must be a whole model, but `{source}` is a LoRA adapter. Merge it into its base, save the "
            "merged model, and pass its folder."
        )
    if Path(source).exists():
        return
    has_form_of_hub_id = re.fullmatch(REPO_ID, source) is not None
    # "folder/config.json" has the form of a Hub id, but it is the path of a file that does not exist.
    is_missing_file = source.endswith(".json")
    if is_missing_file or not has_form_of_hub_id:
        raise ValueError(f"`{flag}` must be a file, folder or Hub id, org/name, but there is no {source!r}.")


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter without its base."""
    has_adapter = (folder / "adapter_config.json").is_file()
    has_model = (folder / "config.json").is_file()
    return has_adapter and not has_model


def raise_faults(faults: Iterable[str]) -> None:
    """Raises one ValueError with all faults, if there are any."""
    message = " ".join(faults)
    if message:
        raise ValueError(message)


@dataclass
class RunOptions:
    """Options of every run, named as in transformers' `TrainingArguments`. Each script adds its own in a subclass.

    Raises:
        ValueError: If a value is out of its range, or two options contradict each other.
    """

    output_dir: str = field(metadata={"help": "Folder for checkpoints and, at the end, the trained model."})

    # Optimisation
    per_device_train_batch_size: int = option(8, "Examples in a batch of one process.")
    gradient_accumulation_steps: int = option(1, "Batches per step, whose mean gradient updates the weights.")
    max_steps: int = option(100_000, "Updates of the weights.")
    optimizer: str = option("adamw", "SOAP takes longer per step than AdamW, but learns more in it.", OPTIMIZERS)
    learning_rate: float = option(1e-4, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule of diffusers.", SCHEDULES)
    warmup_steps: int | None = option(
        None, "Steps of warm-up, except for `constant`; by default a tenth, at most 500."
    )
    adam_beta1: float = option(0.9, "Decay of the optimizer's mean of gradients.")
    adam_beta2: float = option(0.95, "Decay of the optimizer's mean of squared gradients.")
    weight_decay: float = option(0.05, "Weight decay, only on weights of convolutions and matrices.")
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped.")
    max_skipped_steps: int = option(10, "Steps in a row that may be skipped for gradients that are not finite.")
    use_ema: bool = option(False, "Average the weights over the steps (EMA), and validate and save the average.")
    ema_decay: float = option(0.999, "Decay of the average.")
    mixed_precision: str | None = option(None, "Precision, instead of accelerate's setting.", ("no", "bf16", "fp16"))

    # Checkpoints, validation, log
    save_steps: int = option(1000, "Steps between checkpoints.")
    save_total_limit: int | None = option(None, "Number of newest checkpoints to keep; all by default.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' in --output_dir, if any.")
    eval_steps: int = option(1000, "Steps between validations.")
    logging_steps: int = option(50, "Steps between log lines.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb or another of accelerate's; none by default.")
    push_to_hub: bool = option(False, "Upload the trained model, with its card, at the end.")
    hub_model_id: str | None = option(None, "Repository to upload to and name in the card; --output_dir by default.")
    hub_private_repo: bool = option(False, "Make a new repository private.")
    license: str | None = option(None, "Licence for the card, by its id on the Hub; by default, from sources' cards.")
    seed: int = option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        """Raises all faults at once."""
        check_local(self.output_dir)
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "--hub_model_id")
        raise_faults(self.faults())

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault that can be seen without data and model."""
        yield from range_faults(self, POSITIVE, "max_steps")
        yield from range_faults(self, POSITIVE, "per_device_train_batch_size", "gradient_accumulation_steps")
        yield from range_faults(self, POSITIVE, "save_steps", "save_total_limit", "eval_steps", "logging_steps")
        yield from range_faults(self, POSITIVE, "learning_rate", "max_grad_norm")
        yield from range_faults(self, NOT_NEGATIVE, "weight_decay", "max_skipped_steps", "seed")
        yield from range_faults(self, FRACTION, "ema_decay")
        warms_up_in_time = 0 <= self.num_warmup_steps < self.max_steps
        if not warms_up_in_time:
            yield (
                f"`--warmup_steps` must be at least 0, and less than `--max_steps` = {self.max_steps}, "
                f"but is {self.num_warmup_steps}. Lower it, or train for longer."
            )
        if self.hub_private_repo and not self.push_to_hub:
            yield "`--hub_private_repo` needs `--push_to_hub`. Add it, or leave `--hub_private_repo` out."

    def logs_after(self, step: int) -> bool:
        """Whether a line of the log is due after a step. The last step always has one."""
        steps_done = step + 1
        is_last = steps_done == self.max_steps
        return is_last or steps_done % self.logging_steps == 0

    def validates_after(self, step: int) -> bool:
        """Whether a validation is due after a step. After the last step, the script always validates by itself."""
        steps_done = step + 1
        is_last = steps_done == self.max_steps
        return steps_done % self.eval_steps == 0 and not is_last

    @property
    def num_warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(500, self.max_steps // 10)

    def exactly_one_faults(self, name: str, other_name: str) -> Iterator[str]:
        """Yields an error message unless exactly one of two options is given."""
        values = [getattr(self, name), getattr(self, other_name)]
        num_given = sum(value is not None for value in values)
        if num_given != 1:
            yield f"Exactly one of `--{name}` and `--{other_name}` must be given."


@dataclass
class ImageOptions(RunOptions):
    """Options of runs on images: the image set, and how crops are cut."""

    dataset_name: str | None = option(None, "Image set: Hub id, or a local data set.")
    dataset_config_name: str | None = option(None, "Configuration of the image set.")
    train_data_dir: str | None = option(None, "Folder or pattern of images or shards, instead of --dataset_name.")
    mix_data_dir: str | None = option(None, "Folder of other images, which the model must not forget.")
    mix_fraction: float = option(0.3, "Fraction of the crops that are cut from --mix_data_dir.")
    mix_split: str | None = option(None, "Split of --mix_data_dir, if it has several.")
    split: str = option("train", "Split of the image set.")
    image_column: str | None = option(None, "Column of the images, or their suffix in tar files; found by default.")
    per_device_train_batch_size: int = option(8, "Crops of side --resolution in a batch of one process.")
    resolution: int = option(256, "Side of the largest crops in pixels, stored as sample_size.")
    center_crop: bool = option(False, "Cut crops at the centre, not at random positions.")
    random_flip: bool = option(True, "Flip half of the crops left to right; --no_random_flip turns this off.")
    resize_range: list[float] = option([1.0, 1.0], "Range of the factor by which an image is resized before the crop.")
    streaming: bool = option(False, "Read tar, Parquet and Hub sets as a stream, not from a copy.")
    shuffle_buffer: int = option(1000, "Images of a stream that each worker holds and shuffles at a time.")
    dataloader_num_workers: int | None = option(None, "Processes that cut crops; by default one per core, at most 2.")

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of images."""
        yield from super().faults()
        yield from self.exactly_one_faults("dataset_name", "train_data_dir")
        if self.dataset_config_name and self.train_data_dir is not None:
            yield "`--dataset_config_name` belongs to `--dataset_name`. Leave it or `--train_data_dir` out."
        yield from range_faults(self, POSITIVE, "resolution", "shuffle_buffer")
        yield from range_faults(self, FRACTION, "mix_fraction")
        yield from range_faults(self, NOT_NEGATIVE, "dataloader_num_workers")
        if self.mix_split is not None and self.mix_data_dir is None:
            yield "`--mix_split` belongs to `--mix_data_dir`. Give both or neither."
        if not self._has_resize_range():
            yield f"`--resize_range` must be two factors, the smaller first, but is {self.resize_range}."

    @property
    def num_workers(self) -> int:
        """Processes that cut crops. PyTorch warns of more workers than cores, so the default has no more."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        return min(MAX_WORKERS, usable_cores())

    def _has_resize_range(self) -> bool:
        """Whether `resize_range` is a range of factors."""
        if len(self.resize_range) != 2:
            return False
        smallest, largest = self.resize_range
        return 0 < smallest <= largest


@dataclass
class PipelineOptions(RunOptions):
    """Options of runs that train a generator on an SVQVAE's latents or ids, and save a pipeline."""

    vqvae_name_or_path: str = required("SVQVAE of the pipeline, which stays frozen: folder or Hub id.")
    model_config_name_or_path: str = required("Config of the network to train: a config.json, its folder or Hub id.")
    label_column: str | None = option(None, "Column of the labels; 'label' is the subfolder of an image file.")
    condition_dropout: float = option(0.1, "Fraction of examples trained without their label, for guidance.")
    num_validation_images: int = option(4, "Images sampled at a validation.")

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of pipelines."""
        yield from super().faults()
        yield from range_faults(self, NOT_NEGATIVE, "num_validation_images")
        yield from range_faults(self, FRACTION, "condition_dropout")


def read_options(options_classes: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Reads options from flags, or from a YAML file and flags that override its entries.

    Args:
        options_classes (`Sequence[type]`): Dataclasses of the options of the script.
        arguments (`Sequence[str]`): Command line after the script's name: `[config.yaml] [--name value ...]`.

    Returns:
        `tuple`: One instance of each class.

    Raises:
        ValueError: If an option is unknown, missing or repeated, a value is of the wrong type, or the file does not
            map options to values.
    """
    words_of_command = list(arguments)
    words_of_file: list[str] = []
    if words_of_command and words_of_command[0].endswith((".yaml", ".yml")):
        words_of_file = file_flags(Path(words_of_command.pop(0)))
    parser = OptionParser(options_classes, prog=script_name(), usage=USAGE, allow_abbrev=False)
    check_no_repeats(parser, words_of_file)
    check_no_repeats(parser, words_of_command)
    words = words_of_file + words_of_command  # flags override the file, because the last of equal flags counts
    parser.check_names(words)
    _check_no_stray_value(parser, words)
    try:
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        flags = _flags_only_in_file(str(error), words_of_file, words_of_command)
        if not flags:
            raise
        raise ValueError(f"{error} {arguments[0]} sets {flags}.") from error
    for options in parsed:
        _replace_bundled_names(options)
    return tuple(parsed)


def _flags_only_in_file(message: str, words_of_file: Sequence[str], words_of_command: Sequence[str]) -> str:
    """Flags that an error names and only the YAML file sets, so that a user may wonder where they come from."""
    flags_of_command = [word.partition("=")[0] for word in words_of_command]
    flags = []
    for flag in re.findall(r"--\w+", message):
        if flag in words_of_file and flag not in flags_of_command:
            flags.append(f"`{flag}`")
    return ", ".join(dict.fromkeys(flags))  # each once


def _check_no_stray_value(parser: "OptionParser", words: Sequence[str]) -> None:
    """Raises ValueError for a value that belongs to no option, such as the second one in `--max_steps 1 2`."""
    _, stray_values = parser.parse_known_args(words)
    if stray_values:
        raise ValueError(
            f"`{stray_values[0]}` must follow an option that takes it, but the one before has all its values."
        )


def _replace_bundled_names(options: Any) -> None:
    """Replaces names of models that come with the package by their folders, such as `bundled`."""
    for name, value in vars(options).items():
        if name.endswith(MODEL_SUFFIX) and value is not None:
            setattr(options, name, find_bundled(value))


class OptionParser(HfArgumentParser):
    """Parser of a script's options. A flag without values empties a list, and the value `none` unsets an option."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        """Adds an option. Takes the arguments of `argparse.ArgumentParser.add_argument`."""
        if settings.get("nargs") == "+":  # one value or more
            settings["nargs"] = "*"  # none, too
        is_unset_by_default = "default" in settings and settings["default"] is None
        if is_unset_by_default and "choices" not in settings:
            settings["type"] = _or_none(settings["type"])
        return super().add_argument(*flags, **settings)

    def check_names(self, words: Sequence[str]) -> None:
        """Raises ValueError for the first flag that is not an option, with the option that was probably meant."""
        flags = []
        for action in self._actions:
            flags += action.option_strings
        for word in words:
            flag = word.partition("=")[0]  # of `--flag` and of `--flag=value`
            if not flag.startswith("--") or flag in flags:
                continue
            advice = "Pass `--help` to see all."
            similar_flags = difflib.get_close_matches(flag, flags, 1)
            if similar_flags:
                advice = f"Did you mean `{similar_flags[0]}`?"
            raise ValueError(f"`{flag}` is not an option of the script. {advice}")

    def error(self, message: str) -> NoReturn:
        """Raises the error, without the usage, which lists every option."""
        raise ValueError(message)


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Type of an option that the value `none` unsets. Other values are converted as before.

    It has the name of the type, which argparse shows in errors. `updated=()` is for types such as `int`, because
    `wraps` would otherwise copy the attributes of the class as well.
    """

    @wraps(convert, updated=())
    def convert_or_none(text: str) -> Any:
        if text == "none":
            return None
        return convert(text)

    return convert_or_none


class _OptionLoader(yaml.BaseLoader):
    """Loads a YAML file of options. A key that occurs twice is an error, and not the last of its values.

    All values are texts, which are parsed as on a command line. YAML itself would read `no` as false and 010 as 8.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Reads a mapping."""
        keys = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"`{key}` occurs twice", problem_mark=key_node.start_mark
                )
            keys.append(key)
        return super().construct_mapping(node, deep=deep)


def file_flags(path: Path) -> list[str]:
    """Entries of a YAML file as flags. Paths are relative to its folder, if they exist there.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not YAML, does not map options to values, or names a model by a bundled name that is
            also in its folder.
    """
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), _OptionLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())  # on one line
        raise ValueError(f"`{path}` must be a YAML file, but is not: {reason}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`{path}` must map options to values, but is {type(entries).__name__}.")
    flags = []
    for name, value in entries.items():
        if value in NULLS:
            continue
        flags.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        for single_value in values:
            text = str(single_value)
            if _is_path(name):
                _check_bundled_name(path, name, text)
                text = _find_path(path.parent, text)
            flags.append(text)
    return flags


def _is_path(name: str) -> bool:
    """Whether the values of an option are files or folders."""
    field_name = name.replace("-", "_")  # flags may be written either way
    return field_name in PATH_OPTIONS or field_name.endswith(MODEL_SUFFIX)


def _check_bundled_name(file: Path, name: str, text: str) -> None:
    """Raises ValueError if an option of a YAML file may mean a bundled model as well as a file or folder beside it."""
    names_bundled_model = name.replace("-", "_").endswith(MODEL_SUFFIX) and text in BUNDLED
    if names_bundled_model and (file.parent / text).exists():
        raise ValueError(
            f"`{text}` is both a bundled model and a file or folder beside `{file}`. Write `./{text}` for the folder, "
            f"or move `{file.name}` elsewhere for the bundled model."
        )


def _find_path(folder: Path, text: str) -> str:
    """Joins a path of a YAML file to the file's folder, if it exists there. It may be a Hub id otherwise."""
    path = folder / text
    if path.exists():
        return str(path)
    return text


# For publishing and for errors


def public_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they may be published: each text as its `public_name`, without directories of this machine."""
    return {name: _public_value(value) for name, value in options.items()}


def _public_value(value: Any) -> Any:
    """A value of an option as it may be published."""
    if isinstance(value, list):
        return [_public_value(item) for item in value]
    if isinstance(value, str):
        return public_name(value)
    return value


@contextmanager
def about_split(option_name: str) -> Iterator[None]:
    """Replaces `--split` by the name of another option in errors that are raised while an image set is opened."""
    try:
        yield
    except ValueError as error:
        message = re.sub(r"--split\b", f"--{option_name}", str(error))
        raise ValueError(message) from error
