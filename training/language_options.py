"""Options of the scripts that train language models, and faults of transformers' `TrainingArguments`."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from svqvae_hf.trainer.options import FRACTION, OPTIMIZERS, option, raise_faults, range_faults, read_options

# Options of `TrainingArguments` that would change nothing here, and why.
WITHOUT_EFFECT = {
    "batch_eval_metrics": "a validation has the metrics of the script",
    "data_seed": "`--seed` decides the order of the examples",
    "dataloader_multiprocessing_context": "the loader has no processes",
    "dataloader_persistent_workers": "the loader has no processes",
    "dataloader_prefetch_factor": "the loader has no processes",
    "do_predict": "the script trains",
    "do_train": "the script trains",
    "enable_jit_checkpoint": "a signal always saves a checkpoint",
    "hub_always_push": "the result is uploaded once",
    "hub_revision": "the result is uploaded to the main branch",
    "hub_strategy": "the result is uploaded once",
    "hub_token": "the token comes from `hf auth login` or HF_TOKEN",
    "ignore_data_skip": "a resumed run reads the examples that are left",
    "include_for_metrics": "a validation has the metrics of the script",
    "label_smoothing_factor": "the loss is the cross-entropy",
    "length_column_name": "examples have a random order",
    "num_train_epochs": "`--max_steps` decides the length",
    "prediction_loss_only": "a validation has the metrics of the script",
    "restore_callback_states_from_checkpoint": "the script restores what a run needs",
    "save_on_each_node": "checkpoints need a folder that all machines share",
    "train_sampling_strategy": "examples have a random order",
    "use_cache": "a cache would not tell packed examples apart",
}
ADAMW_ARGUMENTS = ("adam_epsilon", "optim", "optim_args", "optim_target_modules")
VALIDATION_ARGUMENTS = ("eval_delay", "eval_on_start", "eval_steps", "per_device_eval_batch_size")


@dataclass
class LanguageRunOptions:
    """Options that the scripts of language models share, beside those of `transformers.TrainingArguments`."""

    token_set: str | None = option(None, "Token set of `svqvae tokenize`: folder, URL or Hub id.")
    validation_token_set: str | None = option(None, "The same, for --eval_strategy; processes may repeat some rows.")
    caption_column: str | None = option(None, "Column of captions, texts or lists; chats learn to write the first.")
    condition_dropout: float = option(0.1, "Fraction of images trained without class or caption, for guidance.")
    first_caption_fraction: float = option(0.0, "Fraction of images drawn from the first caption, not from any.")
    replaced_fraction: float = option(0.0, "Largest fraction of ids read as others; drawn mistakes then do less harm.")
    attn_implementation: str | None = option(None, "Attention of transformers; `eager` is fast for short examples.")
    optimizer: str = option("adamw", "Muon and SOAP learn more per step; Muon is faster.", (*OPTIMIZERS, "muon"))
    lora_rank: int = option(0, "Rank of LoRA on all linear layers, with the rows of image tokens; 0 trains all.")
    license: str | None = option(None, "Licence for the card, by its id on the Hub; by default, from sources' cards.")

    def __post_init__(self) -> None:
        """Raises all faults at once."""
        raise_faults(self.faults())

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault that can be seen without data and model."""
        yield from range_faults(self, FRACTION, "condition_dropout", "first_caption_fraction", "replaced_fraction")
        if self.lora_rank < 0:
            yield f"`--lora_rank` must be at least 0, but is {self.lora_rank}."


def read_run_options(options_class: type, words: list[str]) -> tuple[Any, TrainingArguments]:
    """Reads the options of a script and transformers' `TrainingArguments` from its command line.

    Without an accelerator, `--use_cpu` is added, because transformers accepts `--bf16` on a CPU only with it.
    """
    has_accelerator = torch.accelerator.is_available()
    option_names = [word.partition("=")[0] for word in words]
    if not has_accelerator and "--use_cpu" not in option_names:
        words = words + ["--use_cpu"]
    options, arguments = read_options((options_class, TrainingArguments), words)
    return options, arguments


def argument_faults(arguments: TrainingArguments, options: LanguageRunOptions) -> Iterator[str]:
    """Yields an error message for each argument of transformers that is wrong or would have no effect."""
    if arguments.max_steps == TrainingArguments.max_steps:  # -1, so it was left out
        yield "`--max_steps` must be given."
    elif arguments.max_steps < 1:
        yield f"`--max_steps` must be at least 1, but is {arguments.max_steps}."
    if arguments.dataloader_num_workers:
        # A signal that is sent to all processes would end the processes of the data loader. The run would fail without
        # them before it could save a checkpoint.
        yield "`--dataloader_num_workers` must be 0, so that a signal can stop the run. Leave it out."
    for name, reason in WITHOUT_EFFECT.items():
        if _is_changed(arguments, name):
            yield f"`--{name}` has no effect, because {reason}. Leave it out."
    if options.optimizer != "adamw":
        for name in ADAMW_ARGUMENTS:
            if _is_changed(arguments, name):
                yield f"`--{name}` has no effect with `--optimizer {options.optimizer}`. Leave one of them out."
    if options.validation_token_set is None:
        yield from _validation_faults(arguments)


def _validation_faults(arguments: TrainingArguments) -> Iterator[str]:
    """Yields an error message for arguments of validations in a run that has none."""
    if _is_changed(arguments, "eval_strategy"):
        yield "`--eval_strategy` needs `--validation_token_set`. Add it, or leave `--eval_strategy` out."
        return  # transformers derives other arguments from it, which the user has not given
    for name in VALIDATION_ARGUMENTS:
        if _is_changed(arguments, name):
            yield f"`--{name}` has no effect without `--validation_token_set`. Add it, or leave `--{name}` out."


def _is_changed(arguments: TrainingArguments, name: str) -> bool:
    """Whether an argument has another value than its default."""
    return getattr(arguments, name) != _default_of(name)


def _default_of(name: str) -> Any:
    """Default of an argument of transformers."""
    for field in fields(TrainingArguments):
        if field.name != name:
            continue
        if field.default_factory is not MISSING:
            return field.default_factory()
        return field.default
    raise ValueError(f"TrainingArguments must have {name}, but this version of transformers has not.")
