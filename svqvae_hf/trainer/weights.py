"""The trained weights: their updates, their average, and their state in checkpoints."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from svqvae_hf.trainer.optimization import hyperparameters, resume_schedule
from svqvae_hf.trainer.options import RunOptions


class Weights:
    """Weights of a network, which an optimizer updates and `--use_ema` averages.

    Args:
        options ([`RunOptions`]): Options.
        accelerator (`Accelerator`): Accelerator that prepared the model and the optimizer.
        network (`nn.Module`): The bare network.
        model (`nn.Module`): The network as `accelerator.prepare` returned it.
        optimizer (`torch.optim.Optimizer`): Optimizer as `accelerator.prepare` returned it.
        lr_scheduler (`LambdaLR`): Learning rate schedule of the optimizer.
        use_ema (`bool`): Whether the weights are averaged.

    Attributes:
        lr (`float`): Learning rate of the last update.
    """

    def __init__(
        self,
        options: RunOptions,
        accelerator: Accelerator,
        network: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LambdaLR,
        use_ema: bool,
    ):
        self.options = options
        self.accelerator = accelerator
        self.network = network
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.ema = None
        if use_ema:
            self.ema = EMAModel(network.parameters(), decay=options.ema_decay)
        # Hyperparameters of each group of the optimizer, as the options of this run set them. When a run is resumed,
        # accelerate overwrites them by older ones, and `load_state_dict` restores them.
        self.hyperparameters = hyperparameters(lr_scheduler)
        self.lr = float(lr_scheduler.get_last_lr()[0])
        self.skipped = 0  # number of updates that were skipped since the last one that was not

    def update(self) -> dict[str, torch.Tensor]:
        """Clips the gradients, updates weights and average, and sets the gradients to zero.

        An update is skipped, and counted, if a gradient is not finite. The learning rate advances all the same.

        Returns:
            `dict[str, torch.Tensor]`: Numbers for the log, among them the norm of the gradients before clipping.

        Raises:
            ValueError: If too many updates in a row were skipped.
        """
        self.lr = float(self.lr_scheduler.get_last_lr()[0])
        # Not accelerate's function, because it would unscale the gradients of all optimizers in fp16.
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        is_finite = norm.isfinite()
        # In fp16, there is a scaler, and `step` calls it. If a gradient is not finite, the scaler skips the update by
        # itself, and lowers its scale for the next one. So `step` must then be called, too.
        has_scaler = self.accelerator.scaler is not None
        if is_finite or has_scaler:
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if is_finite:
            self.skipped = 0
            if self.ema is not None:
                self.ema.step(self.network.parameters())
        else:
            self.skipped += 1
        if self.skipped > self.options.max_skipped_steps:
            raise ValueError(
                f"Gradients must be finite, but were not for {self.skipped} steps in a row. Lower `--learning_rate` "
                "and resume from an earlier checkpoint."
            )
        return {"grad_norm": norm, "skipped": (~is_finite).float()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with the averaged weights if there are any.

        After an error, the run ends, so nothing is restored.
        """
        modules_in_training_mode = [module for module in self.network.modules() if module.training]
        self.network.eval()
        if self.ema is not None:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        with torch.no_grad():
            yield
        if self.ema is not None:
            self.ema.restore(self.network.parameters())
        for module in modules_in_training_mode:  # parts that are not trained stay in evaluation mode
            module.training = True

    def final(self) -> dict[str, torch.Tensor]:
        """State dict of the network with its averaged weights, if any."""
        if self.ema is not None:
            self.ema.copy_to(self.network.parameters())
        return self.network.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Progress of the schedule, the average, and the skipped updates.

        accelerate saves and loads models and optimizers by itself, so they are left out.
        """
        state: dict[str, Any] = {"updates": self.lr_scheduler.last_epoch, "skipped": self.skipped}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from what `state_dict` returned, with the hyperparameters of this run.

        accelerate has loaded the model and the optimizer of the checkpoint before.

        Raises:
            ValueError: If the weights are averaged, but the state has no average, or the other way round.
        """
        checkpoint_used_ema = "ema" in state
        run_uses_ema = self.ema is not None
        if run_uses_ema != checkpoint_used_ema:
            raise ValueError(f"`--use_ema` must be {checkpoint_used_ema}, as in the run that wrote the checkpoint.")
        resume_schedule(self.lr_scheduler, state["updates"], self.hyperparameters)
        self.skipped = state["skipped"]
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.decay = self.options.ema_decay
            self.ema.to(self.accelerator.device)  # its state is loaded to the CPU
