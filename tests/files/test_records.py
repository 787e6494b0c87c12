"""Records of runs: they are merged, refuse other options, and name all outputs however a run ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svqvae_files.records import RecordError, RunRecord

OPTIONS = {"scales": [1.0], "model": "a"}
SOURCE = {"name": "a.png"}

# Writes numbered files that are missing, as a command does.
WRITER = """
import sys
from pathlib import Path
from svqvae_files.outputs import write_file
from svqvae_files.records import RunRecord
folder = Path(sys.argv[1])
record = RunRecord(folder / "record.jsonl")
record.start({"scales": [1.0], "model": "a"})
print("started", flush=True)
for number in range(int(sys.argv[2])):
    name = f"{number}.txt"
    if record.is_finished(name) and not record.has_changed(name):
        continue
    record.begin([name], {"number": number})
    write_file(folder / name, str(number).encode() * 1000)
    record.finish([name])
"""


@pytest.fixture
def record(tmp_path):
    return RunRecord(tmp_path / "record.jsonl")


def reread(record):
    return RunRecord(record.path)


def write(record, name, content=b"content", source=SOURCE):
    record.begin([name], source)
    (record.path.parent / name).write_bytes(content)
    record.finish([name])


def start_writer(folder, number):
    command = [sys.executable, "-c", WRITER, str(folder), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_outputs_are_recorded_before_and_after_they_are_written(record, tmp_path):
    record.start(OPTIONS)
    record.begin(["a.txt", "b.txt"], SOURCE)
    assert reread(record).outputs["a.txt"].identity is None
    assert not reread(record).is_finished("a.txt")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    record.finish(["a.txt", "b.txt"])
    again = reread(record)
    assert again.options == OPTIONS
    assert again.outputs["a.txt"].source == SOURCE
    assert again.is_finished("a.txt")
    assert not again.has_changed("a.txt")
    (tmp_path / "a.txt").write_text("A.txt")  # of the same size
    assert again.has_changed("a.txt")
    (tmp_path / "b.txt").unlink()
    assert not again.is_finished("b.txt")


def test_other_options_are_refused_even_a_moment_later(record):
    late = reread(record)
    record.start(OPTIONS)
    late.check_options({"scales": [2.0]})  # it does not know yet
    with pytest.raises(RecordError, match=r"`scales` was \[1.0\], got \[2.0\]"):
        late.start(OPTIONS | {"scales": [2.0]})
    with pytest.raises(RecordError, match="`tiles` was None, got 8"):
        reread(record).check_options(OPTIONS | {"tiles": 8})
    reread(record).start(OPTIONS)


def test_runs_with_the_same_options_add_to_one_record(record):
    other = reread(record)
    record.start(OPTIONS)
    other.start(OPTIONS)
    write(record, "a.txt")
    write(other, "b.txt")
    write(record, "c.txt")
    assert reread(record).outputs.keys() == {"a.txt", "b.txt", "c.txt"}
    assert record.outputs.keys() == {"a.txt", "b.txt", "c.txt"}


def test_only_recorded_files_are_deleted(record, tmp_path):
    record.start(OPTIONS)
    write(record, "a.txt")
    write(record, "b.txt")
    (tmp_path / "mine.txt").touch()
    record.delete(["a.txt"])
    assert reread(record).outputs.keys() == {"b.txt"}
    record.start_over({"scales": [2.0]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "record.jsonl"]
    assert reread(record).options == {"scales": [2.0]}


def test_a_run_whose_record_was_replaced_stops(record):
    record.start(OPTIONS)
    write(record, "a.txt")
    reread(record).start_over({"scales": [2.0]})
    with pytest.raises(RecordError, match="was emptied by a run with --overwrite"):
        record.begin(["b.txt"], SOURCE)
    assert reread(record).outputs == {}


def test_a_line_that_was_cut_by_a_kill_is_replaced(record):
    record.start(OPTIONS)
    write(record, "a.txt")
    whole = record.path.read_bytes()
    for size in range(len(whole)):
        record.path.write_bytes(whole[:size])
        cut = reread(record)
        cut.start(OPTIONS)
        write(cut, "b.txt")
        assert "b.txt" in reread(record).outputs


LINE = {"output": "a.txt", "source": SOURCE, "identity": None}


@pytest.mark.parametrize(
    "lines",
    [
        [LINE],  # without options
        [{"options": OPTIONS}, {"options": OPTIONS}],
        [{"options": [1]}],
        [{"options": OPTIONS}, LINE | {"output": "../a.txt"}],  # it would be deleted outside the folder
        [{"options": OPTIONS}, LINE | {"output": "/etc/passwd"}],
        [{"options": OPTIONS}, LINE | {"output": 3}],
        [{"options": OPTIONS}, LINE | {"source": "a"}],
        [{"options": OPTIONS}, LINE | {"identity": {"size": 1}}],
        [{"options": OPTIONS}, LINE | {"identity": 1}],
        [{"options": OPTIONS}, {"output": "a.txt"}],
        [{"options": OPTIONS}, []],
        [{"options": OPTIONS}, None],
    ],
)
def test_a_damaged_record_is_an_error(tmp_path, lines):
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError, match=f"`{path}` must be the record of a run, but is damaged"):
        RunRecord(path)


def test_a_record_that_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder` cannot be read: Is a directory"):
        RunRecord(tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/record.jsonl` cannot be written: (Not a directory|File exists)"):
        RunRecord(tmp_path / "file" / "record.jsonl").start(OPTIONS)


def test_two_processes_add_to_one_record(tmp_path):
    writers = [start_writer(tmp_path, 60) for _ in range(2)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    record = RunRecord(tmp_path / "record.jsonl")
    assert len(record.outputs) == 60
    for name in record.outputs:
        assert record.is_finished(name)
        assert not record.has_changed(name)


@pytest.mark.slow
def test_a_run_that_is_killed_at_a_random_moment_leaves_nothing_that_no_record_names(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 # shown if the test fails
    chance = random.Random(seed)
    for _ in range(30):
        writer = start_writer(tmp_path, 10_000)
        assert writer.stdout.readline() == b"started\n"
        time.sleep(chance.uniform(0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        record = RunRecord(tmp_path / "record.jsonl")
        written = {path.name for path in tmp_path.glob("*.txt")}
        assert written <= record.outputs.keys()
        for name in record.outputs:
            assert not record.has_changed(name)
    writer = start_writer(tmp_path, 500)
    writer.communicate()
    for number in range(500):
        assert Path(tmp_path, f"{number}.txt").read_text() == str(number) * 1000
