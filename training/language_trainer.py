"""Runs of transformers' `Trainer` on tokens of images: stop and resumption, numbers of the log, result."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from language_options import LanguageRunOptions, argument_faults
from modality_loss import ModalityLoss, ModalitySums
from peft import PeftModel
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
from svqvae_hf.trainer.checkpoints import NAME, RUN_STATE, check_files, find_checkpoint, write_checksums
from svqvae_hf.trainer.data.sample_order import DIGEST, SAMPLES_PER_STEP, check_same
from svqvae_hf.trainer.identity import UNIMPORTANT, RunIdentity, model_digests
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.muon import MuonAndAdam, muon_groups
from svqvae_hf.trainer.optimization import MAX_PRECONDITION_DIM, hyperparameters, resume_schedule
from svqvae_hf.trainer.options import (
    public_values,
    raise_faults,
)
from svqvae_hf.trainer.publishing import Result, find_sources, provenance, refuse_finished

TRAINER_STATE = "trainer_state.json"  # in a checkpoint, written last
TRAINED_FOLDER = "trained.partial"  # in the output folder: the weights, before they are part of a result


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
        self.public_options = public_values(asdict(options) | arguments.to_dict())
        self.identity = RunIdentity(self.public_options, model_digests(options))
        refuse_finished(self.output_dir, self.identity)
        set_aside_partial_checkpoints(self.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, arguments.resume_from_checkpoint, arguments.max_steps)
        if self.checkpoint is not None:
            check_files(self.checkpoint)
        self.push_to_hub = arguments.push_to_hub
        is_validated = options.validation_token_set is not None
        is_new = self.checkpoint is None
        arguments.push_to_hub = False  # the Trainer would upload its checkpoints
        arguments.train_sampling_strategy = "sequential"  # examples are in a random order already
        arguments.remove_unused_columns = False
        arguments.eval_on_start = is_validated and is_new
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
            ValueError: The checkpoint was written with other examples, or in another order, or an option does not work
                with FSDP.
        """
        facts = RunFacts(examples.digest, self.arguments.seed, self.examples_per_step, self.public_options)
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
        raise_faults(sharding_faults(trainer, self.options))
        self.is_main = trainer.is_world_process_zero()
        origin = find_sources(self.options)
        self.result = Result(self.arguments, self.identity, origin, self.push_to_hub, self.is_main)
        checkpoint_folder = None if self.checkpoint is None else str(self.checkpoint)
        with Interruption(trainer.accelerator) as interruption:
            callback = CheckpointOnSignal(interruption, facts)
            trainer.add_callback(callback)
            trainer.train(checkpoint_folder)
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
            make_card (`Callable`): Returns the text of the card, from the result and rows of a table.

        Raises:
            ValueError: DeepSpeed has saved no whole weights.
        """
        trained_folder = self.output_dir / TRAINED_FOLDER
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(trained_folder))  # by all processes, because some engines shard the weights
        if not self.is_main:
            return
        has_weights = any(trained_folder.glob("*.safetensors"))
        if not has_weights:
            raise ValueError("DeepSpeed has kept the weights in shards. Set zero3_save_16bit_model, and resume.")
        (trained_folder / "training_args.bin").unlink()  # a pickle with paths of this machine
        result_folder = save(trained_folder)
        rows = provenance(self.script, self.arguments.max_steps, self.examples_per_step, "examples")
        rows |= trainer.last_numbers()
        copy_result = partial(shutil.copytree, result_folder, dirs_exist_ok=True)
        self.result.publish(copy_result, make_card(self.result, rows))
        shutil.rmtree(trained_folder)


def set_aside_partial_checkpoints(output_dir: Path) -> None:
    """Renames checkpoints that a killed run left unfinished, so that none is resumed or counted."""
    for folder in output_dir.glob("checkpoint-*"):
        if NAME.fullmatch(folder.name) is None:
            continue
        with suppress(OSError):  # another process may rename the folder first
            if not _is_complete(folder):
                set_aside = output_dir / f"partial-{folder.name}"
                shutil.rmtree(set_aside, ignore_errors=True)  # an earlier one
                folder.rename(set_aside)


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has the file that its writer saves last: this script's, or another one's."""
    file_names = [path.name for path in checkpoint.iterdir()]
    return TRAINER_STATE in file_names or RUN_STATE in file_names


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

        Prints which other options have changed.

        Raises:
            ValueError: The rows, their order, the optimizer or the weights are others.
        """
        recorded = _read_facts(checkpoint)
        check_same(DIGEST, recorded.get("digest"), self.digest)
        has_only_digest = "options" not in recorded  # written by an old version
        if has_only_digest:
            return
        recorded_options = recorded["options"]
        check_same("seed", recorded["seed"], self.seed)
        check_same(SAMPLES_PER_STEP, recorded["examples_per_step"], self.examples_per_step)
        for name in ("optimizer", "lora_rank"):
            check_same(f"option `--{name}`", recorded_options.get(name), self.options.get(name))
        self._print_changes(recorded_options)

    def _print_changes(self, recorded_options: Mapping[str, Any]) -> None:
        """Prints which options differ from the recorded ones, among those that both have."""
        json_options = json.loads(json.dumps(self.options))  # tuples are lists in a checkpoint
        for name in sorted(json_options):
            if name in UNIMPORTANT or name not in recorded_options:
                continue
            before = recorded_options[name]
            now = json_options[name]
            if before != now:
                sys.stderr.write(f"Changed on resume: --{name} from {before} to {now}\n")


def _read_facts(checkpoint: Path) -> dict[str, Any]:
    """Facts that [`CheckpointOnSignal`] recorded in a checkpoint; empty if it did not write the checkpoint."""
    trainer_state = read_json_object(checkpoint / TRAINER_STATE)
    callbacks = trainer_state.get("stateful_callbacks", {})
    if CheckpointOnSignal.__name__ not in callbacks:
        return {}
    return callbacks[CheckpointOnSignal.__name__].get("attributes", {})


class CheckpointOnSignal(TrainerCallback, ExportableState):
    """Saves a checkpoint and stops after SIGTERM or Ctrl-C. Checkpoints record facts of the run.

    It replaces transformers' `enable_jit_checkpoint`, which waits 3 seconds, lets each process decide for itself and
    does not know Ctrl-C.

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
        """Sets the hyperparameters of a resumed run to its own options, because the checkpoint brought older ones."""
        scheduler = kwargs["lr_scheduler"]
        is_resumed = state.global_step > 0
        if not is_resumed or not isinstance(scheduler, LambdaLR):
            return
        groups = hyperparameters(scheduler)  # of decayed and of other weights, in this order in transformers and Muon
        for group in groups:
            group["initial_lr"] = args.learning_rate
            group["betas"] = (args.adam_beta1, args.adam_beta2)
        groups[0]["weight_decay"] = args.weight_decay
        groups[1]["weight_decay"] = 0.0
        resume_schedule(scheduler, state.global_step, groups)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a checkpoint and the end, if any process got a signal."""
        if self.interruption.requested():
            control.should_save = True
            control.should_training_stop = True
            self.stopped = True
            args.save_total_limit = None  # otherwise the Trainer deletes this checkpoint, unless it is the best


class LanguageModelTrainer(Trainer):
    """Trainer that encodes captions, replaces some ids by drawn ones, and logs texts and images apart.

    Args:
        *args: As for `Trainer`.
        loss ([`ModalityLoss`]): Loss.
        scheduled_sampling (`float`): Largest fraction of the ids of an image that are replaced by ids which the model
            draws itself.
        encode (`Callable`, *optional*): Returns the features of a batch's `caption` as arguments of the model.
        **kwargs: As for `Trainer`.
    """

    def __init__(self, *args: Any, loss: ModalityLoss, scheduled_sampling: float, encode: Any = None, **kwargs: Any):
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.loss = loss
        self.scheduled_sampling = scheduled_sampling
        self.encode = encode

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss. In training, some ids are replaced by drawn ones (scheduled sampling)."""
        inputs = dict(inputs)
        if self.encode is not None:
            inputs |= self.encode(inputs.pop("caption"))
        if self.scheduled_sampling and model.training:
            inputs["input_ids"] = self.draw_some(model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def draw_some(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Replaces some ids by ids that the model draws after the tokens before them.

        Each row of the batch has its own random fraction of replaced ids, up to `scheduled_sampling`.
        """
        codes = self.loss.codes
        tokens = inputs["input_ids"].clone()  # (batch, length)
        is_code = (tokens >= codes.start) & (tokens < codes.stop)  # (batch, length)
        fractions = self.scheduled_sampling * torch.rand(len(tokens), 1, device=tokens.device)  # (batch, 1)
        is_chosen = torch.rand(tokens.shape, device=tokens.device) < fractions  # (batch, length)
        is_replaced = is_code & is_chosen
        is_replaced = is_replaced[:, 1:]  # (batch, length - 1), because the model draws no first token
        model_inputs = dict(inputs)
        model_inputs.pop("labels", None)
        logits = model(**model_inputs).logits[:, :-1]  # (batch, length - 1, vocab_size), of each next token
        code_logits = logits[is_replaced][:, codes.start : codes.stop].float()  # (replaced, codes)
        drawn_ids = code_logits.softmax(-1).multinomial(1)[:, 0]  # (replaced,)
        tokens[:, 1:][is_replaced] = codes.start + drawn_ids
        return tokens

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Adds the loss of texts and of images and, in a validation, their accuracy and bits per id."""
        if "loss" in logs:
            sums = self._reduce_sums(self.loss.take_training_sums())
            self._add_losses(logs, "loss", sums)
        if "eval_loss" in logs:
            sums = self._reduce_sums(self.loss.take_validation_sums())
            self._add_losses(logs, "eval_loss", sums)
            self._add_accuracies(logs, sums)
            self._replace_validation_loss(logs, sums)
        super().log(logs, *args)

    def _reduce_sums(self, sums: torch.Tensor) -> dict[str, ModalitySums]:
        """Adds the sums `(2, 3)` of all processes.

        Returns:
            `dict[str, ModalitySums]`: Sums over `text` and over `image`, of which one is absent if it has no tokens.
        """
        text_sums, image_sums = self.accelerator.reduce(sums).tolist()
        sums_of_modality = {}
        for modality, (loss, tokens, hits) in {"text": text_sums, "image": image_sums}.items():
            if tokens:
                sums_of_modality[modality] = ModalitySums(loss, tokens, hits)
        return sums_of_modality

    def _add_losses(self, logs: dict[str, float], name: str, sums: Mapping[str, ModalitySums]) -> None:
        """Adds the mean loss of each modality."""
        for modality, modality_sums in sums.items():
            logs[f"{name}_{modality}"] = modality_sums.loss / modality_sums.tokens

    def _add_accuracies(self, logs: dict[str, float], sums: Mapping[str, ModalitySums]) -> None:
        """Adds the accuracy of each modality, and the bits per id of images."""
        for modality, modality_sums in sums.items():
            logs[f"eval_accuracy_{modality}"] = modality_sums.hits / modality_sums.tokens
        if "image" in sums:
            logs["eval_bits_per_id"] = logs["eval_loss_image"] / math.log(2)

    def _replace_validation_loss(self, logs: dict[str, float], sums: Mapping[str, ModalitySums]) -> None:
        """Replaces the Trainer's mean over batches by the mean over tokens, which does not depend on batches."""
        total_loss = 0.0
        total_tokens = 0.0
        for modality_sums in sums.values():
            total_loss += modality_sums.loss
            total_tokens += modality_sums.tokens
        if total_tokens:
            logs["eval_loss"] = total_loss / total_tokens

    def last_numbers(self) -> dict[str, str]:
        """Last losses and other numbers of a validation, as rows of a card."""
        last_values: dict[str, float] = {}
        for log_entry in self.state.log_history:
            last_values |= log_entry
        rows = {}
        for name in sorted(last_values):
            if name.startswith(("loss", "eval_loss", "eval_accuracy", "eval_bits")):
                rows[name.replace("_", " ")] = f"{last_values[name]:.4g}"
        return rows


def optimizer_class(
    model: PreTrainedModel, options: LanguageRunOptions, arguments: TrainingArguments
) -> tuple[type, dict[str, Any]] | None:
    """Class of the optimizer and its keyword arguments; None for AdamW, which transformers makes itself."""
    if options.optimizer == "adamw":
        return None
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if options.optimizer == "muon":
        groups = muon_groups(model, arguments.weight_decay)
        return MuonAndAdam, {"params": groups, "lr": arguments.learning_rate, "betas": betas}
    from pytorch_optimizer.optimizer.soap import SOAP  # importing it takes a second

    return SOAP, {"lr": arguments.learning_rate, "betas": betas, "max_precondition_dim": MAX_PRECONDITION_DIM}


def sharding_faults(trainer: Trainer, options: LanguageRunOptions) -> Iterator[str]:
    """Yields an error message for each option that does not work with FSDP, which splits weights between processes."""
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:
            yield "`--fsdp` has no effect, because accelerate splits weights between GPUs only. Leave it out."
        return
    if options.optimizer != "adamw":
        yield f"`--optimizer` must be adamw with FSDP, but is {options.optimizer}."
    if options.lora_rank and trainer.model.config.get_text_config().tie_word_embeddings:
        yield "`--lora_rank` must be 0 with FSDP, because the head of the model has the weights of its embedding."


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
    library = "transformers"
    tags = ["svqvae"]
    if is_adapter:
        library = "peft"
        tags.append("lora")
    metadata = ModelCardData(
        license=result.origin.license or "unknown",
        library_name=library,
        tags=tags,
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
