"""Optimizer, learning rate schedule, and the scale of gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from svqvae_hf.trainer.options import RunOptions

MAX_PRECONDITION_DIM = 2048  # SOAP rotates the gradient along each shorter side of a weight


def parameter_groups(
    network: nn.Module, weight_decay: float, decayed_ndim: int, undecayed: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Trained parameters in two groups: with weight decay, and without.

    Args:
        network (`nn.Module`): Network to train.
        weight_decay (`float`): Weight decay of the first group.
        decayed_ndim (`int`): Parameters of at least so many dimensions decay.
        undecayed (`Sequence[str]`, defaults to `()`): Last parts of the names of further parameters without decay.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        last_part = name.rpartition(".")[2]
        if parameter.ndim >= decayed_ndim and last_part not in undecayed:
            decayed.append(parameter)
        else:
            not_decayed.append(parameter)
    decayed_group = {"params": decayed, "weight_decay": weight_decay}
    other_group = {"params": not_decayed, "weight_decay": 0.0}
    return [decayed_group, other_group]


def make_optimizer(
    network: nn.Module,
    options: RunOptions,
    learning_rate: float,
    num_steps: int,
    decayed_ndim: int = 2,
    undecayed: Sequence[str] = (),
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Makes AdamW or SOAP (arXiv 2409.11321) and its learning rate schedule.

    Args:
        network (`nn.Module`): Network to train.
        options ([`RunOptions`]): Options of the optimizer and of the schedule.
        learning_rate (`float`): Peak learning rate.
        num_steps (`int`): Length of the schedule in steps, for any number of processes.
        decayed_ndim (`int`, defaults to 2): Weights of at least so many dimensions decay.
        undecayed (`Sequence[str]`, defaults to `()`): Last parts of the names of further weights without decay.
    """
    groups = parameter_groups(network, options.weight_decay, decayed_ndim, undecayed)
    betas = (options.adam_beta1, options.adam_beta2)
    optimizer: torch.optim.Optimizer
    if options.optimizer == "soap":
        from pytorch_optimizer.optimizer.soap import SOAP  # importing it takes a second

        optimizer = SOAP(groups, lr=learning_rate, betas=betas, max_precondition_dim=MAX_PRECONDITION_DIM)
    else:
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
    lr_scheduler = get_scheduler(
        options.lr_scheduler_type, optimizer, num_warmup_steps=options.num_warmup_steps, num_training_steps=num_steps
    )
    return optimizer, lr_scheduler


def resume_schedule(lr_scheduler: LambdaLR, steps_done: int, options_of_groups: Sequence[Mapping[str, Any]]) -> None:
    """Sets a schedule and its optimizer to the hyperparameters of this run, after their state has been loaded.

    Args:
        lr_scheduler (`LambdaLR`): Schedule, with its optimizer.
        steps_done (`int`): Steps of the schedule that are done.
        options_of_groups (`Sequence[Mapping]`): Hyperparameters of each group of parameters in this run, as
            [`hyperparameters`] returned them before the state was loaded.
    """
    # PyTorch stores the peak learning rate of a group as `initial_lr`. For each group, the schedule has a function,
    # which returns the factor of the peak rate at a step.
    peak_rates = [options["initial_lr"] for options in options_of_groups]
    current_rates = []
    for peak_rate, factor_at in zip(peak_rates, lr_scheduler.lr_lambdas, strict=True):
        current_rates.append(peak_rate * factor_at(steps_done))
    lr_scheduler.last_epoch = steps_done
    lr_scheduler.base_lrs = peak_rates
    lr_scheduler._last_lr = current_rates  # what `get_last_lr` returns
    groups = lr_scheduler.optimizer.param_groups  # with the hyperparameters that were loaded
    for group, options, current_rate in zip(groups, options_of_groups, current_rates, strict=True):
        group.update(options)
        group["lr"] = current_rate  # in `options`, it is the rate before the first step


def hyperparameters(lr_scheduler: LambdaLR) -> list[dict[str, Any]]:
    """Hyperparameters of each group of the optimizer of a schedule."""
    groups = []
    for group in lr_scheduler.optimizer.param_groups:
        group_without_weights = dict(group)
        del group_without_weights["params"]
        groups.append(group_without_weights)
    return groups


def loss_scale(accelerator: Accelerator) -> float:
    """Factor by which the loss, and so each gradient, is multiplied in fp16; 1 in other precisions."""
    if accelerator.scaler is None:
        return 1.0
    return accelerator.scaler.get_scale()


def rescale_gradients(model: nn.Module, factor: float) -> None:
    """Multiplies all gradients of a model by a factor.

    In fp16, the update of one model may change the loss scale. Gradients of another model, which were computed at the
    old scale, then need the factor between both.
    """
    if factor == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor
