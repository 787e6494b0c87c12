"""A run of a training script: what every script shares, and the loop over its steps."""

import dataclasses
import inspect
import logging
import os
import re
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import CommitOperationAdd, HfApi
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from svqvae_hf.atomic_io import write_file
from svqvae_hf.trainer.checkpoints import checkpoint_step, find_checkpoint, load_checkpoint, save_checkpoint
from svqvae_hf.trainer.options import RunOptions, public_options, read_options, script_name
from svqvae_hf.trainer.tracking import Means, Throughput

TRACEBACK = r"(?s).*Traceback \(most recent call last\):\n(?: [^\n]*\n)*"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)

logger = get_logger(__name__, log_level="INFO")


class Loader(Protocol):
    """Batches of one process, which go on after the last that was given, as does a loader that loads its state."""

    batch: int  # batches given, with those before the state that was loaded

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches that are left."""

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was given: plain values or tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the place from which iterating goes on."""


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request that all processes see at the end of a step.

    A second signal ends the process at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.exit_code = 128 + signal.SIGTERM

    def __enter__(self) -> "Interruption":
        self.handlers = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.exit_code = 128 + number
        self.accelerator.set_trigger()


class Session(ABC):
    """A run: signals, checkpoints and exact resume, log and trackers, updates of the weights, and what it leaves.

    A script's class calls this constructor first, then sets `self.loader` and calls [`Session.prepare`]. It says what
    a batch does in [`Session.train_on`], and what the run leaves in [`Session.save`] and [`Session.card`].

    Args:
        config ([`RunOptions`]): Options.
    """

    loader: Loader
    batches: Iterator[Any]

    def __init__(self, config: RunOptions):
        self.config: Any = config
        self.output_dir = Path(config.output_dir)
        self.checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        self.accelerator = make_accelerator(config)
        set_seed(config.seed)
        self.validation: dict[str, float] = {}
        self.skipped = 0
        self.means, self.throughput = Means(), Throughput()

    def prepare(self, network: nn.Module, model: nn.Module, least_ndim: int = 2) -> None:
        """Sets the optimizer and the schedule of what is trained, its moving average, and what accelerate wraps.

        Args:
            network (`nn.Module`): Whose weights are trained, averaged and kept; on the accelerator's device.
            model (`nn.Module`): What a batch passes through: `network` itself, or a module that holds it.
            least_ndim (`int`, defaults to 2): Dimensions of a weight from which it decays.
        """
        config = self.config
        self.network = network
        groups = parameter_groups(network, config.adam_weight_decay, least_ndim)
        optimizer, self.lr_scheduler = make_optimizer(config, groups, config.learning_rate, config.max_train_steps)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.trained = [self.model]
        self.ema = EMAModel(network.parameters(), decay=config.ema_decay) if config.use_ema else None

    # What a script says

    @abstractmethod
    def train_on(self, batch: Any, step: int) -> dict[str, torch.Tensor]:
        """Passes a batch forward, and its loss to [`Session.descend`]. Gives scalars for the log."""

    @abstractmethod
    def validate(self, done: int) -> None:
        """Validates after `done` steps, on all processes; numbers go to `self.validation` and [`Session.log`]."""

    @abstractmethod
    def save(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes what was trained into an empty folder; `state_dict` is that of the bare model. One process does."""

    @abstractmethod
    def card(self, repo_id: str) -> str:
        """The text of the repository's README.md."""

    def numbers(self) -> dict[str, float]:
        """Numbers of the training since the last call, over all processes."""
        return self.means.summary(self.accelerator.reduce)

    def state(self) -> dict[str, Any]:
        """What has a state that checkpoints keep, beside what accelerate keeps."""
        holders = {"lr_scheduler": self.lr_scheduler, "ema": self.ema}
        return {name: holder for name, holder in holders.items() if holder is not None}

    def training_mode(self) -> None:
        """Puts the network into training mode."""
        self.network.train()

    # The run

    def run(self) -> None:
        """Trains, and leaves the result with its card in the output folder.

        Raises:
            ValueError: If data or gradients are beyond what the options allow.
            SystemExit: After a signal, once a checkpoint is saved.
        """
        config, accelerator = self.config, self.accelerator
        repo_id = self._make_repository()
        first_step = self._resume()
        steps = range(first_step, config.max_train_steps)
        on_terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        bar = tqdm(steps, initial=first_step, total=config.max_train_steps, unit="step", disable=not on_terminal)
        self.training_mode()
        self.batches = iter(self.loader)
        with logging_redirect_tqdm(), Interruption(accelerator) as interruption:
            for step in bar:
                self.train_step(step)
                done = step + 1
                if done % config.logging_steps == 0:
                    self._report(done)
                if done % config.validation_steps == 0 or done == config.max_train_steps:
                    self.validate(done)
                interrupted = accelerator.check_trigger()
                if interrupted or done % config.checkpointing_steps == 0 or done == config.max_train_steps:
                    self._save_checkpoint(done)
                if interrupted:
                    logger.info(f"Stopped by a signal at step {done}. Go on with `--resume_from_checkpoint latest`.")
                    sys.exit(interruption.exit_code)
        if first_step == config.max_train_steps:  # a run that went on after its last step
            self.validate(first_step)
        self.finish(repo_id)

    def train_step(self, step: int) -> None:
        """Trains on the batches of a step."""
        for _ in range(self.config.gradient_accumulation_steps):
            batch = next(self.batches)
            with self.accelerator.accumulate(*self.trained):
                self.means.add(self.train_on(batch, step))

    def descend(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds the gradients of a batch, and after the last batch of a step updates the weights.

        Args:
            loss (`torch.Tensor`): A scalar.

        Returns:
            `dict[str, torch.Tensor]`: Numbers for the log, the loss among them.
        """
        self.accelerator.backward(loss)
        return {"loss": loss} | (self.update_network() if self.accelerator.sync_gradients else {})

    def update_network(self) -> dict[str, torch.Tensor]:
        """Updates weights and their average, unless a gradient is not finite. Gives numbers for the log.

        Raises:
            ValueError: If that happened too often in a row.
        """
        norm = self.update(self.model, self.optimizer, self.lr_scheduler)
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        if self.skipped > self.config.max_skipped_steps:
            raise ValueError(
                f"Gradients must be finite, but were not for {self.skipped} steps in a row. Lower `--learning_rate` "
                "and resume from an earlier checkpoint."
            )
        if self.ema is not None and norm.isfinite():
            self.ema.step(self.network.parameters())
        return {"grad_norm": norm, "skipped": (~norm.isfinite()).float()}

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, lr_scheduler: LambdaLR) -> torch.Tensor:
        """Clips the gradients and, if they are finite, updates the weights. Gives the norm before it."""
        if self.accelerator.distributed_type in SHARDED:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        else:
            # Not by accelerate's function, which with fp16 takes the scale off the gradients of all optimizers.
            self.accelerator.unscale_gradients(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        norm = torch.as_tensor(norm)
        if norm.isfinite() or self.accelerator.scaler is not None:  # the scaler skips the step itself, and adapts
            optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        return norm

    def batch_generator(self) -> torch.Generator:
        """For what is drawn for the batch given last: a function of seed, batch and process alone."""
        words = np.random.SeedSequence((self.config.seed, self.loader.batch, self.accelerator.process_index))
        return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, with the averaged weights if there are any."""
        self.network.eval()
        if self.ema is not None:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        with torch.no_grad():
            yield
        if self.ema is not None:
            self.ema.restore(self.network.parameters())
        self.training_mode()

    # Log and checkpoints

    def log(self, done: int, numbers: Mapping[str, float]) -> None:
        """Gives numbers after `done` steps to log and trackers."""
        self.accelerator.log(dict(numbers), step=done)
        logger.info(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def _report(self, done: int) -> None:
        numbers = self.numbers() | {"lr": self.lr_scheduler.get_last_lr()[0]}
        numbers |= self.throughput.summary(self.accelerator.num_processes)
        self.log(done, {f"train/{name}": value for name, value in numbers.items()})

    def _save_checkpoint(self, done: int) -> None:
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            done,
            {name: holder.state_dict() for name, holder in self.state().items()},
            {"loader": self.loader.state_dict(), "skipped": self.skipped},
            self.config.checkpoints_total_limit,
        )

    def _resume(self) -> int:
        """Goes on from the checkpoint, if there is one. Gives the first step to do."""
        if self.checkpoint is None:
            return 0
        holders, done = self.state(), checkpoint_step(self.checkpoint)
        if done > self.config.max_train_steps:
            raise ValueError(
                f"`--max_train_steps` must be at least {done}, the steps of `{self.checkpoint}`, but is "
                f"{self.config.max_train_steps}. Raise it, or go on from an older checkpoint in another folder."
            )
        run_state, rank_state = load_checkpoint(self.accelerator, self.checkpoint, holders)
        for name, holder in holders.items():
            holder.load_state_dict(run_state[name])
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # its state is loaded to the CPU
        self.loader.load_state_dict(rank_state["loader"])
        if self.loader.batch != done * self.config.gradient_accumulation_steps:
            raise ValueError(
                f"`--gradient_accumulation_steps` must be {self.loader.batch // done} as in the run that wrote "
                f"`{self.checkpoint}`, but is {self.config.gradient_accumulation_steps}."
            )
        self.skipped = rank_state["skipped"]
        logger.info(f"Resumed from {self.checkpoint}")
        return done

    # The end

    def _make_repository(self) -> str | None:
        """The repository on the Hub for the result, made before the run, so that an error comes before it."""
        if not self.config.push_to_hub or not self.accelerator.is_main_process:
            return None
        return HfApi().create_repo(self.config.hub_model_id or self.output_dir.name, exist_ok=True).repo_id

    def finish(self, repo_id: str | None) -> None:
        """Leaves the result, and uploads it if there is a repository for it."""
        if self.ema is not None:
            self.ema.copy_to(self.network.parameters())
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            with TemporaryDirectory(dir=self.output_dir) as folder:
                self.save(Path(folder), state_dict)
                saved = move_files(Path(folder), self.output_dir)
            write_file(self.output_dir / "README.md", self.card(repo_id or self.output_dir.absolute().name).encode())
            if repo_id is not None:
                samples = [f"samples/{path.name}" for path in self.output_dir.glob("samples/*.png")]
                files = [CommitOperationAdd(name, self.output_dir / name) for name in (*saved, "README.md", *samples)]
                options = yaml.safe_dump(public_options(self.config), sort_keys=False)
                HfApi().create_commit(
                    repo_id,
                    [*files, CommitOperationAdd("train_config.yaml", options.encode())],
                    commit_message="Upload what was trained",
                )
        self.accelerator.end_training()

    def provenance(self, examples: str) -> dict[str, str]:
        """Rows of a card: how the weights came about. `examples` says what a batch holds, such as `images`."""
        config = self.config
        count = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        script = Path(inspect.getfile(type(self))).name
        return {
            "trained by": f"`training/{script}` of svqvae-hf {version('svqvae-hf')}, options in `train_config.yaml`",
            "steps": f"{config.max_train_steps:,} of {count} {examples}",
        }


def move_files(source: Path, target: Path) -> list[str]:
    """Moves all files below a folder to the same places below another, each at once, weights before their config.

    Returns:
        `list[str]`: Their paths below both.
    """
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for name in sorted(names, reverse=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
    return [name.as_posix() for name in names]


def parameter_groups(model: nn.Module, weight_decay: float, least_ndim: int) -> list[dict[str, Any]]:
    """The parameters that are trained: weight decay for those of at least so many dimensions."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trained if each.ndim >= least_ndim], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.ndim < least_ndim], "weight_decay": 0.0},
    ]


def make_optimizer(
    config: RunOptions, groups: Iterable[dict[str, Any]], learning_rate: float, num_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW and its learning rate schedule over `num_steps`, which counts steps whatever the number of processes."""
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(config.adam_beta1, config.adam_beta2))
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    return optimizer, lr_scheduler


def make_accelerator(config: RunOptions) -> Accelerator:
    """Accelerator, log and trackers; the options of the run as `train_config.yaml` in its folder.

    Raises:
        ValueError: If the engine cannot do what the options ask for.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # Buffers, such as counts of used codes, are each process's own.
            DistributedDataParallelKwargs(
                find_unused_parameters=config.find_unused_parameters, broadcast_buffers=False
            )
        ],
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {started} processes, but accelerate would let each of them train for itself. On "
            "CPUs set ACCELERATE_USE_CPU=true and start them with torchrun."
        )
    if accelerator.distributed_type in SHARDED:
        for name in config.needs_whole_weights:
            if getattr(config, name):
                raise ValueError(
                    f"`--{name}` needs whole weights on each process, but {accelerator.distributed_type.value} shards "
                    "them. Use DDP, or leave it out."
                )
    if config.report_to is not None and not accelerator.log_with:
        raise ValueError(
            f"`--report_to {config.report_to}` needs the package of that tracker. Install it, or choose another."
        )
    if accelerator.is_main_process:
        output_dir = Path(config.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        options = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        write_file(output_dir / "train_config.yaml", options.encode())
    if config.report_to is not None:
        accelerator.init_trackers("svqvae")
    return accelerator


def run_script(session_class: Callable[[Any], Session], options_class: type[RunOptions]) -> None:
    """Reads the options and trains; a user's mistake is one line."""
    try:
        session_class(read_options(options_class, sys.argv[1:])).run()
    except (ValueError, OSError) as error:
        message = re.sub(TRACEBACK, "", str(error)) or repr(error)  # a loader's process puts its traceback before it
        message = " ".join(message.split())
        sys.stderr.write(f"{script_name()}: error: {message}\n")
        sys.exit(2)
