"""Runs of transformers' `Trainer` on tokens of images: start, numbers of the log, result."""

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from language_checkpoints import (
    CheckpointOnSignal,
    OptionsOnResume,
    ProgressLines,
    delete_partial_checkpoints,
    find_best_checkpoint,
    read_identity,
    set_aside_partial_checkpoints,
)
from language_options import LanguageRunOptions, argument_faults
from modality_loss import ModalityLoss, ModalitySums
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from svqvae_hf.hub.model_cards import table_rows
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.trainer.checkpoints import check_files, check_unchanged, compare_with_checkpoint, find_checkpoint
from svqvae_hf.trainer.data.sample_order import SAMPLES_PER_STEP
from svqvae_hf.trainer.folder_lock import FolderLock
from svqvae_hf.trainer.identity import RunIdentity, model_digests, token_set_digests
from svqvae_hf.trainer.interruption import Interruption, stop_message
from svqvae_hf.trainer.muon import MuonAndAdam, muon_groups
from svqvae_hf.trainer.optimization import MAX_PRECONDITION_DIM
from svqvae_hf.trainer.options import check_models, public_values, raise_faults
from svqvae_hf.trainer.publishing import Result, find_sources, provenance, refuse_finished, refuse_sources

TRAINED_FOLDER = "trained.partial"  # in the output folder: the weights, before they are part of a result


class LanguageRun:
    """A run from its start to its result. The script makes the model and the examples in between.

    Args:
        script (`str`): The script, such as `training/train_llamagen.py`.
        options ([`LanguageRunOptions`]): Options of the script.
        arguments (`TrainingArguments`): Arguments of transformers. Some are set here.

    Attributes:
        num_examples (`int`): Examples of the whole run.
        checkpoint (`Path`, *optional*): Checkpoint from which the run resumes, once it has begun.

    Raises:
        SystemExit: The run has finished before.
        ValueError: An option is wrong or has no effect, or the folder holds the result of another run.
    """

    def __init__(self, script: str, options: LanguageRunOptions, arguments: TrainingArguments):
        raise_faults(argument_faults(arguments, options))
        check_models(options)
        refuse_sources(arguments.output_dir, options)
        self.script = script
        self.options = options
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.is_main = arguments.process_index == 0
        self.push_to_hub = arguments.push_to_hub
        self.lock: FolderLock | None = None
        self.checkpoint: Path | None = None
        self.best_checkpoint: Path | None = None
        self.examples_per_step = (
            arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        )
        self.num_examples = arguments.max_steps * self.examples_per_step
        # The identity holds the arguments as the user gave them, so `_adapt_arguments` changes them afterwards.
        self.identity = RunIdentity(
            options=public_values(asdict(options) | arguments.to_dict()),
            models=model_digests(options),
            sets=token_set_digests(options),
            # The order in which the run reads its examples depends on these two.
            order={"seed": arguments.seed, SAMPLES_PER_STEP: self.examples_per_step},
        )
        refuse_finished(self.output_dir, self.identity)
        self.origin = find_sources(options)  # here, so that different licences are an error before anything is loaded
        self._adapt_arguments()
        torch.manual_seed(arguments.seed)  # for new weights; the Trainer sets it later

    def _adapt_arguments(self) -> None:
        """Sets the arguments of transformers that the run decides."""
        arguments = self.arguments
        arguments.push_to_hub = False  # the Trainer would upload its checkpoints; `publish` uploads the result
        arguments.train_sampling_strategy = "sequential"  # examples are in a random order already
        arguments.remove_unused_columns = False
        arguments.eval_on_start = self.options.validation_token_set is not None
        if not sys.stderr.isatty():
            arguments.disable_tqdm = True  # a log file gets lines in place of bars
            disable_progress_bar()  # the bars of loading and saving weights

    def begin(self) -> None:
        """Keeps other runs from writing to the folder, and finds the checkpoint from which the run resumes.

        Raises:
            ValueError: Another run writes to the folder, or the checkpoint is damaged, or was written with other
                models or examples, or with examples in another order.
        """
        with self.arguments.main_process_first(local=False):  # so that all processes find the same checkpoints
            has_folder = self.output_dir.is_dir()  # if not, `train` makes it
            if self.is_main and has_folder:
                self.lock = FolderLock(self.output_dir)
                set_aside_partial_checkpoints(self.output_dir)
        self.checkpoint = self._find_checkpoint()
        if self.checkpoint is not None:
            self._check_resumable(self.checkpoint)
            if self.arguments.load_best_model_at_end:
                self.best_checkpoint = find_best_checkpoint(self.checkpoint)
            # The run that wrote the checkpoint has validated before its first step. A resumed run skips that.
            self.arguments.eval_on_start = False

    def _find_checkpoint(self) -> Path | None:
        """Finds the checkpoint from which the run resumes; `None` for a new run."""
        arguments = self.arguments
        return find_checkpoint(self.output_dir, arguments.resume_from_checkpoint, arguments.max_steps)

    def _check_resumable(self, checkpoint: Path) -> None:
        """Raises unless this run can go on from a checkpoint. Prints which options have changed."""
        check_files(checkpoint)
        for change in compare_with_checkpoint(checkpoint, read_identity(checkpoint), self.identity):
            sys.stderr.write(f"{change}\n")

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
            examples ([`LlamaGenExamples`] or [`ChatExamples`]): Examples of the run.
            held_out (`Dataset`, *optional*): Examples of a validation.
            collate (`Callable`): Joins examples to a batch.
            codes (`range`): Tokens that are codes.
            encode (`Callable`, *optional*): Features of captions, as arguments of the model.

        Raises:
            SystemExit: A signal stopped the run, after a checkpoint was saved.
            ValueError: An option does not work with FSDP.
        """
        if self.is_main and self.lock is None:
            self._lock_new_folder()
        model.config.use_cache = False  # a model with a cache would not tell packed examples apart
        trainer = LanguageModelTrainer(
            model,
            self.arguments,
            train_dataset=examples,
            eval_dataset=held_out,
            data_collator=collate,
            loss=ModalityLoss(codes),
            replaced_fraction=self.options.replaced_fraction,
            encode=encode,
            rows_per_epoch=examples.rows_per_epoch,
            best_checkpoint=self.best_checkpoint,
            optimizer_cls_and_kwargs=optimizer_and_arguments(model, self.options, self.arguments),
        )
        raise_faults(sharding_faults(trainer, self.options))
        self.result = Result(self.arguments, self.identity, self.origin, self.push_to_hub, self.is_main)
        checkpoint_folder = None if self.checkpoint is None else str(self.checkpoint)
        with Interruption(trainer.accelerator) as interruption:
            callback = CheckpointOnSignal(interruption, self.identity)
            trainer.add_callback(callback)
            if self.arguments.disable_tqdm:
                trainer.remove_callback(PrinterCallback)
                trainer.add_callback(ProgressLines())
            trainer.train(checkpoint_folder)
        if callback.stopped:
            if self.is_main:
                steps_done = trainer.state.global_step
                print(stop_message(steps_done, self.arguments.resume_from_checkpoint), file=sys.stderr)
            sys.exit(interruption.exit_code)
        if held_out is not None and not trainer.has_validated_weights():
            trainer.evaluate()
        model.config.use_cache = True
        return trainer

    def _lock_new_folder(self) -> None:
        """Makes the folder of the run, which was not there when the run began, and locks it."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(self.output_dir)
        refuse_finished(self.output_dir, self.identity)
        check_unchanged(self.output_dir, self.checkpoint, self._find_checkpoint())

    def release(self) -> None:
        """Lets other runs write to the folder."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def publish(
        self,
        trainer: "LanguageModelTrainer",
        save: Callable[[Path], Path],
        make_card: Callable[[Result, dict[str, str]], str],
    ) -> None:
        """Saves the trained model, or its LoRA adapter, with a card in the output folder.

        Args:
            trainer ([`LanguageModelTrainer`]): From `train`.
            save (`Callable`): Adds what belongs to the model, such as its tokenizer, to the folder of its weights.
                Returns the folder of the result: the same one, or one inside it that holds a whole pipeline.
            make_card (`Callable`): Returns the text of the card, from the result and rows of a table.

        Raises:
            ValueError: DeepSpeed has saved no whole weights.
        """
        trained_folder = self.output_dir / TRAINED_FOLDER
        save_weights(trainer, trained_folder)
        if not self.is_main:
            return
        check_whole_weights(trained_folder)
        (trained_folder / "training_args.bin").unlink()  # a pickle with paths of this machine
        result_folder = save(trained_folder)

        def move_result(folder: Path) -> None:
            """Moves the result to an empty folder. `trained_folder` is the result, or has the result in it."""
            shutil.copytree(result_folder, folder, dirs_exist_ok=True)
            shutil.rmtree(trained_folder)

        rows = provenance(self.script, self.arguments.max_steps, self.examples_per_step, "examples")
        rows |= trainer.last_numbers()
        card = make_card(self.result, rows)
        delete_partial_checkpoints(self.output_dir)
        self.result.publish(move_result, card)  # calls `move_result` with the folder in which it publishes


def run_language_training(
    script: str, train: Callable[[LanguageRun], None], options: LanguageRunOptions, arguments: TrainingArguments
) -> None:
    """Calls the training function of a script, while no other run may write to its folder.

    Raises:
        SystemExit: The run has finished before, or a signal stopped it.
        ValueError: An option is wrong, or the folder holds or belongs to another run.
    """
    run = LanguageRun(script, options, arguments)
    try:
        run.begin()
        train(run)
    finally:
        run.release()


class LanguageModelTrainer(Trainer):
    """Trainer that encodes captions, replaces some ids by others, and logs texts and images apart.

    Args:
        *args: As for `Trainer`.
        loss ([`ModalityLoss`]): Loss.
        replaced_fraction (`float`): Largest fraction of the ids of an image that the model reads as other ids.
        encode (`Callable`, *optional*): Encodes the captions of a batch. Returns their features as arguments of the
            model.
        rows_per_epoch (`int`, *optional*): Rows of the token set. If it is not given, the log has no `epoch`.
        best_checkpoint (`Path`, *optional*): Best checkpoint of a resumed run.
        **kwargs: As for `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        loss: ModalityLoss,
        replaced_fraction: float,
        encode: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
        rows_per_epoch: int | None = None,
        best_checkpoint: Path | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.loss = loss
        self.replaced_fraction = replaced_fraction
        self.encode = encode
        self.rows_per_epoch = rows_per_epoch
        # A checkpoint brings options of the optimizer and the path of the best checkpoint. A resumed run has its own.
        self.on_resume = OptionsOnResume(best_checkpoint)
        self.add_callback(self.on_resume)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LRScheduler:
        """Makes the schedule of the learning rate, and remembers the options of its optimizer."""
        scheduler = super().create_scheduler(*args, **kwargs)
        if isinstance(scheduler, LambdaLR):
            self.on_resume.remember(scheduler)
        return scheduler

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss. In training, the model reads some ids as others, and must still predict the true ones."""
        inputs = dict(inputs)
        if self.encode is not None:
            inputs |= self.encode(inputs.pop("caption"))
        if self.replaced_fraction and model.training:
            inputs["input_ids"] = self.replace_some_ids(inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def replace_some_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Replaces some ids of images in tokens `(batch, length)` by ids from random places of the batch.

        If a model has only read true ids in training, one wrong id misleads it when it draws. So here it reads wrong
        ids, too. Each row of the batch has its own random fraction of replaced ids, up to `replaced_fraction`.
        """
        codes = self.loss.codes
        is_code = (tokens >= codes.start) & (tokens < codes.stop)  # (batch, length); the other tokens are text
        fractions = self.replaced_fraction * torch.rand(len(tokens), 1, device=tokens.device)  # (batch, 1)
        is_chosen = torch.rand(tokens.shape, device=tokens.device) < fractions  # (batch, length)
        # Ids change their places with each other, and text stays where it is.
        ids = tokens[is_code]  # (ids,)
        order = torch.randperm(len(ids), device=tokens.device)
        shuffled_tokens = tokens.clone()
        shuffled_tokens[is_code] = ids[order]
        # Text may be chosen as well as ids, but is the same in `shuffled_tokens`.
        return torch.where(is_chosen, shuffled_tokens, tokens)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Adds the losses of texts and of images, the epoch and, in a validation, accuracies and bits per id."""
        if "loss" in logs:
            sums = self._reduce_sums(self.loss.take_training_sums())
            self._add_losses(logs, "loss", sums)
        if "eval_loss" in logs:
            sums = self._reduce_sums(self.loss.take_validation_sums())
            self._add_losses(logs, "eval_loss", sums)
            self._add_accuracies(logs, sums)
            self._replace_validation_loss(logs, sums)
        # The Trainer counts the whole run as one epoch, because the examples of the run are one data set for it.
        epoch_of_trainer = self.state.epoch
        self.state.epoch = self._count_epochs()
        super().log(logs, *args)  # adds the epoch
        self.state.epoch = epoch_of_trainer

    def _count_epochs(self) -> float | None:
        """How often the run has read the rows of the token set so far, such as 9.6 times."""
        if self.rows_per_epoch is None:
            return None
        examples_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self.state.global_step * examples_per_step / self.rows_per_epoch

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

    def has_validated_weights(self) -> bool:
        """Whether the last validation measured the weights that the model has now."""
        step_of_weights = self.state.global_step
        if self._has_best_weights():
            step_of_weights = self.state.best_global_step
        for log_entry in reversed(self.state.log_history):
            if "eval_loss" in log_entry:
                return log_entry["step"] == step_of_weights
        return False

    def _has_best_weights(self) -> bool:
        """Whether the model has the weights of the best validation after training, instead of the last ones."""
        return self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None

    def last_numbers(self) -> dict[str, str]:
        """Last losses and other numbers of a validation, and the step of the best weights, as rows of a card."""
        last_values: dict[str, float] = {}
        for log_entry in self.state.log_history:
            last_values |= log_entry  # later values replace earlier ones of the same name
        rows = {}
        for name in sorted(last_values):
            if name.startswith(("loss", "eval_loss", "eval_accuracy", "eval_bits")):
                rows[name.replace("_", " ")] = f"{last_values[name]:.4g}"
        if self._has_best_weights():
            rows["weights"] = f"after step {self.state.best_global_step:,}, with the best validation"
        return rows


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Saves the trained weights. All processes call it, because some engines divide the weights between them."""
    if trainer.is_fsdp_enabled:
        # Otherwise, each process would save its own part of the weights.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


def check_whole_weights(folder: Path) -> None:
    """Raises ValueError if DeepSpeed has saved no whole weights, but each process its own part."""
    has_weights = any(folder.glob("*.safetensors"))
    if not has_weights:
        raise ValueError("DeepSpeed has kept the weights in shards. Set zero3_save_16bit_model, and resume.")


def optimizer_and_arguments(
    model: PreTrainedModel, options: LanguageRunOptions, arguments: TrainingArguments
) -> tuple[type, dict[str, Any]] | None:
    """Class and keyword arguments of an optimizer that transformers does not have, Muon or SOAP.

    None for AdamW: the Trainer then makes the optimizer itself, from `arguments`.
    """
    if options.optimizer == "muon":
        return MuonAndAdam, muon_arguments(model, arguments)
    if options.optimizer == "soap":
        from pytorch_optimizer.optimizer.soap import SOAP  # importing it takes a second

        return SOAP, soap_arguments(arguments)
    return None


def muon_arguments(model: PreTrainedModel, arguments: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of [`MuonAndAdam`].

    `params` holds its own groups of parameters. The Trainer uses them in place of the groups that it makes by default.
    """
    return {
        "params": muon_groups(model, arguments.weight_decay),
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
    }


def soap_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of SOAP. The Trainer adds the parameters."""
    return {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "max_precondition_dim": MAX_PRECONDITION_DIM,
    }


def sharding_faults(trainer: Trainer, options: LanguageRunOptions) -> Iterator[str]:
    """Yields an error message for each option that does not work with FSDP, which splits weights between processes."""
    if not trainer.is_fsdp_enabled:
        if trainer.args.fsdp:  # the option is given, but accelerate has not enabled FSDP
            yield "`--fsdp` has no effect, because accelerate splits weights between GPUs only. Leave it out."
        return
    if options.optimizer != "adamw":
        yield f"`--optimizer` must be adamw with FSDP, but is {options.optimizer}."
    if options.lora_rank and trainer.model.config.get_text_config().tie_word_embeddings:
        yield "`--lora_rank` must be 0 with FSDP, because the head of the model has the weights of its embedding."


def language_model_card(
    options: LanguageRunOptions, base: str, result: Result, rows: dict[str, str], *, of_a_pipeline: bool
) -> str:
    """Card of a language model with image tokens, or of a LoRA adapter.

    Args:
        options ([`LanguageRunOptions`]): Options of its run.
        base (`str`): Model or pipeline that was trained further.
        result ([`Result`]): Result of the run.
        rows (`dict[str, str]`): Rows of the table.
        of_a_pipeline (`bool`): Whether the base is a pipeline.
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
