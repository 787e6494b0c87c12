import json
import os
import socket
import time

import psutil
import pytest

from svqvae_hf.files.folders import Folder
from svqvae_hf.token_sets.records import DEAD_SECONDS, PartRecord, PartRecords
from svqvae_hf.token_sets.status import read_status

COMPLETE = "complete"


@pytest.fixture
def records(tmp_path):
    return PartRecords(Folder(tmp_path), 2500, COMPLETE)


def leave_claim(records, part, **changes):
    """A claim as another process would leave it."""
    parent = psutil.Process().parent()
    claim = {"host": socket.gethostname(), "process": parent.pid, "started": parent.create_time(), "seen": time.time()}
    claim |= {"images": 5, "failure": None, **changes}
    records.folder.write(f"parts/{part // 1000:04}/{part:07}.claim", json.dumps(claim).encode())


@pytest.mark.parametrize(
    ("changes", "is_free"),
    [
        ({}, False),
        ({"started": 0.0}, True),  # another process of the same number
        ({"process": 2**30}, True),
        ({"failure": "disk full"}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "seen": time.time() - DEAD_SECONDS - 1}, True),
        ({"process": os.getpid()}, True),
    ],
)
def test_a_part_is_taken_over_from_a_dead_process_only(records, changes, is_free):
    leave_claim(records, 1234, **changes)
    assert records.claim(1234, anyway=False) is is_free
    assert records.claim(1234, anyway=True)
    assert records.read_claim(1234).process == os.getpid()


def test_a_claim_that_is_being_written_does_not_last(records):
    records.folder.write("parts/0001/0001234.claim", b"")
    assert records.claim(1234, anyway=False)


def test_a_done_part_cannot_be_claimed(records):
    assert records.claim(7, anyway=False)
    records.finish(PartRecord(part=7, options="", read=[]))
    assert not records.claim(7, anyway=True)
    assert records.folder.names("parts/0000") == {"0000007.json"}
    records.folder.write(COMPLETE, b"")
    assert not records.claim(8, anyway=True)
    assert records.folder.names("parts/0000") == {"0000007.json"}


def finish(records, part, options="a", files=()):
    record = {"part": part, "options": options, "files": [{"name": name, "rows": 1} for name in files]}
    records.folder.write(f"parts/{part // 1000:04}/{part:07}.json", json.dumps(record).encode())


def test_records_are_gathered_by_the_thousand(records):
    for part in range(2500):
        finish(records, part)
        assert records.gather(part, "a") == (part == 2499)
    assert records.folder.names("parts") == {"0000.jsonl", "0001.jsonl", "0002.jsonl"}
    assert list(records.not_done()) == []
    assert not records.claim(1234, anyway=True)
    assert [record["part"] for record in records.read_gathered()] == list(range(2500))


def test_parts_that_another_process_did_not_live_to_gather_are_gathered_at_the_end(records):
    for part in range(2499):
        finish(records, part)
    assert not records.gather(2498, "a")
    assert records.folder.names("parts") == {"0000", "0001", "0002"}
    finish(records, 2499)
    assert records.gather(2499, "a")
    assert records.folder.names("parts") == {"0000.jsonl", "0001.jsonl", "0002.jsonl"}


def test_gathering_deletes_what_killed_processes_left(tmp_path):
    records = PartRecords(Folder(tmp_path), 2, COMPLETE)
    for name in ("train-0.parquet", ".1a2b.tmp"):
        records.folder.write(f"data/0000-0000/{name}", b"")
    finish(records, 0, files=["data/0000-0000/train-0.parquet"])
    finish(records, 1, options="b")
    with pytest.raises(ValueError, match=r"part 1 of .* with other options. Delete `parts/0000/0000001.json` there"):
        records.gather(0, "a")
    finish(records, 1)
    assert records.gather(0, "a")
    assert records.folder.names("data/0000-0000") == {"train-0.parquet"}


@pytest.mark.parametrize("is_complete", [False, True])
def test_two_processes_gather_the_same_parts(tmp_path, monkeypatch, is_complete):
    faster, slower = (PartRecords(Folder(tmp_path), 2, COMPLETE) for _ in range(2))
    for part in range(2):
        finish(slower, part)
    read_all = slower.folder.read_all

    def overtaken(names):
        contents = read_all(names)
        assert faster.gather(0, "a")
        if is_complete:
            faster.folder.write(COMPLETE, b"")
            faster.folder.delete_folder("parts")
        return contents

    monkeypatch.setattr(slower.folder, "read_all", overtaken)
    assert slower.gather(0, "a")
    assert slower.folder.names("parts") == (set() if is_complete else {"0000.jsonl"})


@pytest.mark.parametrize("is_gathered", [False, True])
def test_a_done_part_counts_as_done_at_every_moment(tmp_path, monkeypatch, is_gathered):
    ours, other = (PartRecords(Folder(tmp_path), 2, COMPLETE) for _ in range(2))
    for part in range(2):
        finish(other, part)
    done = []
    for name in ("write", "delete_folder"):
        step = getattr(other.folder, name)
        monkeypatch.setattr(other.folder, name, lambda *args, step=step: (step(*args), done.append(ours.is_done(0))))
    if is_gathered:
        other.gather(0, "a")
    read = ours.folder.read

    def overtaken(name):
        content = read(name)
        monkeypatch.setattr(ours.folder, "read", read)
        other.gather(0, "a")
        other.folder.write(COMPLETE, b"")
        other.folder.delete_folder("parts")
        return content

    monkeypatch.setattr(ours.folder, "read", overtaken)
    assert ours.is_done(0)
    assert done == [True] * 4


def test_status_names_the_parts_that_run_or_failed(records, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "options.json").write_text(json.dumps({"parts": 2500}))
    leave_claim(records, 3)
    leave_claim(records, 2000, failure="no route to host.")
    leave_claim(records, 2001, process=2**30, host=socket.gethostname())
    leave_claim(records, 5)
    records.finish(PartRecord(part=4, options="", read=[]))
    leave_claim(records, 4)  # of a second process that made it
    status = read_status(tmp_path)
    assert (status.done, list(status.running), list(status.failed)) == (1, [3, 5], [2000, 2001])
    lines = str(status).splitlines()
    assert lines[0] == "parts    2500 (not complete; done: 1, running: 2, failed: 2, waiting: 2495)"
    assert lines[1].startswith("running  part 3: 5 images, process ")
    assert lines[3] == "failed   part 2000: no route to host."
    assert "part 2001: process 1073741824 on" in lines[4]


def test_status_of_something_else_raises(tmp_path):
    with pytest.raises(ValueError, match="must be a token set, but has no record of one"):
        read_status(tmp_path)
