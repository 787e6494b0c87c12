"""A training run: signals, exact resumption, checkpoints, log, EMA weights, and the published result."""

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Generic

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from svqvae_hf.files.outputs import write_file
from svqvae_hf.hub.repositories import prepare_repo, push_folder
from svqvae_hf.trainer.checkpoints import checkpoint_step, find_checkpoint, load_checkpoint, save_checkpoint
from svqvae_hf.trainer.data.resumable import Resumable
from svqvae_hf.trainer.optimization import clip_and_step, hyperparameters, resume_schedule
from svqvae_hf.trainer.options import Options, RunOptions, public_options, read_options
from svqvae_hf.trainer.scripts import one_line_errors
from svqvae_hf.trainer.tracking import Means

OPTIONS = "train_config.yaml"
CARD_NUMBERS = ("train/loss", "validation/loss", "validation/accuracy", "validation/bits_per_id")
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`

logger = get_logger(__name__, log_level="INFO")


class Interruption:
    """Turns SIGTERM, Ctrl-C and the end of the launcher into a request that all processes see at the end of a step.

    A second signal ends the process at once.

    Args:
        accelerator (`Accelerator`): Accelerator whose processes stop together.
        launcher (`int`, *optional*): Process of `accelerate launch`, which does not pass signals on.
    """

    def __init__(self, accelerator: Accelerator, launcher: int | None):
        self.accelerator = accelerator
        self.launcher = launcher
        self.exit_code = 128 + signal.SIGTERM

    def __enter__(self) -> "Interruption":
        self.handlers = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any process got a signal or lost its launcher; all processes must ask."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.exit_code = 128 + number
        self.accelerator.set_trigger()


class Run(Generic[Options]):
    """A run of a training script: everything around its loop.

    A script makes the run first, then its model, loader and optimizer, and passes them to [`Run.start`]. It writes its
    loop over [`Run.steps`], with forward pass, loss and `accelerator.backward`, then calls [`Run.update_weights`]:

        run = Run(options)
        ...
        run.start(network, loader, lr_scheduler)
        for step, batches in run.steps():
            for batch in batches:
                with run.accelerator.accumulate(model):
                    loss = ...
                    run.accelerator.backward(loss)
                    run.add({"loss": loss})
                    if run.accelerator.sync_gradients:
                        run.add(run.update_weights(model, optimizer, lr_scheduler))
            run.report(step, validate)
        state_dict = run.final_weights(model)

    Args:
        options ([`RunOptions`]): Options.

    Raises:
        ValueError: If there is no such checkpoint, or the engine cannot serve the options.
    """

    network: nn.Module
    loader: Any  # a `Resumable`, which yields batches
    lr_scheduler: LambdaLR
    states: dict[str, Stateful]
    repo_id: str | None = None
    ema: EMAModel | None = None
    first_step: int = 0

    def __init__(self, options: Options):
        self.options = options
        self.output_dir = Path(options.output_dir)
        self.accelerator = make_accelerator(options)
        self.launcher = os.getppid() if LAUNCHED in os.environ else None
        self.checkpoint = find_checkpoint(options.output_dir, options.resume_from_checkpoint)
        if self.checkpoint is not None and checkpoint_step(self.checkpoint) > options.max_train_steps:
            raise ValueError(
                f"`--max_train_steps` must be at least {checkpoint_step(self.checkpoint)}, the steps of "
                f"`{self.checkpoint}`, but is {options.max_train_steps}. Raise it."
            )
        set_seed(options.seed)
        self.skipped = 0
        self.quality: dict[str, float] = {}  # last values of the numbers that cards show
        self.means, self.amounts = Means(), Counter[str]()

    def start(
        self,
        network: nn.Module,
        loader: Resumable,
        lr_scheduler: LambdaLR,
        states: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Starts the run, or resumes it from its checkpoint.

        Args:
            network (`nn.Module`): Network whose weights are trained and, with `--use_ema`, averaged. Its model and
                optimizer have been passed to `accelerator.prepare`.
            loader ([`Resumable`]): Batches of this process.
            lr_scheduler (`LambdaLR`): Learning rate schedule.
            states (`Mapping[str, Stateful]`, *optional*): Anything else with a state that checkpoints keep.

        Raises:
            ValueError: If the checkpoint is of a run with other options.
        """
        self.network, self.loader, self.lr_scheduler = network, loader, lr_scheduler
        self.states = {"lr_scheduler": lr_scheduler}
        if self.options.use_ema:
            self.ema = self.states["ema"] = EMAModel(network.parameters(), decay=self.options.ema_decay)
        self.states |= states or {}
        if self.checkpoint is not None:
            self.first_step = self._resume(self.checkpoint)
        self.repo_id = self._make_repository()
        self._open_output_dir()
        self._log_start()
        self.started = self.logged = time.monotonic()

    # The loop

    def steps(self) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yields each remaining step with its batches; saves checkpoints and ends after a signal.

        Raises:
            SystemExit: After a signal, once a checkpoint is saved.
        """
        options, accelerator = self.options, self.accelerator
        on_terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        steps = range(self.first_step, options.max_train_steps)
        bar = tqdm(steps, initial=self.first_step, total=options.max_train_steps, unit="step", disable=not on_terminal)
        batches = iter(self.loader)
        with logging_redirect_tqdm(), Interruption(accelerator, self.launcher) as interruption:
            for step in bar:
                yield step, islice(batches, options.gradient_accumulation_steps)
                steps_done = step + 1
                interrupted = interruption.requested()
                due = steps_done % options.checkpointing_steps == 0 or steps_done == options.max_train_steps
                if due or interrupted:
                    self._save_checkpoint(steps_done)
                if interrupted:
                    logger.info(
                        f"Stopped by a signal at step {steps_done}. Resume with --resume_from_checkpoint latest."
                    )
                    sys.exit(interruption.exit_code)

    def update_weights(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, lr_scheduler: LambdaLR
    ) -> dict[str, torch.Tensor]:
        """Updates weights and their average by [`clip_and_step`], and counts skipped updates.

        Returns:
            `dict[str, torch.Tensor]`: Numbers for the log.

        Raises:
            ValueError: If too many updates in a row were skipped.
        """
        norm = clip_and_step(self.accelerator, model, optimizer, lr_scheduler, self.options.max_grad_norm)
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        if self.skipped > self.options.max_skipped_steps:
            raise ValueError(
                f"Gradients must be finite, but were not for {self.skipped} steps in a row. Lower `--learning_rate` "
                "and resume from an earlier checkpoint."
            )
        if self.ema is not None and norm.isfinite():
            self.ema.step(self.network.parameters())
        return {"grad_norm": norm, "skipped": (~norm.isfinite()).float()}

    def batch_generator(self, shared: bool = False) -> torch.Generator:
        """Random generator for the last batch yielded, seeded by the run's seed and the batch.

        Args:
            shared (`bool`, defaults to `False`): Whether all processes draw the same numbers. Otherwise the process
                is part of the seed.
        """
        process = () if shared else (self.accelerator.process_index,)
        words = np.random.SeedSequence((self.options.seed, self.loader.batch, *process))
        return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with the EMA weights if there are any."""
        training = [module for module in self.network.modules() if module.training]
        self.network.eval()
        if self.ema is not None:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        with torch.no_grad():
            yield
        if self.ema is not None:
            self.ema.restore(self.network.parameters())
        for module in training:
            module.training = True

    # The log

    def logs_after(self, step: int) -> bool:
        """Whether a line of the log is due after a step. The last step always has one."""
        return step + 1 == self.options.max_train_steps or (step + 1) % self.options.logging_steps == 0

    def validates_after(self, step: int) -> bool:
        """Whether a validation is due after a step. The one after the last step is the script's own."""
        steps_done = step + 1
        return steps_done % self.options.validation_steps == 0 and steps_done < self.options.max_train_steps

    def report(self, step: int, validate: Callable[[int], Any]) -> None:
        """Logs and validates after a step, if due. `validate` takes the number of steps done."""
        if self.logs_after(step):
            self.log_training(step)
        if self.validates_after(step):
            validate(step + 1)

    def add(self, numbers: Mapping[str, torch.Tensor], **amounts: float) -> None:
        """Adds numbers of a batch, whose means are logged, and amounts, whose rates per second are logged."""
        self.means.add(numbers)
        self.amounts.update(amounts)

    def log_training(self, step: int, numbers: Mapping[str, float] | None = None) -> None:
        """Logs what was added since the last call, over all processes, and other numbers."""
        numbers = self.means.summary(self.accelerator.reduce) | dict(numbers or {})
        numbers["lr"] = float(self.lr_scheduler.get_last_lr()[0])
        rate = self.accelerator.num_processes / (time.monotonic() - self.logged)
        numbers |= {f"{name}_per_second": rate * amount for name, amount in self.amounts.items()}
        self.amounts.clear()
        self.logged = time.monotonic()
        self.log(step + 1, {f"train/{name}": value for name, value in numbers.items()})

    def log(self, steps_done: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers to the log, with progress, time and memory, and to the trackers."""
        self.accelerator.log(dict(numbers), step=steps_done)
        self.quality |= {name: numbers[name] for name in CARD_NUMBERS if name in numbers}
        elapsed = time.monotonic() - self.started
        left = elapsed / max(1, steps_done - self.first_step) * (self.options.max_train_steps - steps_done)
        memory = memory_in_use(self.accelerator.device) / 2**30
        logger.info(
            f"step {steps_done} of {self.options.max_train_steps} ({timedelta(seconds=round(elapsed))} elapsed, "
            f"{timedelta(seconds=round(left))} left, {memory:.1f} GiB): "
            + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        )

    # Checkpoints

    def _save_checkpoint(self, steps_done: int) -> None:
        state: dict[str, Any] = {name: holder.state_dict() for name, holder in self.states.items()}
        state |= {"loader": self.loader.state_dict(), "skipped": self.skipped, "quality": self.quality}
        state["options"] = public_options(self.options)
        limit = self.options.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, steps_done, state, limit)

    def _resume(self, checkpoint: Path) -> int:
        """Loads a checkpoint and returns the first step to do."""
        schedules = {name: state for name, state in self.states.items() if isinstance(state, LambdaLR)}
        groups = {name: hyperparameters(schedule) for name, schedule in schedules.items()}
        saved = load_checkpoint(self.accelerator, checkpoint, self.states)
        old, new = saved["options"], public_options(self.options)
        if new["optimizer"] != old["optimizer"]:
            raise ValueError(f"`--optimizer` must be {old['optimizer']} as in `{checkpoint}`, got {new['optimizer']}.")
        for name in self.states.keys() - schedules.keys():
            self.states[name].load_state_dict(saved[name])
        for name, schedule in schedules.items():
            resume_schedule(schedule, saved[name]["last_epoch"], groups[name])
        if self.ema is not None:
            self.ema.decay = self.options.ema_decay
            self.ema.to(self.accelerator.device)  # its state is loaded to the CPU
        self.loader.load_state_dict(saved["loader"])
        self.skipped, self.quality = saved["skipped"], saved["quality"]
        logger.info(f"Resumed from {checkpoint}")
        for name in sorted(new.keys() & old.keys() - {"resume_from_checkpoint", "output_dir"}):
            if new[name] != old[name]:
                logger.info(f"Changed on resume: --{name} from {old[name]} to {new[name]}")
        return checkpoint_step(checkpoint)

    # The output folder

    def _open_output_dir(self) -> None:
        """Writes the options of the accepted run to `train_config.yaml`, and starts its trackers."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(public_options(self.options), sort_keys=False)
            write_file(self.output_dir / OPTIONS, text.encode())
        if self.accelerator.log_with:
            self.accelerator.init_trackers("svqvae")

    def _log_start(self) -> None:
        options, num_processes = self.options, self.accelerator.num_processes
        sizes = {each: each.numel() for each in self.network.parameters()}
        trained = sum(size for each, size in sizes.items() if each.requires_grad)
        batch = options.train_batch_size * options.gradient_accumulation_steps * num_processes
        processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
        left = options.max_train_steps - self.first_step
        logger.info(
            f"Training on {self.loader.contents}: {trained:,} of {sum(sizes.values()):,} parameters, {left:,} of "
            f"{options.max_train_steps:,} steps left with a batch of {batch}, {processes} on "
            f"{self.accelerator.device.type}"
        )

    # The result

    @property
    def name(self) -> str:
        """Name of the result: its repository on the Hub, or its folder."""
        return self.repo_id or self.options.hub_model_id or self.output_dir.absolute().name

    def final_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """State dict of the bare model with its EMA weights, if any; called by all processes."""
        if self.ema is not None:
            self.ema.copy_to(self.network.parameters())
        return self.accelerator.get_state_dict(model)

    def publish(self, save_pretrained: Callable[..., Any], card: str) -> None:
        """Saves the result with its card in the output folder, and uploads it with `--push_to_hub`.

        Only the main process calls it. Existing files are replaced one by one, weights before their config.

        Args:
            save_pretrained (`Callable`): Writes the result into an empty folder.
            card (`str`): Text of README.md.
        """
        with TemporaryDirectory(dir=self.output_dir) as folder:
            save_pretrained(Path(folder))
            saved = move_files(Path(folder), self.output_dir)
        write_file(self.output_dir / "README.md", card.encode())
        logger.info(f"Saved to {self.output_dir}")
        if self.repo_id is not None:
            files = [*saved, "README.md", "samples/*.png", OPTIONS]
            push_folder(self.output_dir, self.repo_id, "Upload the trained model", files=files)

    def provenance(self, script: str, examples: str) -> dict[str, str]:
        """Rows of a card that say how the weights were made.

        Args:
            script (`str`): The script, such as `training/train.py`.
            examples (`str`): Contents of a batch, such as `images`.
        """
        options = self.options
        count = options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        return {
            "trained by": f"`{script}` of svqvae-hf {version('svqvae-hf')}, options in `train_config.yaml`",
            "steps": f"{options.max_train_steps:,} of {count} {examples}",
        }

    def _make_repository(self) -> str | None:
        """Makes the repository on the Hub before the run, so that an error comes first, and returns its id."""
        options = self.options
        if not options.push_to_hub or not self.accelerator.is_main_process:
            return None
        return prepare_repo(self.name, private=options.private or None, license=options.license)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of this process on a GPU, or its memory on a CPU now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def move_files(source: Path, target: Path) -> list[str]:
    """Moves all files below a folder to the same paths below another one, weights before their config.

    Returns:
        `list[str]`: Their paths relative to the folders.
    """
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for name in sorted(names, reverse=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
        (target / name).chmod(target.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    return [name.as_posix() for name in names]


def make_accelerator(options: RunOptions) -> Accelerator:
    """Sets up accelerator and log.

    Raises:
        ValueError: If the engine cannot serve the options.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to,
        project_dir=options.output_dir,
    )
    accelerator.gradient_accumulation_steps = options.gradient_accumulation_steps  # not its environment variable's
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {started} processes, but accelerate would let each of them train alone. On CPUs "
            "set ACCELERATE_USE_CPU=true and start them with torchrun."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"Training needs whole weights on each process, but {accelerator.distributed_type.value} shards them. Use "
            "DDP, as in training/configs/ddp.yaml."
        )
    if options.report_to is not None and not accelerator.log_with:
        raise ValueError(
            f"`--report_to {options.report_to}` needs that tracker's package. Install it, or choose another tracker."
        )
    return accelerator


def run_training(train: Callable[[Run[Options]], None], options: Options) -> None:
    """Calls the training function of a script, and then ends the trackers."""
    run = Run(options)
    train(run)
    run.accelerator.end_training()


def run_script(train: Callable[[Run[Options]], None], options_class: type[Options]) -> None:
    """Calls the training function of a script with the options of the command line."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # Ctrl-C outside of the loop ends the process at once, as SIGTERM does. An exception would wait for the workers
        # of loaders, which ignore both signals.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with one_line_errors():
        run_training(train, read_options(options_class, sys.argv[1:]))
