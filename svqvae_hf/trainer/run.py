"""The start of a training script: its accelerator, its errors, and what must be checked first."""

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from svqvae_hf.trainer.options import Options, RunOptions, public_values, read_options
from svqvae_hf.trainer.publishing import refuse_finished
from svqvae_hf.trainer.scripts import one_line_errors


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
        raise ValueError(f"`--report_to {options.report_to}` needs its package. Install it, or choose another.")
    return accelerator


def run_training(train: Callable[[Options, Accelerator], None], options: Options) -> None:
    """Calls the training function of a script, and then ends the trackers.

    Raises:
        SystemExit: If the folder holds the result of this very run.
        ValueError: If it holds the result of a run with other options.
    """
    refuse_finished(Path(options.output_dir), public_values(asdict(options)))
    accelerator = make_accelerator(options)
    set_seed(options.seed)
    train(options, accelerator)
    accelerator.end_training()


def run_script(train: Callable[[Options, Accelerator], None], options_class: type[Options]) -> None:
    """Calls the training function of a script with the options of the command line."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # Ctrl-C outside of the loop ends the process at once, as SIGTERM does. An exception would wait for the workers
        # of loaders, which ignore both signals.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with one_line_errors():
            run_training(train, *read_options([options_class], sys.argv[1:]))
    finally:
        for worker in multiprocessing.active_children():  # after an error; Python would wait for them forever
            worker.kill()
