"""A training run: its start, its optimizers, what it is made from, and its errors."""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Generic

from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from svqvae_hf.hub.origin import Origin
from svqvae_hf.trainer.checkpoints import Checkpoints, check_resumable, check_unchanged, find_checkpoint
from svqvae_hf.trainer.folder_lock import FolderLock
from svqvae_hf.trainer.identity import RunIdentity, model_digests
from svqvae_hf.trainer.log import Log
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import Options, RunOptions, public_values, read_options
from svqvae_hf.trainer.publishing import Result, find_sources, refuse_finished, refuse_sources
from svqvae_hf.trainer.scripts import one_line_errors
from svqvae_hf.trainer.weights import Weights


class Run(Generic[Options]):
    """A training run.

    A script calls its methods in this order. The loop between them is the script's own:

        run.identify({"train_data_dir": digest})  # is it finished, and from what does it resume?
        weights = run.train(network, learning_rate)  # optimizer, prepared model, average of weights
        checkpoints = run.begin(network, {"weights": weights, "loader": loader}, "1,000 images")
        for step in checkpoints.steps():
            ...
            checkpoints.after(step)
        run.result.publish(...)

    Args:
        options ([`RunOptions`]): Options.
        accelerator (`Accelerator`): From [`make_accelerator`].

    Attributes:
        log ([`Log`]): Log of the run.
        checkpoint (`Path`, *optional*): Checkpoint from which the run resumes, once it is identified.
        origin ([`~svqvae_hf.hub.origin.Origin`]): Licence and sources of the result, once the run is identified.
        result ([`Result`]): Result of the run, once it has begun.
    """

    identity: RunIdentity
    origin: Origin
    result: Result

    def __init__(self, options: Options, accelerator: Accelerator):
        self.options = options
        self.accelerator = accelerator
        self.log = Log(options, accelerator)
        self.checkpoint: Path | None = None
        self.lock: FolderLock | None = None

    @property
    def is_new(self) -> bool:
        """Whether the run does not resume."""
        return self.checkpoint is None

    def identify(self, sets: Mapping[str, str]) -> None:
        """Compares the run with what is in its folder, and finds the checkpoint from which it resumes.

        Args:
            sets (`Mapping[str, str]`): Digests of all sets, by the option that names each. The names of sets that are
                only measured start with `validation_`.

        Raises:
            SystemExit: If the folder holds the result of this very run.
            ValueError: If the folder is also the folder of a model or token set that the options name. Or if it holds
                the result of another run, checkpoints of a run with other models or sets, or a checkpoint that is not
                the wanted one.
        """
        options = self.options
        refuse_sources(options.output_dir, options)
        self.identity = RunIdentity(public_values(asdict(options)), model_digests(options), dict(sets))
        refuse_finished(Path(options.output_dir), self.identity)
        self.origin = find_sources(options)  # here, so that different licences are an error before models are loaded
        self.checkpoint = self._find_checkpoint()
        if self.checkpoint is not None:
            check_resumable(self.checkpoint, self.identity)

    def _find_checkpoint(self) -> Path | None:
        """Finds the checkpoint from which the run resumes; `None` for a new run."""
        options = self.options
        return find_checkpoint(options.output_dir, options.resume_from_checkpoint, options.max_steps)

    def train(
        self,
        network: nn.Module,
        learning_rate: float,
        *,
        num_steps: int | None = None,
        decayed_ndim: int = 2,
        undecayed: Sequence[str] = (),
        use_ema: bool | None = None,
    ) -> Weights:
        """Makes the optimizer of a network and its learning rate schedule, and prepares both for all processes.

        Args:
            network (`nn.Module`): Network to train, on its device.
            learning_rate (`float`): Peak learning rate.
            num_steps (`int`, *optional*): Length of the schedule; all steps of the run by default.
            decayed_ndim (`int`, defaults to 2): Weights of at least so many dimensions decay.
            undecayed (`Sequence[str]`, defaults to `()`): Last parts of the names of further weights without decay.
            use_ema (`bool`, *optional*): Whether the weights are averaged; by default, as the options say.

        Returns:
            [`Weights`]: The weights, with the prepared `model` to call in the forward pass.
        """
        options = self.options
        if num_steps is None:
            num_steps = options.max_steps
        if use_ema is None:
            use_ema = options.use_ema
        optimizer, lr_scheduler = make_optimizer(network, options, learning_rate, num_steps, decayed_ndim, undecayed)
        model, optimizer = self.accelerator.prepare(network, optimizer)
        return Weights(options, self.accelerator, network, model, optimizer, lr_scheduler, use_ema)

    def begin(self, network: nn.Module, states: Mapping[str, Stateful], contents: str) -> Checkpoints:
        """Resumes from the checkpoint, if there is one, makes the folder of the result, and starts the log.

        Args:
            network (`nn.Module`): Network that is trained, for the log.
            states (`Mapping[str, Stateful]`): Objects whose states checkpoints store, by name, such as weights and
                loaders. Their states are equal on all processes. Models and optimizers are stored without being
                named here.
            contents (`str`): Size of the training set, in words, for the log.

        Raises:
            OSError: If the repository on the Hub cannot be made.
            ValueError: If the checkpoint is damaged, or of a run with other parts, or if another run writes to the
                folder.
        """
        options = self.options
        accelerator = self.accelerator
        all_states = {**states, "log": self.log}
        checkpoints = Checkpoints(options, accelerator, self.checkpoint, all_states, self.identity)
        if accelerator.is_main_process:
            self._lock_folder()
        self.result = Result(options, self.identity, self.origin, options.push_to_hub, accelerator.is_main_process)
        self.log.start(network, contents, checkpoints.first_step)
        return checkpoints

    def _lock_folder(self) -> None:
        """Makes the folder of the run, and keeps other runs from writing to it."""
        folder = Path(self.options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(folder)
        refuse_finished(folder, self.identity)
        check_unchanged(folder, self.checkpoint, self._find_checkpoint())

    def release(self) -> None:
        """Lets other runs write to the folder."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None


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
    # Again, because an environment variable of accelerate overrides the argument.
    accelerator.gradient_accumulation_steps = options.gradient_accumulation_steps
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {num_started} processes, but accelerate would let each of them train alone. On "
            "CPUs set ACCELERATE_USE_CPU=true and start them with torchrun."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"Training needs whole weights on each process, but {accelerator.distributed_type.value} shards them. Use "
            "DDP, as in training/configs/ddp.yaml."
        )
    has_tracker = bool(accelerator.log_with)
    if options.report_to is not None and not has_tracker:
        raise ValueError(f"`--report_to {options.report_to}` needs its package. Install it, or choose another.")
    return accelerator


def run_training(train: Callable[[Run[Options]], None], options: Options) -> None:
    """Calls the training function of a script, and ends the trackers after a success. It always unlocks the folder.

    Raises:
        SystemExit: If the folder holds the result of this very run.
        ValueError: If it holds the result of another run.
    """
    accelerator = make_accelerator(options)
    set_seed(options.seed)
    run = Run(options, accelerator)
    try:
        train(run)  # calls `run.identify`, which raises if the folder holds a result
        accelerator.end_training()
    finally:
        run.release()


def run_script(train: Callable[[Run[Options]], None], options_class: type[Options]) -> None:
    """Calls the training function of a script with the options of the command line."""
    _end_at_ctrl_c()
    try:
        with one_line_errors():
            run_training(train, *read_options([options_class], sys.argv[1:]))
    finally:
        _end_workers()


def _end_workers() -> None:
    """Ends the workers of loaders that still run after an error or a signal. Python would wait for them forever.

    PyTorch handles SIGCHLD, and reports each worker that is killed as an error. Here, killing them is no error.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def _end_at_ctrl_c() -> None:
    """Lets Ctrl-C end the process at once, as SIGTERM does, while no training step is running.

    By default, Ctrl-C raises KeyboardInterrupt, and Python then waits for the workers of loaders. They ignore Ctrl-C,
    so it would wait forever. During the steps, [`Checkpoints`] handles both signals itself.
    """
    has_default_handler = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if has_default_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
