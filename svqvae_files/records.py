"""Records of runs: what a folder holds, and what it was made from.

A record is a file of JSON lines. Its first line holds the options of the run. Each output has a line before it is
written and another one afterwards, so that a run which is killed at any moment leaves nothing that no record names.
Lines are appended under a lock, so that several runs with the same options can add to one folder.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from svqvae_files.errors import explained
from svqvae_files.identity import OutputIdentity, output_identity
from svqvae_files.json_files import parse_json_object


class RecordError(ValueError):
    """A record is damaged, or belongs to a run with other options."""


@dataclass(frozen=True)
class RecordedOutput:
    """An output of a run.

    Args:
        source (`dict[str, Any]`): What it was made from, as JSON holds it.
        identity ([`OutputIdentity`], *optional*): Its content; `None` if the run was interrupted while writing it.
    """

    source: dict[str, Any]
    identity: OutputIdentity | None


class RunRecord:
    """The record of the runs that wrote to a folder with the same options.

    Args:
        path (`Path`): File of the record, in the folder of the outputs. It need not exist.

    Attributes:
        options (`dict[str, Any]`, *optional*): Options of the runs; `None` if there was none.
        outputs (`dict[str, RecordedOutput]`): Outputs by their paths, relative to the folder.

    Raises:
        OSError: The file cannot be read.
        RecordError: The file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.options: dict[str, Any] | None = None
        self.outputs: dict[str, RecordedOutput] = {}
        self._first_line = b""
        self._bytes_read = 0  # of complete lines
        if path.exists():
            with explained(path, "read"), open(path, "rb", buffering=0) as file:
                self._read(file)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises RecordError if a run with other options has written to the folder.

        Args:
            options (`Mapping[str, Any]`): Options that change the content of outputs, as JSON holds them.
        """
        if self.options is None:
            return
        for name in sorted(set(self.options) | set(options)):
            recorded = self.options.get(name)
            current = options.get(name)
            if recorded != current:
                raise RecordError(
                    f"`{self.path.parent}` was made with other options: `{name}` was {recorded}, got {current}. "
                    "Use another --output, or pass --overwrite, which deletes the outputs that are there."
                )

    def start(self, options: Mapping[str, Any]) -> None:
        """Records the options of a run, unless a run with the same options has recorded them.

        Args:
            options (`Mapping[str, Any]`): Options that change the content of outputs, as JSON holds them.

        Raises:
            OSError: The record cannot be written.
            RecordError: A run with other options has started in the folder, even a moment ago.
        """
        with self._locked() as file:
            self._read(file)
            self.check_options(options)
            if self.options is None:
                self._append(file, [{"options": dict(options)}])

    def start_over(self, options: Mapping[str, Any]) -> None:
        """Deletes all outputs that the record names, and records the options of a new run. Deletes nothing else.

        Args:
            options (`Mapping[str, Any]`): Options that change the content of outputs, as JSON holds them.

        Raises:
            OSError: An output cannot be deleted, or the record cannot be written.
        """
        with self._locked() as file:
            self._read(file)
            for output in self.outputs:
                self._delete_file(output)
            file.truncate(0)
            self._forget()
            self._append(file, [{"options": dict(options)}])

    def begin(self, outputs: Iterable[str], source: Mapping[str, Any]) -> None:
        """Records that outputs are about to be written.

        Args:
            outputs (`Iterable[str]`): Their paths, relative to the folder.
            source (`Mapping[str, Any]`): What they are made from, as JSON holds it.

        Raises:
            OSError: The record cannot be written.
            RecordError: A run with other options has replaced the record.
        """
        entries: list[dict[str, Any]] = []
        for output in outputs:
            entries.append({"output": output, "source": dict(source), "identity": None})
        self._add(entries)

    def finish(self, outputs: Iterable[str]) -> None:
        """Records the content of outputs that were written, see [`~RunRecord.begin`]."""
        entries = []
        for output in outputs:
            source = self.outputs[output].source
            identity = output_identity(self._file(output))
            entries.append({"output": output, "source": source, "identity": vars(identity)})
        self._add(entries)

    def delete(self, outputs: Iterable[str]) -> None:
        """Deletes outputs that the record names, and records that."""
        entries = []
        for output in outputs:
            self._delete_file(output)
            entries.append({"deleted": output})
        self._add(entries)

    def is_finished(self, output: str) -> bool:
        """Whether an output was written and is there. It may have changed since, see [`~RunRecord.has_changed`]."""
        recorded = self.outputs.get(output)
        if recorded is None or recorded.identity is None:
            return False
        return self._file(output).exists()

    def has_changed(self, output: str) -> bool:
        """Whether a finished output has another size or checksum than the record says."""
        if not self.is_finished(output):
            return False
        recorded = self.outputs[output].identity
        file = self._file(output)
        if recorded is None or not file.is_file():
            return True
        has_other_size = file.stat().st_size != recorded.size
        return has_other_size or output_identity(file) != recorded

    def _file(self, output: str) -> Path:
        """Path of an output."""
        return self.path.parent / output

    def _delete_file(self, output: str) -> None:
        with explained(self._file(output), "deleted"):
            self._file(output).unlink(missing_ok=True)

    def _add(self, entries: list[dict[str, Any]]) -> None:
        """Appends entries to the record, one line each, after what other runs have appended."""
        with self._locked() as file:
            self._read(file)
            self._append(file, entries)

    def _append(self, file: FileIO, entries: list[dict[str, Any]]) -> None:
        """Appends entries to a record whose lines were read, and changes the state by them."""
        lines = [json.dumps(entry).encode() + b"\n" for entry in entries]
        with explained(self.path, "written"):
            # `_read` has read up to the last whole line. A run that was killed may have written a part of a line.
            has_part_of_line = os.fstat(file.fileno()).st_size > self._bytes_read
            if has_part_of_line:
                file.truncate(self._bytes_read)
            _write_all(file, b"".join(lines))
        # The next call of `_read` starts after the lines that were written here.
        for entry, line in zip(entries, lines, strict=True):
            self._apply(entry)
            self._note_as_read(line)

    def _read(self, file: FileIO) -> None:
        """Reads the lines that were appended since the last call, by this run or by another one."""
        self._check_first_line(file)
        file.seek(self._bytes_read)
        lines = file.readall().split(b"\n")
        lines.pop()  # empty, or a part of a line if the run that wrote it was killed
        for line in lines:
            self._parse(line)
            self._note_as_read(line + b"\n")

    def _check_first_line(self, file: FileIO) -> None:
        """Raises RecordError if a run with other options has replaced the lines that were read."""
        file.seek(0)
        if file.read(len(self._first_line)) != self._first_line:
            raise RecordError(f"`{self.path.parent}` was emptied by a run with --overwrite. Use another --output.")

    def _note_as_read(self, line: bytes) -> None:
        """Notes that the state holds a line, so that [`_read`] goes on after it."""
        if self._bytes_read == 0:
            self._first_line = line
        self._bytes_read += len(line)

    def _parse(self, line: bytes) -> None:
        """Changes the state by a line. Raises RecordError if the line is damaged."""
        try:
            self._apply(parse_json_object(line, self.path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(
                f"`{self.path}` must be the record of a run, but is damaged. Use another --output, or delete the "
                "folder to start over."
            ) from error

    def _apply(self, entry: Mapping[str, Any]) -> None:
        """Changes the state by an entry: the options, an output that was deleted, or an output that was written."""
        if self.options is None:  # the first line
            self.options = dict(entry["options"])
            return
        if "options" in entry:
            raise ValueError("no line but the first may have the options.")
        if "deleted" in entry:
            self.outputs.pop(str(entry["deleted"]), None)  # two runs may have deleted the same output
            return
        output = entry["output"]
        may_be_outside = output.startswith("/") or ".." in output.split("/")
        if may_be_outside:
            # A run deletes outputs that the record names, so a damaged record must not name a file elsewhere.
            raise ValueError(f"an output must lie in the folder, got {output}.")
        identity = None
        if entry["identity"] is not None:
            identity = OutputIdentity(**entry["identity"])
        self.outputs[output] = RecordedOutput(dict(entry["source"]), identity)

    def _forget(self) -> None:
        """Returns to the state before anything was read."""
        self.options = None
        self.outputs = {}
        self._first_line = b""
        self._bytes_read = 0

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        """Opens the record under its lock, which ends with the process at the latest. Creates it if necessary."""
        with self._open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _open(self) -> FileIO:
        """Opens the record without a buffer, to read it and to append to it. Creates it if necessary."""
        with explained(self.path, "written"):
            try:
                return open(self.path, "a+b", buffering=0)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return open(self.path, "a+b", buffering=0)


def _write_all(file: FileIO, content: bytes) -> None:
    """Writes bytes to a file without a buffer, which may take a part of them at once."""
    num_written = 0
    while num_written < len(content):
        num_written += file.write(content[num_written:])
