"""The run of a toy script: one linear layer on a few numbers."""

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from torch import nn
from torch._utils import ExceptionWrapper
from training_runs import cpu, forget_accelerate, logged

from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.run import Run, make_accelerator, one_line_errors
from svqvae_hf.trainer.train_options import TrainOptions

pytestmark = pytest.mark.usefixtures("one_accelerator")


class ToyLoader:
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


def train(options, on_step=lambda step, network: 1.0):
    """Trains the layer and returns the run; `on_step` sees each step and returns the factor of its loss."""
    forget_accelerate()
    with cpu():
        run = Run(RunOptions(**options))
    accelerator, network = run.accelerator, nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    optimizer, lr_scheduler = make_optimizer(network, run.options, run.options.learning_rate, 6)
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


def test_signal_saves_a_checkpoint_and_the_resumed_run_equals_an_unbroken_one(options, tmp_path, caplog):
    caplog.set_level("INFO")
    options |= {"gradient_accumulation_steps": 2, "use_ema": True, "logging_steps": 1}
    handler = signal.getsignal(signal.SIGTERM)

    def stop(step, network):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == handler, "a second signal ends the process at once"
        return 1.0

    with pytest.raises(SystemExit) as stopped:
        train(options, stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "Stopped by a signal at step 3" in caplog.text
    assert set(logged(caplog, "train/loss")) == {1, 2, 3}
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    resumed = train(options | {"resume_from_checkpoint": "latest"})
    whole = train(options | {"output_dir": str(tmp_path / "whole")})
    assert_equal_networks(resumed, whole)
    assert all(map(torch.equal, resumed.ema.shadow_params, whole.ema.shadow_params))


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


def test_checkpoints_of_another_run_are_refused(options):
    train(options | {"gradient_accumulation_steps": 2, "max_train_steps": 2})
    written = Path(options["output_dir"], "train_config.yaml").read_bytes()
    with pytest.raises(ValueError, match="needs an `--output_dir` without checkpoints"):
        train(options)
    assert Path(options["output_dir"], "train_config.yaml").read_bytes() == written
    options |= {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="`--gradient_accumulation_steps` must be 2 as in the run that wrote"):
        train(options)
    with pytest.raises(ValueError, match="`--max_train_steps` must be at least 2, .*checkpoint-2`, but is 1"):
        train(options | {"max_train_steps": 1})


# The accelerator


@pytest.fixture
def train_options(options):
    return {"output_dir": options["output_dir"], "model_config_name_or_path": "x", "train_data_dir": "y"}


def test_unused_parameters_are_searched_only_where_codes_may_lack_a_gradient(train_options):
    for part, needed in (
        ({}, False),
        ({"vq_weight": 0.0}, True),
        ({"vq_start": 5}, True),
        ({"kmeans_steps": [5]}, True),
    ):
        with cpu():
            handler = make_accelerator(TrainOptions(**train_options, **part)).ddp_handler
        assert handler.find_unused_parameters == needed


def test_trackers_that_are_not_installed_are_refused(options, monkeypatch):
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    options = RunOptions(**options, report_to="wandb")
    with cpu(), pytest.warns(UserWarning, match="no supported trackers"):
        with pytest.raises(ValueError, match="needs that tracker's package. Install it, or choose another"):
            make_accelerator(options)
    assert not os.path.exists(options.output_dir)


def test_options_that_need_whole_weights_are_refused_where_weights_are_sharded(train_options, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    needing = {"kmeans_steps": [5], "dead_code_reset_steps": 5, "use_ema": True, "adversarial_weight": 1.0}
    for name, value in needing.items():
        with cpu(), pytest.raises(ValueError, match=f"`--{name}` needs whole weights on each process, but FSDP"):
            make_accelerator(TrainOptions(**train_options, **{name: value}))


def test_processes_that_do_not_know_each_other_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but accelerate would let each of them"):
        make_accelerator(RunOptions(**options))
    assert not os.path.exists(options["output_dir"])


# Errors


def fail(error, in_worker):
    """Raises an error; in a worker, as a loader does whose process met it while it handled another."""
    if not in_worker:
        raise error
    try:
        try:
            raise KeyError("before")
        except KeyError as cause:
            raise error from cause
    except (ValueError, OSError):
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapper.reraise()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\n  second"), "first second"),
        (OSError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
        (ValueError(), "ValueError()"),
    ],
)
@pytest.mark.parametrize("in_worker", [False, True])
def test_errors_are_one_line_with_the_whole_message(capsys, error, line, in_worker):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        fail(error, in_worker)
    assert stop.value.code == 2
    written = capsys.readouterr().err
    name = type(error).__name__
    expected = line if not in_worker else f"{name}: {line}".removesuffix(f": {name}()")
    assert written.endswith(f": error: {expected}\n")
    assert written.count("\n") == 1
