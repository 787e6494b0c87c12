"""Trains an SVQVAE: `accelerate launch training/train.py --train_data_dir PHOTOS --output_dir OUT`."""

import logging
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, broadcast, set_seed
from codebook import initialise_codebook
from data import CropDataset, CropSampler, crop_loader, load_images
from diffusers.optimization import get_scheduler
from losses import Objective
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import HfArgumentParser

from svqvae_hf import SVQVAE
from svqvae_hf.modeling_svqvae import AttnBlock, ResnetBlock

POSITIVE = (
    *("resolution", "num_scales", "train_batch_size", "gradient_accumulation_steps", "max_train_steps"),
    *("kmeans_batches", "checkpointing_steps", "checkpoints_total_limit", "logging_steps"),
)
RESIDUAL_GAIN = 0.1  # of the last layer of each residual branch at the start

logger = get_logger(__name__, log_level="INFO")


def option(default: Any, text: str) -> Any:
    """A command-line option: its default and its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Options, named as in diffusers' example scripts."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints and, at the end, the trained model."})
    model_config_name_or_path: str | None = option(None, "Config of a new model: a config.json, its folder or Hub id.")
    pretrained_model_name_or_path: str | None = option(None, "Model to start from instead: folder or Hub id.")
    dataset_name: str | None = option(None, "Image set on the Hub, or a local data set folder.")
    dataset_config_name: str | None = option(None, "Configuration of the image set.")
    train_data_dir: str | None = option(None, "Folder of images, instead of --dataset_name.")
    image_column: str = option("image", "Column of the image set that holds the images.")
    resolution: int = option(256, "Side of the largest crops, in pixels; stored as sample_size.")
    crop_sizes: list[int] = option([], "Smaller crop sides that take turns with --resolution, at equal pixels a step.")
    num_scales: int = option(3, "Scales of a step: the full one and random smaller ones.")
    train_batch_size: int = option(8, "Crops of side --resolution in a step of one process.")
    gradient_accumulation_steps: int = option(1, "Batches added up before the weights are updated.")
    max_train_steps: int = option(100_000, "Updates of the weights.")
    learning_rate: float = option(1e-4, "Peak learning rate.")
    lr_scheduler: str = option("cosine", "Learning rate schedule, one of diffusers'.")
    lr_warmup_steps: int = option(500, "Steps over which the learning rate rises from 0.")
    adam_beta1: float = option(0.9, "Decay of AdamW's mean of gradients.")
    adam_beta2: float = option(0.95, "Decay of AdamW's mean of squared gradients.")
    adam_weight_decay: float = option(0.05, "AdamW's weight decay, on convolution weights alone.")
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped.")
    vq_loss_weight: float = option(1.0, "Weight of the vq and commitment losses beside the mean squared error.")
    kmeans_steps: list[int] = option(
        [], "Steps at which k-means of latents sets the codebook anew; before the first, nothing is quantised."
    )
    kmeans_batches: int = option(64, "Batches of each process whose latents k-means sees.")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; accelerate's setting if not given.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    dataloader_num_workers: int = option(2, "Processes that cut crops.")
    checkpointing_steps: int = option(1000, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = option(None, "Newest checkpoints to keep; all if not given.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' in --output_dir if any.")
    logging_steps: int = option(50, "Steps between log lines.")
    report_to: str | None = option(None, "Tracker, such as tensorboard.")
    seed: int = option(0, "Seed of weights, crops, scales and k-means.")

    def __post_init__(self) -> None:
        """Checks what can be checked without data or model."""
        if (self.model_config_name_or_path is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                "Exactly one of `--model_config_name_or_path` and `--pretrained_model_name_or_path` must be given."
            )
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, but is {getattr(self, name)}.")
        for step in self.kmeans_steps:
            if not 0 < step < self.max_train_steps:
                raise ValueError(
                    f"`--kmeans_steps` must lie between 0 and `--max_train_steps` = {self.max_train_steps}, but one "
                    f"is {step}."
                )
        for side in self.crop_sizes:
            if side < 1 or self.resolution % side:
                raise ValueError(
                    f"`--crop_sizes` must divide `--resolution` = {self.resolution}, but {side} does not."
                )


def load_model(config: TrainConfig) -> SVQVAE:
    """A new or a pretrained model, with the crop side as its sample size.

    A new one starts with its residual branches turned down, which speeds up its first steps.
    """
    if config.pretrained_model_name_or_path is not None:
        vqvae = SVQVAE.from_pretrained(config.pretrained_model_name_or_path)
    else:
        vqvae = SVQVAE.from_config(SVQVAE.load_config(config.model_config_name_or_path))
        for block in vqvae.modules():
            if isinstance(block, ResnetBlock | AttnBlock):
                last = block.conv2 if isinstance(block, ResnetBlock) else block.proj_out
                last.weight.data.mul_(RESIDUAL_GAIN)
    vqvae.register_to_config(sample_size=config.resolution)
    for side in (config.resolution, *config.crop_sizes):
        if side % vqvae.f:
            raise ValueError(f"Crop sides must be multiples of f = {vqvae.f}, but one is {side}.")
    num_latents = config.kmeans_batches * config.train_batch_size * (config.resolution // vqvae.f) ** 2
    if config.kmeans_steps and num_latents < vqvae.config["codebook_size"]:
        raise ValueError(
            f"k-means needs at least as many latents as codes, {vqvae.config['codebook_size']}, but "
            f"`--kmeans_batches` = {config.kmeans_batches} give {num_latents} in each process. Raise it."
        )
    if config.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    return vqvae.train()


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for convolution weights; none for norms, biases and codes."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 4]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def step_scales(latent_side: int, num_scales: int, seed: int, step: int) -> list[float]:
    """The scales of a step, the full one last; the smaller ones are random latent sides (FlexVAR, section 3.3)."""
    rng = np.random.default_rng((seed, step))
    count = min(num_scales - 1, latent_side - 1)
    sides = rng.choice(np.arange(1, latent_side), size=count, replace=False)
    return [*(int(side) / latent_side for side in sorted(sides)), 1.0]


def start_codebook(config: TrainConfig, accelerator: Accelerator, vqvae: SVQVAE, dataset: CropDataset) -> None:
    """Sets the codebook by k-means of the latents of fresh crops, from all processes."""
    sampler = CropSampler(
        len(dataset.images),
        [config.resolution],
        config.train_batch_size,
        num_batches=config.kmeans_batches,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        seed=config.seed + 1,
    )
    latents = []
    for sample in crop_loader(dataset, sampler, config.dataloader_num_workers):
        with torch.no_grad(), accelerator.autocast():
            encoded = vqvae.encode(sample.to(accelerator.device)).latents
        latents.append(encoded.float().permute(0, 2, 3, 1).flatten(0, 2))
    initialise_codebook(vqvae.quantize, accelerator.gather(torch.cat(latents)), config.seed)
    broadcast(vqvae.quantize.embedding.weight.data)  # sums of floats may differ in their last bits between processes


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, if any."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        return max(Path(config.output_dir).glob("checkpoint-*[0-9]"), key=checkpoint_step, default=None)
    for path in (Path(config.resume_from_checkpoint), Path(config.output_dir, config.resume_from_checkpoint)):
        if path.is_dir():
            return path
    raise ValueError(
        "`--resume_from_checkpoint` must be a checkpoint folder, the name of one in `--output_dir`, or 'latest', but "
        "is "
        f"{config.resume_from_checkpoint!r}."
    )


def checkpoint_step(path: Path) -> int:
    """Steps that were done when a checkpoint was written."""
    return int(path.name.rsplit("-", 1)[1])


def save_checkpoint(config: TrainConfig, accelerator: Accelerator, step: int) -> None:
    """Writes `checkpoint-STEP` beside and renames it; removes the oldest ones over the limit."""
    path = Path(config.output_dir, f"checkpoint-{step}")
    partial = path.with_name(path.name + ".partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        if config.checkpoints_total_limit is not None:
            checkpoints = sorted(Path(config.output_dir).glob("checkpoint-*[0-9]"), key=checkpoint_step)
            for old in checkpoints[: -config.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerator, log and tracker."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # Codes get no gradient before they are used; each process counts its own use of them.
            DistributedDataParallelKwargs(find_unused_parameters=bool(config.kmeans_steps), broadcast_buffers=False)
        ],
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    if accelerator.is_main_process:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if config.report_to is not None:
        accelerator.init_trackers("svqvae")
    return accelerator


def make_optimizer(config: TrainConfig, vqvae: SVQVAE) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW and its learning rate schedule, which counts updates whatever the number of processes."""
    optimizer = torch.optim.AdamW(
        parameter_groups(vqvae, config.adam_weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return optimizer, lr_scheduler


def report(accelerator: Accelerator, done: int, logs: dict[str, float]) -> None:
    """Logs a step, and stops a run that has diverged."""
    accelerator.log(logs, step=done)
    logger.info(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in logs.items()))
    if not math.isfinite(logs["loss"]):
        raise ValueError(
            f"The loss must stay finite, but is {logs['loss']} at step {done}. Lower `--learning_rate` and resume "
            "from a checkpoint before it."
        )


def train(config: TrainConfig) -> None:
    """Trains, and leaves the model in `output_dir`."""
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    vqvae = load_model(config)
    optimizer, lr_scheduler = make_optimizer(config, vqvae)
    objective, optimizer = accelerator.prepare(Objective(vqvae, config.vq_loss_weight), optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)

    first_step = 0
    checkpoint = find_checkpoint(config)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        first_step = checkpoint_step(checkpoint)
        logger.info(f"Resumed from {checkpoint}")

    dataset = CropDataset(
        load_images(config.dataset_name, config.dataset_config_name, config.train_data_dir, config.image_column),
        vqvae.config["pixel_range"],
    )
    sampler = CropSampler(
        len(dataset.images),
        [config.resolution, *config.crop_sizes],
        config.train_batch_size,
        num_batches=config.max_train_steps * config.gradient_accumulation_steps,
        first_batch=first_step * config.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        seed=config.seed,
    )
    batches = iter(crop_loader(dataset, sampler, config.dataloader_num_workers))
    logger.info(f"{len(dataset.images)} images, {vqvae.num_parameters():,} parameters")

    on_terminal = accelerator.is_local_main_process and sys.stderr.isatty()
    steps = range(first_step, config.max_train_steps)
    for step in tqdm(steps, initial=first_step, total=config.max_train_steps, disable=not on_terminal):
        if step in config.kmeans_steps:
            start_codebook(config, accelerator, vqvae, dataset)
        for _ in range(config.gradient_accumulation_steps):
            sample = next(batches).to(accelerator.device)
            scales = step_scales(sample.shape[-1] // vqvae.f, config.num_scales, config.seed, step)
            with accelerator.accumulate(objective):
                loss, logs = objective(sample, scales, quantize=step >= min(config.kmeans_steps, default=0))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(objective.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        lr_scheduler.step()
        done = step + 1
        if done % config.logging_steps == 0:
            logs |= {"loss": loss, "lr": lr_scheduler.get_last_lr()[0], "grad_norm": grad_norm}
            report(accelerator, done, {name: float(value) for name, value in logs.items()})
            vqvae.quantize.reset_counts()
        if done % config.checkpointing_steps == 0:
            save_checkpoint(config, accelerator, done)

    if accelerator.is_main_process:
        vqvae.save_pretrained(config.output_dir)
    accelerator.end_training()


def main() -> None:
    """Reads the options and trains; a user's mistake is one line."""
    try:
        (config,) = HfArgumentParser(TrainConfig).parse_args_into_dataclasses()
        train(config)
    except (ValueError, OSError) as error:
        message = str(error).splitlines()[-1]  # a loader's process puts its traceback before it
        sys.stderr.write(f"train.py: error: {message}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
