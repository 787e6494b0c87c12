"""The run of a toy script: one linear layer on a few numbers."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from torch import nn
from training_runs import cpu, forget_accelerate, logged

from svqvae_hf.trainer.optimization import hyperparameters, make_optimizer
from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.run import Run, make_accelerator, run_script
from svqvae_hf.trainer.scripts import one_line_errors


class ToyLoader:
    contents = "toys"

    def __init__(self, num_batches):
        self.num_batches, self.batch = num_batches, 0

    def __iter__(self):
        while self.batch < self.num_batches:
            self.batch += 1
            yield torch.full((2, 3), 1 / self.batch)

    def state_dict(self):
        return {"batch": self.batch}

    def load_state_dict(self, state):
        self.batch = state["batch"]


@pytest.fixture
def options(tmp_path):
    return {"output_dir": str(tmp_path / "out"), "max_train_steps": 6, "lr_warmup_steps": 0, "learning_rate": 0.01}


def train(options, on_step=lambda step, network: 1.0, width=3):
    """Trains two layers and returns the run; `on_step` sees each step and returns the factor of its loss."""
    forget_accelerate()
    with cpu():
        run = Run(RunOptions(**options))
        accelerator = run.accelerator
        network = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
        optimizer, lr_scheduler = make_optimizer(
            network, run.options, run.options.learning_rate, run.options.max_train_steps
        )
        model, optimizer = accelerator.prepare(network, optimizer)
        run.start(network, ToyLoader(run.options.num_batches), lr_scheduler)
        for step, batches in run.steps():
            factor = on_step(step, network)
            for batch in batches:
                with accelerator.accumulate(model):
                    loss = factor * model(batch).square().mean()
                    accelerator.backward(loss)
                    numbers = {"loss": loss}
                    if accelerator.sync_gradients:
                        numbers |= run.update_weights(model, optimizer, lr_scheduler)
                    run.add(numbers, rows=len(batch))
            if run.logs_after(step):
                run.log_training(step)
        accelerator.end_training()
    return run


def assert_equal_networks(one, other):
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_signal_saves_a_checkpoint_and_the_resumed_run_equals_an_unbroken_one(options, optimizer, tmp_path, caplog):
    caplog.set_level("INFO")
    options |= {"optimizer": optimizer, "max_train_steps": 14}  # SOAP turns its axes every 10 steps
    options |= {"gradient_accumulation_steps": 2, "use_ema": True, "logging_steps": 1}
    handler = signal.getsignal(signal.SIGTERM)

    def stop(step, network):
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == handler, "a second signal ends the process at once"
        return 1.0

    with pytest.raises(SystemExit) as stopped:
        train(options, stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "Stopped by a signal at step 12" in caplog.text
    assert set(logged(caplog, "train/loss")) == set(range(1, 13))
    assert (tmp_path / "out" / "checkpoint-12").is_dir()
    resumed = train(options | {"resume_from_checkpoint": "latest"})
    whole = train(options | {"output_dir": str(tmp_path / "whole")})
    assert type(whole.lr_scheduler.optimizer).__name__.lower() == optimizer
    assert_equal_networks(resumed, whole)
    assert all(map(torch.equal, resumed.ema.shadow_params, whole.ema.shadow_params))


def test_ctrl_c_outside_of_the_loop_ends_a_script_at_once(monkeypatch):
    handlers = {signal.SIGINT: signal.default_int_handler}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for name in ("read_options", "run_training"):
        monkeypatch.setattr(f"svqvae_hf.trainer.run.{name}", lambda *_: None)
    run_script(lambda run: None, RunOptions)
    assert handlers == {signal.SIGINT: signal.SIG_DFL}


def test_updates_with_gradients_that_are_not_finite_are_skipped_counted_and_stop_the_run(options, monkeypatch, caplog):
    caplog.set_level("INFO")
    options |= {"max_skipped_steps": 1, "logging_steps": 1, "use_ema": True}
    seen, averages = [], []

    def poison(step, network):
        seen.append(network[2].weight.detach().clone())
        return float("nan") if step in poisoned else 1.0

    step_average = EMAModel.step
    monkeypatch.setattr(EMAModel, "step", lambda *args: averages.append(len(seen)) or step_average(*args))
    poisoned = (1, 3)
    train(options, poison)
    assert averages == [1, 3, 5, 6]
    assert {step for step, fraction in logged(caplog, "train/skipped").items() if fraction} == {2, 4}
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    poisoned = (3, 4)
    with pytest.raises(ValueError, match="not for 2 steps in a row. Lower `--learning_rate`"):
        train(options | {"output_dir": options["output_dir"] + "2"}, poison)


def test_evaluating_uses_averaged_weights_and_leaves_modes_and_weights_as_they_were(options):
    run = train(options | {"use_ema": True})
    run.network[0].eval()
    before = [parameter.detach().clone() for parameter in run.network.parameters()]
    with run.evaluating():
        assert not any(module.training for module in run.network.modules())
        assert not torch.is_grad_enabled()
        for parameter, average, weight in zip(run.network.parameters(), run.ema.shadow_params, before, strict=True):
            assert torch.equal(parameter, average)
            assert not torch.equal(parameter, weight)
    assert [module.training for module in run.network] == [False, True, True]
    assert all(map(torch.equal, run.network.parameters(), before))


# Resumed runs


def files(folder):
    """Content of each file below a folder, but of no checkpoint's, by its path."""
    return {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume_from_checkpoint": None}, "needs an `--output_dir` without checkpoints"),
        ({"use_ema": True}, "the state of all parts of the run, but lacks ema. Use the options of the run that wrote"),
        ({"max_train_steps": 1}, "`--max_train_steps` must be at least 2, .*checkpoint-2`, but is 1"),
    ],
)
def test_refused_resume_leaves_the_folder_as_it_was(options, change, message):
    options |= {"gradient_accumulation_steps": 2, "max_train_steps": 2}
    train(options)
    before = files(options["output_dir"])
    with pytest.raises(ValueError, match=message):
        train(options | {"resume_from_checkpoint": "latest", "learning_rate": 1.0} | change)
    assert files(options["output_dir"]) == before


@pytest.mark.parametrize("damage", ["optimizer.bin", "run_state.pt", "model.safetensors", "network"])
def test_checkpoint_that_cannot_be_loaded_is_refused_in_one_line(options, damage, capsys):
    train(options | {"max_train_steps": 2})
    before = files(options["output_dir"])
    if damage != "network":
        path = Path(options["output_dir"], "checkpoint-2", damage)
        path.write_bytes(path.read_bytes()[:100])
    options |= {"resume_from_checkpoint": "latest", "learning_rate": 1.0}
    with pytest.raises(SystemExit), one_line_errors():
        train(options, width=4 if damage == "network" else 3)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must be a complete checkpoint of the same network and options, but cannot be loaded" in error
    assert len(error) < 500
    assert files(options["output_dir"]) == before


def test_changed_hyperparameters_are_applied_and_logged_on_resume(options, tmp_path, caplog):
    caplog.set_level("INFO")
    changes = {
        **{"learning_rate": 0.5, "lr_scheduler": "linear", "lr_warmup_steps": 3, "max_train_steps": 8},
        **{"adam_beta1": 0.8, "adam_beta2": 0.7, "adam_weight_decay": 0.3, "ema_decay": 0.5},
    }
    options |= {"logging_steps": 1, "use_ema": True}
    train(options | {"max_train_steps": 2})
    caplog.clear()
    resumed = train(options | changes | {"resume_from_checkpoint": "latest"})
    rates = logged(caplog, "lr")
    for name, value in changes.items():
        assert re.search(rf"Changed on resume: --{name} from .* to {re.escape(str(value))}\n", caplog.text)
    with pytest.raises(ValueError, match="`--optimizer` must be adamw as in `.*`, got soap"):
        train(options | changes | {"optimizer": "soap", "resume_from_checkpoint": "latest"})
    caplog.clear()
    fresh = train(options | changes | {"output_dir": str(tmp_path / "fresh")})
    assert rates == {step: rate for step, rate in logged(caplog, "lr").items() if step > 2}
    assert hyperparameters(resumed.lr_scheduler) == hyperparameters(fresh.lr_scheduler)
    assert resumed.ema.decay == 0.5
    written = yaml.safe_load(Path(options["output_dir"], "train_config.yaml").read_text())
    assert {name: written[name] for name in changes} == changes


def test_log_lines_say_how_long_it_takes(options, caplog):
    caplog.set_level("INFO")
    train(options | {"logging_steps": 4})
    times = r"step (\d+) of 6 \(0:00:\d+ elapsed, 0:00:\d+ left, \d+\.\d GiB\): train/loss \d"
    assert re.findall(times, caplog.text) == ["4", "6"]


# The accelerator


def test_sharded_weights_are_refused(options, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with cpu(), pytest.raises(ValueError, match="needs whole weights on each process, but FSDP shards them. Use DDP"):
        make_accelerator(RunOptions(**options))


def test_processes_that_do_not_know_each_other_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but accelerate would let each of them"):
        make_accelerator(RunOptions(**options))
    assert not os.path.exists(options["output_dir"])


def test_settings_of_accelerate_cannot_change_the_accumulation(options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(RunOptions(**options)).gradient_accumulation_steps == 1
