"""Runs of transformers' `Trainer` on tokens of images: options, loss, stop and resumption, result."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from svqvae_files.json_files import read_json_object
from svqvae_hf.hub.model_cards import table_rows
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.loaders.adapters import record_base
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, ImageVocabulary
from svqvae_hf.trainer.checkpoints import NAME, RUN_STATE, check_files, find_checkpoint, write_checksums
from svqvae_hf.trainer.data.sample_order import DIGEST, SAMPLES_PER_STEP, check_same
from svqvae_hf.trainer.examples import IGNORED
from svqvae_hf.trainer.identity import UNIMPORTANT, RunIdentity, model_digests
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.muon import MuonAndAdam, muon_groups
from svqvae_hf.trainer.optimization import MAX_PRECONDITION_DIM, hyperparameters, resume_schedule
from svqvae_hf.trainer.options import FRACTION, OPTIMIZERS, option, public_values, raise_faults, read_options, wrong
from svqvae_hf.trainer.publishing import Result, find_sources, provenance, refuse_finished

TRAINER_STATE = "trainer_state.json"

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
OF_ADAMW = ("adam_epsilon", "optim", "optim_args", "optim_target_modules")
OF_VALIDATIONS = ("eval_delay", "eval_on_start", "eval_steps", "per_device_eval_batch_size")


@dataclass
class LanguageRunOptions:
    """Options that the scripts of language models share, beside those of `transformers.TrainingArguments`."""

    token_set: str | None = option(None, "Token set of `svqvae tokenize`: folder, URL or Hub id.")
    validation_token_set: str | None = option(None, "The same, for --eval_strategy; processes may repeat some rows.")
    caption_column: str | None = option(None, "Column of captions, texts or lists; chats learn to write the first.")
    condition_dropout: float = option(0.1, "Fraction of images trained without class or caption, for guidance.")
    first_caption_fraction: float = option(0.0, "Fraction of images drawn from the first caption, not from any.")
    scheduled_sampling: float = option(0.0, "Largest fraction of ids that the model reads as it draws them; slower.")
    attn_implementation: str | None = option(None, "Attention of transformers; `eager` is fast for short examples.")
    optimizer: str = option("adamw", "Muon and SOAP learn more per step; Muon is faster.", (*OPTIMIZERS, "muon"))
    lora_rank: int = option(0, "Rank of LoRA on all linear layers, with the rows of image tokens; 0 trains all.")
    license: str | None = option(None, "Licence for the card, by its id on the Hub; by default, from sources' cards.")

    def __post_init__(self) -> None:
        """Raises all faults at once."""
        raise_faults(self.faults())

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the options, except for data and model."""
        yield from wrong(self, FRACTION, "condition_dropout", "first_caption_fraction", "scheduled_sampling")
        if self.lora_rank < 0:
            yield f"`--lora_rank` must be at least 0, but is {self.lora_rank}."


def read_run_options(options_class: type, words: list[str]) -> tuple[Any, TrainingArguments]:
    """Reads the options of a script and transformers' `TrainingArguments` from its command line.

    Without an accelerator, `--use_cpu` is added, because transformers accepts `--bf16` on a CPU only with it.
    """
    on_cpu = not torch.accelerator.is_available()
    says_device = any(word.partition("=")[0] == "--use_cpu" for word in words)
    if on_cpu and not says_device:
        words = words + ["--use_cpu"]
    options, arguments = read_options((options_class, TrainingArguments), words)
    return options, arguments


def argument_faults(arguments: TrainingArguments, options: LanguageRunOptions) -> Iterator[str]:
    """Yields what is wrong with the arguments of transformers, with each that would have no effect."""
    if arguments.max_steps < 1:
        yield f"`--max_steps` must be at least 1, but is {arguments.max_steps}."
    if arguments.dataloader_num_workers:  # a signal to all processes ends them, and with them the run
        yield "`--dataloader_num_workers` must be 0, so that a signal can stop the run. Leave it out."
    for name, reason in WITHOUT_EFFECT.items():
        if _is_changed(arguments, name):
            yield f"`--{name}` has no effect, because {reason}. Leave it out."
    if options.optimizer != "adamw":
        for name in OF_ADAMW:
            if _is_changed(arguments, name):
                yield f"`--{name}` has no effect with `--optimizer {options.optimizer}`. Leave one of them out."
    if options.validation_token_set is not None:
        return
    if _is_changed(arguments, "eval_strategy"):
        yield "`--eval_strategy` needs `--validation_token_set`. Add it, or leave `--eval_strategy` out."
        return  # it sets others
    for name in OF_VALIDATIONS:
        if _is_changed(arguments, name):
            yield f"`--{name}` has no effect without `--validation_token_set`. Add it, or leave `--{name}` out."


def _is_changed(arguments: TrainingArguments, name: str) -> bool:
    """Whether an argument has another value than its default."""
    (field,) = [field for field in fields(TrainingArguments) if field.name == name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(arguments, name) != default


class LanguageRun:
    """A run from its start to its result. The script makes the model and the examples in between.

    Args:
        script (`str`): The script, such as `training/train_llamagen.py`.
        options ([`LanguageRunOptions`]): Options of the script.
        arguments (`TrainingArguments`): Arguments of transformers. Some are set here.

    Attributes:
        num_examples (`int`): Examples of the whole run.

    Raises:
        SystemExit: The run has finished before.
        ValueError: An option is wrong or has no effect, or the folder holds another run.
    """

    def __init__(self, script: str, options: LanguageRunOptions, arguments: TrainingArguments):
        raise_faults(argument_faults(arguments, options))
        self.script = script
        self.options = options
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.described = public_values(asdict(options) | arguments.to_dict())
        self.identity = RunIdentity(self.described, model_digests(options))
        refuse_finished(self.output_dir, self.identity)
        set_aside_partial_checkpoints(self.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, arguments.resume_from_checkpoint, arguments.max_steps)
        if self.checkpoint is not None:
            check_files(self.checkpoint)
        self.push_to_hub = arguments.push_to_hub
        arguments.push_to_hub = False  # the Trainer would upload its checkpoints
        arguments.train_sampling_strategy = "sequential"  # examples are in a random order already
        arguments.remove_unused_columns = False
        arguments.eval_on_start = options.validation_token_set is not None and self.checkpoint is None
        self.examples_per_step = (
            arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        )
        self.num_examples = arguments.max_steps * self.examples_per_step
        torch.manual_seed(arguments.seed)  # for new weights; the Trainer sets it later

    def train(
        self,
        model: PreTrainedModel | PeftModel,
        examples: Any,
        held_out: Dataset | None,
        collate: Callable[[Any], Any],
        codes: range,
        encode: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
    ) -> "LanguageModelTrainer":
        """Trains a model, from the checkpoint if there is one, and validates it.

        Args:
            model (`PreTrainedModel` or `PeftModel`): Model to train.
            examples (`Dataset`): Examples of the run, with a `digest`.
            held_out (`Dataset`, *optional*): Examples of a validation.
            collate (`Callable`): Joins examples to a batch.
            codes (`range`): Tokens that are codes.
            encode (`Callable`, *optional*): Features of captions, as arguments of the model.

        Raises:
            SystemExit: A signal stopped the run, after a checkpoint was saved.
            ValueError: The checkpoint was written with other examples, or in another order.
        """
        facts = RunFacts(examples.digest, self.arguments.seed, self.examples_per_step, self.described)
        if self.checkpoint is not None:
            facts.check(self.checkpoint)
        model.config.use_cache = False  # a model with a cache would not tell packed examples apart
        trainer = LanguageModelTrainer(
            model,
            self.arguments,
            train_dataset=examples,
            eval_dataset=held_out,
            data_collator=collate,
            loss=ModalityLoss(codes),
            scheduled_sampling=self.options.scheduled_sampling,
            encode=encode,
            optimizer_cls_and_kwargs=optimizer_class(model, self.options, self.arguments),
        )
        self.is_main = trainer.is_world_process_zero()
        origin = find_sources(self.options)
        self.result = Result(self.arguments, self.identity, origin, self.push_to_hub, self.is_main)
        with Interruption(trainer.accelerator) as interruption:
            callback = CheckpointOnSignal(interruption, facts)
            trainer.add_callback(callback)
            trainer.train(None if self.checkpoint is None else str(self.checkpoint))
        if callback.stopped:
            sys.exit(interruption.exit_code)
        if held_out is not None:
            trainer.evaluate()
        model.config.use_cache = True
        return trainer

    def publish(
        self,
        trainer: "LanguageModelTrainer",
        save: Callable[[Path], Path],
        make_card: Callable[[Result, dict[str, str]], str],
    ) -> None:
        """Saves the trained model, or its LoRA adapter, with a card in the output folder.

        Args:
            trainer ([`LanguageModelTrainer`]): From `train`.
            save (`Callable`): Adds what belongs to the model to its folder, and returns the folder of the result.
            make_card (`Callable`): Text of the card, from the result and rows of a table.
        """
        trained = self.output_dir / "trained.partial"
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(trained))  # by all processes, because some engines shard the weights
        if not self.is_main:
            return
        if not any(trained.glob("*.safetensors")):
            raise ValueError("DeepSpeed has kept the weights in shards. Set zero3_save_16bit_model, and resume.")
        (trained / "training_args.bin").unlink()  # a pickle with paths of this machine
        folder = save(trained)
        rows = provenance(self.script, self.arguments.max_steps, self.examples_per_step, "examples")
        rows |= trainer.last_numbers()
        copy_folder = partial(shutil.copytree, folder, dirs_exist_ok=True)
        self.result.publish(copy_folder, make_card(self.result, rows))
        shutil.rmtree(trained)


def set_aside_partial_checkpoints(output_dir: Path) -> None:
    """Renames checkpoints that a killed run left unfinished, so that none is resumed or counted."""
    for folder in output_dir.glob("checkpoint-*"):
        if NAME.fullmatch(folder.name) is None:
            continue
        with suppress(OSError):  # another process was first
            files = {path.name for path in folder.iterdir()}
            if files & {TRAINER_STATE, RUN_STATE}:  # written last
                continue
            aside = output_dir / f"partial-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


@dataclass(frozen=True)
class RunFacts:
    """What a checkpoint records of its run.

    Args:
        digest (`str`): Digest of the rows.
        seed (`int`): Seed of their order.
        examples_per_step (`int`): Examples of a step of all processes.
        options (`dict[str, Any]`): Options as they may be published.
    """

    digest: str
    seed: int
    examples_per_step: int
    options: dict[str, Any]

    def check(self, checkpoint: Path) -> None:
        """Raises unless a checkpoint was written by a run with the same examples in the same order.

        Tells which other options have changed.

        Raises:
            ValueError: The rows, their order, the optimizer or the weights are others.
        """
        state = read_json_object(checkpoint / TRAINER_STATE)
        callback = state.get("stateful_callbacks", {}).get(CheckpointOnSignal.__name__, {})
        saved = callback.get("attributes", {})
        check_same(DIGEST, saved.get("digest"), self.digest)
        if "options" not in saved:
            return  # of an earlier version, which recorded only the digest
        check_same("seed", saved["seed"], self.seed)
        check_same(SAMPLES_PER_STEP, saved["examples_per_step"], self.examples_per_step)
        for name in ("optimizer", "lora_rank"):
            check_same(f"option `--{name}`", saved["options"].get(name), self.options.get(name))
        for name in sorted(self.options.keys() & saved["options"].keys() - set(UNIMPORTANT)):
            before = saved["options"][name]
            now = json.loads(json.dumps(self.options[name]))  # as the checkpoint holds it
            if before != now:
                sys.stderr.write(f"Changed on resume: --{name} from {before} to {now}\n")


class ModalityLoss:
    """Cross-entropy of the next token, and its sums over texts and over images since the last log.

    Args:
        codes (`range`): Tokens that are codes.
    """

    def __init__(self, codes: range):
        self.codes = codes
        self.sums = {True: torch.zeros(2, 3), False: torch.zeros(2, 3)}  # training or not: loss, tokens, hits

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Returns the loss of logits `(batch, length, vocab_size)` and labels `(batch, length)`."""
        targets = labels[:, 1:].flatten()  # (tokens,)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()  # (tokens, vocab_size)
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        is_counted = targets != IGNORED
        is_code = (targets >= self.codes.start) & (targets < self.codes.stop)
        masks = torch.stack([is_counted & ~is_code, is_counted & is_code]).float()  # (2, tokens): texts, images
        with torch.no_grad():
            hits = (logits.argmax(-1) == targets).float()
            sums = torch.stack([masks @ losses, masks.sum(1), masks @ hits], dim=1)  # (2, 3)
            is_training = logits.requires_grad
            self.sums[is_training] = self.sums[is_training].to(sums.device) + sums
        count = is_counted.sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / count

    def take_sums(self, is_training: bool) -> torch.Tensor:
        """Returns the sums `(2, 3)` of training or of a validation, and starts new ones."""
        sums = self.sums[is_training]
        self.sums[is_training] = torch.zeros(2, 3)
        return sums


class CheckpointOnSignal(TrainerCallback, ExportableState):
    """Saves a checkpoint and stops after SIGTERM or Ctrl-C. Checkpoints record facts of the run.

    Not by transformers' `enable_jit_checkpoint`, which waits 3 seconds, lets each process decide for itself and does
    not know Ctrl-C.

    Args:
        interruption ([`Interruption`]): Signals of the run.
        facts ([`RunFacts`]): Facts of the run.
    """

    def __init__(self, interruption: Interruption, facts: RunFacts):
        self.interruption = interruption
        self.facts = facts
        self.stopped = False

    def state(self) -> dict[str, dict[str, Any]]:
        """Facts that a checkpoint stores."""
        return {"args": {}, "attributes": asdict(self.facts)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds checksums to a checkpoint."""
        write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Sets the hyperparameters of a resumed run to its own options, as the checkpoint had others."""
        scheduler = kwargs["lr_scheduler"]
        if state.global_step == 0 or not isinstance(scheduler, LambdaLR):
            return
        changes = {"initial_lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        weight_decays = (args.weight_decay, 0.0)  # norms do not decay
        groups = []
        for group, weight_decay in zip(hyperparameters(scheduler), weight_decays, strict=True):
            groups.append(group | changes | {"weight_decay": weight_decay})
        resume_schedule(scheduler, state.global_step, groups)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a checkpoint and the end, if any process got a signal."""
        if self.interruption.requested():
            control.should_save = True
            control.should_training_stop = True
            self.stopped = True
            args.save_total_limit = None  # otherwise the Trainer deletes this checkpoint, unless it is the best


class LanguageModelTrainer(Trainer):
    """Trainer that encodes captions, samples some of the ids that it reads, and logs texts and images apart.

    Args:
        *args: As for `Trainer`.
        loss ([`ModalityLoss`]): Loss.
        scheduled_sampling (`float`): Largest fraction of the ids of an image that the model reads as it samples them.
        encode (`Callable`, *optional*): Returns the features of a batch's `caption` as arguments of the model.
        **kwargs: As for `Trainer`.
    """

    def __init__(self, *args: Any, loss: ModalityLoss, scheduled_sampling: float, encode: Any = None, **kwargs: Any):
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.loss = loss
        self.scheduled_sampling = scheduled_sampling
        self.encode = encode

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss, in training with scheduled sampling of some of the ids."""
        inputs = dict(inputs)
        if self.encode is not None:
            inputs |= self.encode(inputs.pop("caption"))
        if self.scheduled_sampling and model.training:
            inputs["input_ids"] = self.draw_some(model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def draw_some(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Replaces some ids by ids that the model samples after the tokens before them."""
        codes = self.loss.codes
        tokens = inputs["input_ids"].clone()  # (batch, length)
        is_code = (tokens >= codes.start) & (tokens < codes.stop)
        share = self.scheduled_sampling * torch.rand(len(tokens), 1, device=tokens.device)
        is_replaced = is_code & (torch.rand(tokens.shape, device=tokens.device) < share)
        is_replaced = is_replaced[:, 1:]  # the first token has none before it
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**arguments).logits[:, :-1]
        code_logits = logits[is_replaced][:, codes.start : codes.stop].float()  # (replaced, codes)
        drawn = code_logits.softmax(-1).multinomial(1)[:, 0]
        tokens[:, 1:][is_replaced] = codes.start + drawn
        return tokens

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Adds the loss of texts and of images and, in a validation, their accuracy and bits per id."""
        if "loss" in logs:
            self._add_modalities(logs, "loss", self._sums(is_training=True))
        if "eval_loss" in logs:
            sums = self._sums(is_training=False)
            self._add_modalities(logs, "eval_loss", sums)
            self._add_accuracies(logs, sums)
        super().log(logs, *args)

    def _sums(self, is_training: bool) -> dict[str, "ModalitySums"]:
        """Sums of all processes since the last log, of each modality that has tokens."""
        reduced = self.accelerator.reduce(self.loss.take_sums(is_training)).tolist()
        sums = {}
        for modality, numbers in zip(("text", "image"), reduced, strict=True):
            modality_sums = ModalitySums(*numbers)
            if modality_sums.tokens:
                sums[modality] = modality_sums
        return sums

    def _add_modalities(self, logs: dict[str, float], name: str, sums: Mapping[str, "ModalitySums"]) -> None:
        for modality, modality_sums in sums.items():
            logs[f"{name}_{modality}"] = modality_sums.loss / modality_sums.tokens

    def _add_accuracies(self, logs: dict[str, float], sums: Mapping[str, "ModalitySums"]) -> None:
        """Adds the numbers of a validation. Its loss is a mean over tokens, whatever the batches."""
        for modality, modality_sums in sums.items():
            logs[f"eval_accuracy_{modality}"] = modality_sums.hits / modality_sums.tokens
        if "image" in sums:
            logs["eval_bits_per_id"] = logs["eval_loss_image"] / math.log(2)
        total_tokens = sum(modality_sums.tokens for modality_sums in sums.values())
        if total_tokens:
            total_loss = sum(modality_sums.loss for modality_sums in sums.values())
            logs["eval_loss"] = total_loss / total_tokens

    def last_numbers(self) -> dict[str, str]:
        """Last losses and other numbers of a validation, as rows of a card."""
        numbers: dict[str, float] = {}
        for entry in self.state.log_history:
            numbers |= entry
        rows = {}
        for name in sorted(numbers):
            if name.startswith(("loss", "eval_loss", "eval_accuracy", "eval_bits")):
                rows[name.replace("_", " ")] = f"{numbers[name]:.4g}"
        return rows


@dataclass(frozen=True)
class ModalitySums:
    """Sums over the tokens of texts or of images.

    Args:
        loss (`float`): Cross-entropy in nats.
        tokens (`float`): Number of tokens.
        hits (`float`): Tokens that the model thinks most likely.
    """

    loss: float
    tokens: float
    hits: float


def optimizer_class(
    model: PreTrainedModel, options: LanguageRunOptions, arguments: TrainingArguments
) -> tuple[type, dict[str, Any]] | None:
    """Class and arguments of the optimizer; None for transformers' AdamW."""
    if options.optimizer == "adamw":
        return None
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if options.optimizer == "muon":
        groups = muon_groups(model, arguments.weight_decay)
        return MuonAndAdam, {"params": groups, "lr": arguments.learning_rate, "betas": betas}
    from pytorch_optimizer.optimizer.soap import SOAP  # takes a second

    return SOAP, {"lr": arguments.learning_rate, "betas": betas, "max_precondition_dim": MAX_PRECONDITION_DIM}


def add_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freezes a model, and adds LoRA to its linear layers and trainable rows for image tokens."""
    new_rows = None
    if CONFIG_KEY in model.config.to_dict():
        vocabulary = ImageVocabulary.from_config(model.config)
        image_tokens = list(range(vocabulary.first_token, vocabulary.stop))
        new_rows = dict.fromkeys(token_tables(model), image_tokens)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", trainable_token_indices=new_rows)
    return get_peft_model(model, lora)


def token_tables(model: PreTrainedModel) -> list[str]:
    """Names of the modules with a row per token: the embedding and, unless it shares the weights, the head."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tables = [embedding]
    if head.weight is not embedding.weight:
        tables.append(head)
    names = []
    for name, module in model.named_modules():
        if any(module is table for table in tables):
            names.append(name)
    return names


def save_adapter(folder: Path, base: str, subfolder: str = "") -> Path:
    """Names the base model of a saved adapter without directories of this machine, and records its digest.

    Args:
        folder (`Path`): Folder of the adapter.
        base (`str`): Folder or Hub id of the base.
        subfolder (`str`, defaults to `""`): Folder of the language model in the base.

    Returns:
        `Path`: The folder.
    """
    path = folder / "adapter_config.json"
    config = read_json_object(path)
    config["base_model_name_or_path"] = public_name(base)
    path.write_text(json.dumps(config, indent=2))
    record_base(folder, base, subfolder)
    return folder


def language_model_card(
    options: LanguageRunOptions, base: str, of_a_pipeline: bool, result: Result, rows: dict[str, str]
) -> str:
    """Card of a language model with image tokens, or of a LoRA adapter.

    Args:
        options ([`LanguageRunOptions`]): Options of its run.
        base (`str`): Model or pipeline that was trained further.
        of_a_pipeline (`bool`): Whether the base is a pipeline.
        result ([`Result`]): Result of the run.
        rows (`dict[str, str]`): Rows of the table.
    """
    is_adapter = options.lora_rank > 0
    metadata = ModelCardData(
        license=result.origin.license or "unknown",
        library_name="peft" if is_adapter else "transformers",
        tags=["svqvae", "lora"] if is_adapter else ["svqvae"],
        base_model=result.origin.base_model,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("language_model_card.md")),
        name=result.name,
        base=public_name(base),
        of_a_pipeline=of_a_pipeline,
        is_adapter=is_adapter,
        provenance=table_rows((rows | result.origin.rows).items()),
    )
    return f"{card}\n"
