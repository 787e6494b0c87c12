"""The run of a toy script: one linear layer on a few numbers."""

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from processes import start
from torch import nn
from torch.utils.data import DataLoader
from training_runs import cpu, forget_accelerate, logged

from svqvae_hf.trainer.data.crop_loader import prepare_worker
from svqvae_hf.trainer.identity import RunIdentity
from svqvae_hf.trainer.log import describe_time
from svqvae_hf.trainer.optimization import hyperparameters
from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.publishing import FINISHED_FILE, provenance, refuse_finished
from svqvae_hf.trainer.run import make_accelerator, run_script, run_training
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
    return {"output_dir": str(tmp_path / "out"), "max_steps": 6, "warmup_steps": 0, "learning_rate": 0.01}


def train(settings, on_step=lambda step, network: 1.0, width=3, publish=False, sets=None):
    """Trains two layers and returns their weights; `on_step` sees each step and returns the factor of its loss."""
    trained = []

    def script(run):
        options, accelerator = run.options, run.accelerator
        run.identify(sets or {"train_data_dir": "a digest"})
        network = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
        weights = run.train(network, options.learning_rate)
        loader = ToyLoader(options.max_steps * options.gradient_accumulation_steps)
        checkpoints = run.begin(network, {"weights": weights, "loader": loader}, loader.contents)
        batches = iter(loader)
        trained.append(weights)
        for step in checkpoints.steps():
            factor = on_step(step, network)
            for batch in islice(batches, options.gradient_accumulation_steps):
                with accelerator.accumulate(weights.model):
                    loss = factor * weights.model(batch).square().mean()
                    accelerator.backward(loss)
                    numbers = {"loss": loss}
                    if accelerator.sync_gradients:
                        numbers |= weights.update()
                    run.log.add(numbers, rows=len(batch))
            if options.logs_after(step):
                run.log.write_training(step + 1, {"lr": weights.lr})
            checkpoints.after(step)
        if publish:
            card = str(provenance("toy.py", options.max_steps, 2, "toys") | run.log.card_rows)
            run.result.publish(publish if callable(publish) else save_toy(network), card)

    forget_accelerate()
    with cpu():
        run_training(script, RunOptions(**settings))
    return trained[0]


def save_toy(network):
    return lambda folder: torch.save(network.state_dict(), folder / "weights.pt")


def assert_equal_networks(one, other):
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_signal_saves_a_checkpoint_and_the_resumed_run_equals_an_unbroken_one(options, optimizer, tmp_path, caplog):
    caplog.set_level("INFO")
    options |= {"optimizer": optimizer, "max_steps": 14}  # SOAP turns its axes every 10 steps
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
        monkeypatch.setattr(f"svqvae_hf.trainer.run.{name}", lambda *_: ())
    run_script(lambda run: None, RunOptions)
    assert handlers[signal.SIGINT] == signal.SIG_DFL


def fail_beside_a_worker(folder):
    def train(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker inherits it, as workers of loaders ignore it
        multiprocessing.Process(target=time.sleep, args=(600,), daemon=True).start()
        raise RuntimeError("out of luck")

    sys.argv = ["train.py", "--output_dir", str(folder), "--max_steps", "1"]
    with cpu():
        run_script(train, RunOptions)


def test_an_error_ends_a_script_although_its_workers_ignore_sigterm(tmp_path):
    process = start(fail_beside_a_worker, tmp_path / "out")
    process.join(60)
    ended, _ = process.exitcode, process.kill()
    assert ended == 1


def stop_beside_a_loader(folder, log):
    def train(*_):
        batches = iter(DataLoader(range(1000), num_workers=2, worker_init_fn=prepare_worker))
        next(batches)
        sys.exit(128 + signal.SIGTERM)  # as after a signal, when the checkpoint is saved

    sys.argv = ["train.py", "--output_dir", str(folder), "--max_steps", "1"]
    with cpu(), log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
        run_script(train, RunOptions)


def test_a_stopped_script_reports_no_error_of_its_workers(tmp_path):
    log = tmp_path / "log.txt"
    process = start(stop_beside_a_loader, tmp_path / "out", log)
    process.join(60)
    ended, _ = process.exitcode, process.kill()
    assert ended == 128 + signal.SIGTERM
    assert "DataLoader worker" not in log.read_text()


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
        ({"use_ema": True}, "`--use_ema` must be False, as in the run that wrote the checkpoint"),
        ({"max_steps": 1}, "`--max_steps` must be at least 2, as in .*checkpoint-2`, got 1"),
    ],
)
def test_refused_resume_leaves_the_folder_as_it_was(options, change, message):
    options |= {"gradient_accumulation_steps": 2, "max_steps": 2}
    train(options)
    before = files(options["output_dir"])
    with pytest.raises(ValueError, match=message):
        train(options | {"resume_from_checkpoint": "latest", "learning_rate": 1.0} | change)
    assert files(options["output_dir"]) == before


@pytest.mark.parametrize(
    "change",
    [
        {"use_ema": False},
        {"per_device_train_batch_size": 64},
        {"max_steps": 1},
        {"without_checkpoints": True, "learning_rate": 1.0},
        {"without_checkpoints": True, "max_steps": 12},
    ],
)
def test_a_finished_result_is_not_rewritten_by_a_run_with_other_options(options, change):
    options |= {"use_ema": True, "max_steps": 2}
    train(options, publish=True)
    before = files(options["output_dir"])
    if change.pop("without_checkpoints", False):
        shutil.rmtree(Path(options["output_dir"], "checkpoint-2"))
    advice = "raise `--max_steps`" if any(Path(options["output_dir"]).glob("checkpoint-*")) else "has no checkpoint"
    with pytest.raises(ValueError, match=rf"holds the result of a finished run.* has other options \(--.*{advice}"):
        train(options | {"resume_from_checkpoint": "latest"} | change)
    assert files(options["output_dir"]) == before


def test_a_finished_run_started_again_says_so_and_a_longer_one_trains_further(options, capsys):
    options |= {"max_steps": 2, "resume_from_checkpoint": "latest"}
    train(options, publish=True)
    before = files(options["output_dir"])
    with pytest.raises(SystemExit) as stop:
        train(options, publish=True)
    assert stop.value.code == 0
    assert "has finished its 2 steps. Nothing changed." in capsys.readouterr().err
    assert files(options["output_dir"]) == before
    train(options | {"max_steps": 3}, publish=True)
    assert files(options["output_dir"]) != before
    assert "'3 of 2 toys'" in Path(options["output_dir"], "README.md").read_text()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 100)])
def test_a_finished_run_whose_result_is_damaged_names_the_file_and_can_write_it_again(options, damage):
    options |= {"max_steps": 2, "resume_from_checkpoint": "latest"}
    train(options, publish=True)
    folder = Path(options["output_dir"])
    weights = torch.load(folder / "weights.pt")
    damage(folder / "weights.pt")
    with pytest.raises(ValueError, match=r"out/weights.pt` must be as the finished run .* delete `finished_run.json`"):
        train(options, publish=True)
    (folder / FINISHED_FILE).unlink()
    train(options, publish=True)
    torch.testing.assert_close(torch.load(folder / "weights.pt"), weights, rtol=0, atol=0)
    (folder / "weights.pt").unlink()
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(ValueError, match="is missing. Restore it, or train again in another `--output_dir`"):
        train(options, publish=True)


@pytest.mark.parametrize(
    "sets", [{"train_data_dir": "another digest"}, {}, {"train_data_dir": "a digest", "mix": "b"}]
)
def test_a_run_is_not_resumed_or_called_finished_with_other_data(options, sets):
    options |= {"max_steps": 2, "resume_from_checkpoint": "latest"}
    train(options, publish=True)
    before = files(options["output_dir"])
    sets = sets or {"token_set": "a digest"}
    for change in ({}, {"max_steps": 3}):
        with pytest.raises(ValueError, match=r"must name what `.*` was made from, but names something else"):
            train(options | change, publish=True, sets=sets)
    assert files(options["output_dir"]) == before


def test_a_run_is_resumed_but_not_called_finished_with_other_validation_data(options):
    options |= {"max_steps": 2, "resume_from_checkpoint": "latest"}
    sets = {"train_data_dir": "a digest", "validation_data_dir": "b"}
    train(options, publish=True, sets=sets)
    with pytest.raises(ValueError, match="`--validation_data_dir` must name what"):
        train(options, sets=sets | {"validation_data_dir": "c"})
    train(options | {"max_steps": 3}, sets=sets | {"validation_data_dir": "c"})


def test_a_killed_publication_leaves_nothing_after_the_next_one(options):
    options |= {"max_steps": 2, "resume_from_checkpoint": "latest"}

    def be_killed(folder):
        (folder / "half.bin").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options, publish=be_killed)
    train(options, publish=True)
    names = {path.name for path in Path(options["output_dir"]).iterdir()}
    assert names == {"checkpoint-2", "README.md", "finished_run.json", "train_config.yaml", "weights.pt"}


def test_a_card_written_after_a_resume_at_the_last_step_has_the_last_loss(options):
    options |= {"max_steps": 2, "resume_from_checkpoint": "latest"}
    train(options)
    train(options, publish=True)
    assert "'train/loss': '0." in Path(options["output_dir"], "README.md").read_text()


def test_a_full_disk_at_the_end_is_one_line_and_the_run_can_be_resumed(options, disk, capsys):
    options |= {"output_dir": str(disk / "out"), "max_steps": 2, "resume_from_checkpoint": "latest"}

    def fill_disk(folder):
        torch.save(torch.zeros(2**20), folder / "weights.pt")

    with pytest.raises(SystemExit) as stop, one_line_errors():
        train(options, publish=fill_disk)
    assert stop.value.code == 2
    del stop  # whose frames keep the file open
    gc.collect()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The result cannot be written to" in error
    assert "No space left on device, the disk is full" in error
    train(options, publish=True)
    assert Path(disk, "out", "weights.pt").exists()


@pytest.mark.parametrize(
    "damage", ["optimizer.bin", "run_state.pt", "run_identity.json", "model.safetensors", "network"]
)
def test_checkpoint_that_cannot_be_loaded_is_refused_in_one_line(options, damage, capsys):
    train(options | {"max_steps": 2})
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


def test_a_renamed_checkpoint_is_refused(options):
    train(options | {"max_steps": 2})
    checkpoint = Path(options["output_dir"], "checkpoint-2")
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint-1"))
    with pytest.raises(ValueError, match=f"`{renamed}` must be called checkpoint-2, as when it was written"):
        train(options | {"resume_from_checkpoint": "latest"})


def test_changed_hyperparameters_are_applied_and_logged_on_resume(options, tmp_path, caplog):
    caplog.set_level("INFO")
    changes = {
        **{"learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 3, "max_steps": 8},
        **{"adam_beta1": 0.8, "adam_beta2": 0.7, "weight_decay": 0.3, "ema_decay": 0.5},
    }
    options |= {"logging_steps": 1, "use_ema": True}
    train(options | {"max_steps": 2})
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


def test_log_lines_show_some_numbers_and_level_debug_all(options, caplog):
    caplog.set_level("INFO")
    train(options | {"max_steps": 2})
    assert not logged(caplog, "train/grad_norm")
    caplog.set_level("DEBUG", "svqvae_hf.trainer.log")
    train(options | {"max_steps": 2, "output_dir": options["output_dir"] + "2"})
    assert logged(caplog, "train/grad_norm")[2] > 0
    assert 2 in logged(caplog, "train/loss")


def test_log_lines_say_how_long_it_takes(options, caplog):
    caplog.set_level("INFO")
    train(options | {"logging_steps": 4})
    times = r"step (\d+) of 6 \(0:00:\d+ elapsed, 0:00:\d+ left, \d+\.\d GiB\): train/loss \d"
    assert re.findall(times, caplog.text) == ["4", "6"]
    assert describe_time(3.0, steps_of_process=0, steps_left=6) == "0:00:03 elapsed"


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


def test_a_set_that_was_moved_is_the_same_set(tmp_path):
    finished = RunIdentity({"max_steps": 3, "train_data_dir": "photos"}, {}, {"train_data_dir": "digest"})
    (tmp_path / FINISHED_FILE).write_text(json.dumps(finished.to_record() | {"files": {}}))
    moved = {"max_steps": 3, "train_data_dir": "moved"}
    with pytest.raises(SystemExit) as end:
        refuse_finished(tmp_path, RunIdentity(moved, {}, {"train_data_dir": "digest"}))
    assert end.value.code == 0
    with pytest.raises(ValueError, match="`--train_data_dir` must name what"):
        refuse_finished(tmp_path, RunIdentity(moved, {}, {"train_data_dir": "another digest"}))
