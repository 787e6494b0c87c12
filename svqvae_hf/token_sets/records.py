"""Records of the parts of a token set: which are done, running or failed. They are files beside the set.

No process waits for another. A part is done once its record is there. A claim says who works on it, only to save work:
two processes on one part write the same files. Once a thousand parts in a row are done, their records are gathered in
one file, so that no process has to read or delete a file per part at the end.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from svqvae_hf.files.folders import Folder

RECORDS = "parts"
OPTIONS_FILE = f"{RECORDS}/options.json"
PARTS_PER_FOLDER = 1000
READ_AT_ONCE = 4  # files of gathered records
BEAT_SECONDS = 60  # between two signs of life of a running part
DEAD_SECONDS = 600  # without a sign of life from another machine, after which its part counts as dead


@dataclass
class PartRecord:
    """Facts of a finished part. They are equal however often and wherever it is made.

    Args:
        part (`int`): Number of the part.
        options (`str`): Fingerprint of the model, the options and the image set.
        read (`list[str]`): Files, or the range of images, that were read.
        images (`int`): Images that were read, including the skipped ones.
        rows (`int`): Rows that were written.
        ids (`int`): Ids in them, of all scales.
        skipped (`list[dict[str, str]]`): `key` and `reason` of each image that could not be read.
        files (`list[dict[str, Any]]`): `name` and `rows` of each Parquet file.
    """

    part: int
    options: str
    read: list[str]
    images: int = 0
    rows: int = 0
    ids: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Claim:
    """Sign of life of the process that works on a part, or its reason to fail.

    Args:
        host (`str`): Name of the machine.
        process (`int`): Process id.
        started (`float`): Time when the process started, in seconds since 1970.
        seen (`float`): Time of the sign.
        images (`int`): Images read so far.
        failure (`str`, *optional*): Reason why the part has failed.
    """

    host: str
    process: int
    started: float
    seen: float
    images: int = 0
    failure: str | None = None

    def is_alive(self) -> bool:
        """Whether the process still works on the part, as far as one can tell from here."""
        if self.failure is not None:
            return False
        if self.host != socket.gethostname():
            return time.time() - self.seen < DEAD_SECONDS
        try:
            return abs(psutil.Process(self.process).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


class PartRecords:
    """Records of the parts of a token set.

    Args:
        folder ([`Folder`]): Folder of the token set.
        num_parts (`int`): Number of parts.
        complete_file (`str`): File that is there once the set is complete and the records are deleted.
    """

    def __init__(self, folder: Folder, num_parts: int, complete_file: str):
        self.folder = folder
        self.num_parts = num_parts
        self.complete_file = complete_file
        self.last_beat = 0.0

    def claim(self, part: int, anyway: bool) -> bool:
        """Claims a part; returns whether it should be made here.

        Args:
            part (`int`): Number of the part.
            anyway (`bool`): Whether to take it from a process that seems to work on it.
        """
        if self.is_done(part):
            return False
        name, sign = _claim_name(part), _to_json(_own_claim())
        if not self.folder.create(name, sign):
            other = self.read_claim(part)
            is_taken = other is not None and other.is_alive() and other.process != os.getpid()  # not of an earlier try
            if is_taken and not anyway:
                return False
            self.folder.write(name, sign)
        if self.is_done(part):  # in the meantime
            self.release(part)
            return False
        self.last_beat = time.monotonic()
        return True

    def beat(self, part: int, images: int) -> None:
        """Shows from time to time that the part is still being made, with the number of images so far."""
        if time.monotonic() - self.last_beat > BEAT_SECONDS:
            self.last_beat = time.monotonic()
            self.folder.write(_claim_name(part), _to_json(_own_claim(images=images)))

    def fail(self, part: int, reason: str) -> None:
        """Records why a part could not be made."""
        self.folder.write(_claim_name(part), _to_json(_own_claim(failure=reason)))

    def release(self, part: int) -> None:
        """Withdraws a claim."""
        self.folder.delete(_claim_name(part))
        self._delete_if_complete()

    def finish(self, record: PartRecord) -> None:
        """Records that a part is done."""
        self.folder.write(_record_name(record.part), _to_json(record))
        self.release(record.part)

    def is_done(self, part: int) -> bool:
        """Whether a part is done."""
        # in this order, because each file is written before the one above it is deleted
        names = (_record_name(part), _gathered_name(part // PARTS_PER_FOLDER), self.complete_file)
        return any(self.folder.read(name) is not None for name in names)

    def gather(self, part: int, options: str) -> bool:
        """Gathers the records of thousands of parts that are all done. Returns whether all parts are gathered.

        Args:
            part (`int`): Number of a part. It and its neighbours come first, to find out soon if some are not done.
            options (`str`): Fingerprint that all records must have.

        Raises:
            ValueError: A part was made with other options.
        """
        waiting = self._not_gathered()
        waiting.sort(key=lambda number: (number < part // PARTS_PER_FOLDER, number))
        return all(self._gather(number, options) for number in waiting)

    def read_claim(self, part: int) -> Claim | None:
        """Reads the claim of a part. Returns `None` if nobody has claimed it, or the claim is still being written."""
        content = self.folder.read(_claim_name(part))
        return Claim(**json.loads(content)) if content else None

    def read_claims(self) -> dict[int, Claim]:
        """Claims by part, in order."""
        names = [self.folder.names(_subfolder(number)) for number in self._not_gathered()]
        claimed = sorted(part for each in names for part in _numbers(each, ".claim") - _numbers(each, ".json"))
        found = {part: self.read_claim(part) for part in claimed}
        return {part: claim for part, claim in found.items() if claim is not None}

    def count_done(self) -> int:
        """Number of parts that are done."""
        return self.num_parts - sum(1 for _ in self.not_done())

    def not_done(self) -> Iterator[int]:
        """Yields the parts that are not done, in order."""
        for number in self._not_gathered():
            done = _numbers(self.folder.names(_subfolder(number)), ".json")
            yield from (part for part in self._parts_of(number) if part not in done)

    def to_do(self) -> Iterator[int]:
        """Yields the parts that are not done, in order, and at the end those that have failed before."""
        failed = {part for part, claim in self.read_claims().items() if claim.failure is not None}
        yield from (part for part in self.not_done() if part not in failed)
        yield from sorted(failed)

    def read_gathered(self) -> Iterator[dict[str, Any]]:
        """Yields the fields of all [`PartRecord`]s in order.

        Raises:
            FileNotFoundError: Some are not gathered.
        """
        names = list(map(_gathered_name, range(self._num_folders())))
        for start in range(0, len(names), READ_AT_ONCE):
            for content in self.folder.read_all(names[start : start + READ_AT_ONCE]):
                yield from map(json.loads, content.splitlines())

    def _gather(self, number: int, options: str) -> bool:
        """Gathers the records of a folder if all its parts are done. Returns whether they are gathered."""
        parts = self._parts_of(number)
        if len(_numbers(self.folder.names(_subfolder(number)), ".json")) < len(parts):
            return self.folder.read(_gathered_name(number)) is not None  # another process was faster
        try:
            contents = self.folder.read_all([_record_name(part) for part in parts])
        except FileNotFoundError:  # another process has gathered and deleted them
            return True
        records = list(map(json.loads, contents))
        for record in records:
            if record["options"] != options:
                raise ValueError(
                    f"part {record['part']} of `{self.folder.url}` was made with other options. Delete "
                    f"`{_record_name(record['part'])}` there, and run the part again."
                )
        self._delete_unfinished({file["name"] for record in records for file in record["files"]})
        self.folder.write(_gathered_name(number), b"".join(content + b"\n" for content in contents))
        self.folder.delete_folder(_subfolder(number))
        self._delete_if_complete()
        return True

    def _delete_if_complete(self) -> None:
        """Deletes what was written here after another process had completed the set."""
        if self.folder.read(self.complete_file) is not None:
            self.folder.delete_folder(RECORDS)

    def _delete_unfinished(self, files: set[str]) -> None:
        """Deletes what processes that were killed have left beside the files of finished parts."""
        for subfolder in {name.rpartition("/")[0] for name in files}:
            for name in self.folder.names(subfolder):
                if f"{subfolder}/{name}" not in files:
                    self.folder.delete(f"{subfolder}/{name}")

    def _num_folders(self) -> int:
        return -(-self.num_parts // PARTS_PER_FOLDER)

    def _not_gathered(self) -> list[int]:
        """Numbers of the folders whose records are not gathered yet."""
        gathered = _numbers(self.folder.names(RECORDS), ".jsonl")
        return [number for number in range(self._num_folders()) if number not in gathered]

    def _parts_of(self, number: int) -> range:
        start = number * PARTS_PER_FOLDER
        return range(start, min(start + PARTS_PER_FOLDER, self.num_parts))


def check_options(recorded: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Raises if a token set is being made, or was made, with other options."""
    for name in {**recorded, **current}:
        before, now = recorded.get(name), current.get(name)
        if before != now:
            raise ValueError(
                f"a token set must be made with the same options throughout, but in `{where}` `{name}` was "
                f"{before!r:.80} and is now {now!r:.80}. Use the same value, or another folder."
            )


def _own_claim(**fields: Any) -> Claim:
    process = psutil.Process()
    return Claim(socket.gethostname(), process.pid, process.create_time(), time.time(), **fields)


def _to_json(record: PartRecord | Claim) -> bytes:
    return json.dumps(asdict(record)).encode()


def _subfolder(number: int) -> str:
    return f"{RECORDS}/{number:04}"


def _record_name(part: int) -> str:
    return f"{_subfolder(part // PARTS_PER_FOLDER)}/{part:07}.json"


def _gathered_name(number: int) -> str:
    return f"{_subfolder(number)}.jsonl"


def _claim_name(part: int) -> str:
    return f"{_subfolder(part // PARTS_PER_FOLDER)}/{part:07}.claim"


def _numbers(names: set[str], suffix: str) -> set[int]:
    return {int(name.removesuffix(suffix)) for name in names if name.endswith(suffix)}
