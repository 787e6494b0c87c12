import pytest
import torch
from accelerate import Accelerator

from svqvae_hf.trainer.checkpoints import RUN_STATE, find_checkpoint, load_checkpoint, save_checkpoint
from svqvae_hf.trainer.identity import RunIdentity

IDENTITY = RunIdentity({"optimizer": "adamw"})


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_latest_checkpoint_is_the_newest_whole_one(tmp_path):
    assert find_checkpoint(tmp_path, "latest", 10) is None
    assert find_checkpoint(tmp_path, None, 10) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.partial"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "latest", 10).name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-10", 10) == tmp_path / "checkpoint-10"
    assert find_checkpoint("elsewhere", str(tmp_path / "checkpoint-9"), 10) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-best").mkdir()
    for name in ("nowhere", "checkpoint-best", "."):
        with pytest.raises(ValueError, match=f"or 'latest', got '{name}'"):
            find_checkpoint(tmp_path, name, 10)


def test_oldest_are_removed_and_what_was_left_half_written_is_replaced(tmp_path, accelerator):
    (tmp_path / "checkpoint-3.partial").mkdir()
    (tmp_path / "checkpoint-3.partial" / "stale").touch()
    for step in (1, 2, 10, 3):
        save_checkpoint(accelerator, tmp_path, step, {"mean": torch.ones(2)}, 2, IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-3" / "stale").exists()
    assert load_checkpoint(accelerator, tmp_path / "checkpoint-3", ["mean"])["mean"].tolist() == [1, 1]


def test_a_checkpoint_that_another_run_deletes_is_no_damaged_one(tmp_path, accelerator):
    for step in (1, 2):
        save_checkpoint(accelerator, tmp_path, step, {}, 1, IDENTITY)
    with pytest.raises(ValueError, match="^Another run has deleted `.*checkpoint-1` since this one started. Start it"):
        load_checkpoint(accelerator, tmp_path / "checkpoint-1", [])


def test_a_checkpoint_is_deleted_under_another_name(tmp_path, accelerator, monkeypatch):
    save_checkpoint(accelerator, tmp_path, 1, {}, None, IDENTITY)
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **options: None)  # as if it were killed just before
    save_checkpoint(accelerator, tmp_path, 2, {}, 1, IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1.partial", "checkpoint-2"]


@pytest.mark.parametrize("too_large", ["weights", "state of the run"])
def test_a_full_disk_leaves_no_part_of_a_checkpoint(disk, accelerator, too_large):
    save_checkpoint(accelerator, disk, 1, {}, None, IDENTITY)
    if too_large == "weights":
        accelerator.prepare(torch.nn.Linear(300, 300))
    run_state = {"values": torch.zeros(1 if too_large == "weights" else 100_000)}
    with pytest.raises(OSError, match=r"/checkpoint-2` cannot be written: No space left on device"):
        save_checkpoint(accelerator, disk, 2, run_state, 1, IDENTITY)
    assert [path.name for path in disk.iterdir()] == ["checkpoint-1"]


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, accelerator, capsys):
    save_checkpoint(accelerator, tmp_path, 1, {}, None, IDENTITY)
    torch.save({"bad": Malicious()}, tmp_path / "checkpoint-1" / RUN_STATE)
    (tmp_path / "checkpoint-1" / "checksums.json").unlink()
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_checkpoint(accelerator, tmp_path / "checkpoint-1", [])
    assert "executed" not in capsys.readouterr().out
