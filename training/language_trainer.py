"""transformers' `Trainer` for language models with codes, which reads captions and stops on signals."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from svqvae_hf.trainer.checkpoints import write_checksums
from svqvae_hf.trainer.examples import IGNORED
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.optimization import hyperparameters, resume_schedule


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
        targets = labels[:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        counted = targets != IGNORED
        is_code = (targets >= self.codes.start) & (targets < self.codes.stop)
        masks = torch.stack([counted & ~is_code, counted & is_code]).float()
        with torch.no_grad():
            hits = (logits.argmax(-1) == targets).float()
            sums = torch.stack([masks @ losses, masks.sum(1), masks @ hits], dim=1)
            training = logits.requires_grad
            self.sums[training] = self.sums[training].to(sums.device) + sums
        return losses.sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class CheckpointOnSignal(TrainerCallback, ExportableState):
    """Saves a checkpoint and stops after SIGTERM or Ctrl-C. Checkpoints tell by which digest their rows are known.

    Not by transformers' `enable_jit_checkpoint`, which waits 3 seconds, lets each process decide for itself and does
    not know Ctrl-C.

    Args:
        interruption ([`Interruption`]): Signals of the run.
        digest (`str`): Digest of the rows.
    """

    def __init__(self, interruption: Interruption, digest: str):
        self.interruption, self.stopped, self.digest = interruption, False, digest

    def state(self) -> dict[str, dict[str, str]]:
        """Facts that a checkpoint stores."""
        return {"args": {}, "attributes": {"digest": self.digest}}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds checksums to a checkpoint."""
        write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Sets the hyperparameters of a resumed run to its own options, as the checkpoint had others."""
        own = {"initial_lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        if state.global_step and isinstance(scheduler := kwargs["lr_scheduler"], LambdaLR):
            pairs = zip(hyperparameters(scheduler), (args.weight_decay, 0.0), strict=True)  # norms do not decay
            groups = [group | own | {"weight_decay": decay} for group, decay in pairs]
            resume_schedule(scheduler, state.global_step, groups)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a checkpoint and the end, if any process got a signal."""
        if self.interruption.requested():
            control.should_save = control.should_training_stop = self.stopped = True
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
        self.loss, self.scheduled_sampling, self.encode = loss, scheduled_sampling, encode

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss, in training with scheduled sampling of some of the ids."""
        if self.encode is not None:
            features = self.encode(inputs["caption"])
            inputs = {name: value for name, value in inputs.items() if name != "caption"} | features
        if self.scheduled_sampling and model.training:
            inputs = inputs | {"input_ids": self.draw_some(model, inputs)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def draw_some(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Replaces some ids by ids that the model samples after the tokens before them."""
        codes, tokens = self.loss.codes, inputs["input_ids"].clone()
        is_code = (tokens >= codes.start) & (tokens < codes.stop)
        share = self.scheduled_sampling * torch.rand(len(tokens), 1, device=tokens.device)
        chosen = (is_code & (torch.rand(tokens.shape, device=tokens.device) < share))[:, 1:]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1][chosen]
        drawn = logits[:, codes.start : codes.stop].float().softmax(-1).multinomial(1)
        tokens[:, 1:][chosen] = codes.start + drawn[:, 0]
        return tokens

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Adds the loss of texts and of images and, in a validation, their accuracy and bits per id."""
        for name, training in (("loss", True), ("eval_loss", False)):
            if name in logs:
                sums = self.accelerator.reduce(self.loss.sums[training]).tolist()
                self.loss.sums[training] = torch.zeros(2, 3)
                for modality, (total, count, hits) in zip(("text", "image"), sums, strict=True):
                    if count:
                        logs[f"{name}_{modality}"] = total / count
                        logs |= {} if training else {f"eval_accuracy_{modality}": hits / count}
                if not training and sums[1][1]:
                    logs["eval_bits_per_id"] = logs["eval_loss_image"] / math.log(2)
        super().log(logs, *args)

    def last_numbers(self) -> dict[str, str]:
        """Last losses and other numbers of a validation, as rows of a card."""
        logs = {name: value for entry in self.state.log_history for name, value in entry.items()}
        names = [name for name in logs if name.startswith(("loss", "eval_loss", "eval_accuracy", "eval_bits"))]
        return {name.replace("_", " "): f"{logs[name]:.4g}" for name in sorted(names)}
