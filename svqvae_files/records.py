"""Records of runs: what a folder holds, and what it was made from.

A record is a file of JSON lines. Its first line holds the options of the run. Each output has a line before it is
written and another one afterwards, so that a run which is killed at any moment leaves nothing that no record names.
Lines are appended under a lock, so that several runs with the same options can add to one folder.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svqvae_files.errors import explained
from svqvae_files.identity import OutputIdentity, output_identity
from svqvae_files.json_files import parse_json_object


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
        ValueError: The file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.options: dict[str, Any] | None = None
        self.outputs: dict[str, RecordedOutput] = {}
        with explained(path, "read"):
            content = path.read_bytes() if path.exists() else b""
        self._parse(content)

    def _parse(self, content: bytes) -> None:
        whole_lines = content.split(b"\n")[:-1]  # a run that was killed may leave a part of a line behind the last
        for line in whole_lines:
            entry = parse_json_object(line, self.path)
            try:
                if "options" in entry:
                    self.options = dict(entry["options"])
                    continue
                identity = entry["identity"]
                self.outputs[entry["output"]] = RecordedOutput(
                    source=dict(entry["source"]), identity=None if identity is None else OutputIdentity(**identity)
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"`{self.path}` must be the record of a run, but is damaged: {error}.") from error

    def start(self, options: Mapping[str, Any]) -> None:
        """Records the options of a run, unless a run with the same options has recorded them.

        Args:
            options (`Mapping[str, Any]`): Options that change the content of outputs, as JSON holds them.

        Raises:
            ValueError: A run with other options has started in the folder, even a moment ago.
        """
        with self._locked():
            self._parse(self.path.read_bytes())
            if self.options is None:
                self._append({"options": dict(options)})
                self.options = dict(options)
            for name in sorted({*self.options, *options}):
                recorded, current = self.options.get(name), options.get(name)
                if recorded != current:
                    raise ValueError(
                        f"`{self.path.parent}` was made with other options: `{name}` was {recorded}, got {current}. "
                        "Pass --overwrite to replace it, or use another --output."
                    )

    def delete_outputs(self) -> None:
        """Deletes all outputs that the record names, and then the record. Nothing else is deleted."""
        for name in self.outputs:
            (self.path.parent / name).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.options = None
        self.outputs = {}

    def begin(self, output: str, source: Mapping[str, Any]) -> None:
        """Records that an output is about to be written."""
        self._add(output, RecordedOutput(dict(source), None))

    def finish(self, output: str) -> None:
        """Records the content of an output that was written."""
        identity = output_identity(self.path.parent / output)
        self._add(output, RecordedOutput(self.outputs[output].source, identity))

    def holds(self, output: str, source: Mapping[str, Any]) -> bool:
        """Whether an output is there as it was recorded, and was made from this source."""
        recorded = self.outputs.get(output)
        if recorded is None or recorded.identity is None or recorded.source != source:
            return False
        path = self.path.parent / output
        if not path.is_file() or path.stat().st_size != recorded.identity.size:
            return False
        return output_identity(path) == recorded.identity

    def _add(self, output: str, recorded: RecordedOutput) -> None:
        self.outputs[output] = recorded
        with self._locked():
            self._append({"output": output} | asdict(recorded))

    def _append(self, entry: Mapping[str, Any]) -> None:
        """Appends a line, in place of the part of a line that a killed run may have left."""
        with explained(self.path, "written"), open(self.path, "r+b") as file:
            content_end = file.seek(0, os.SEEK_END)
            if content_end:
                file.seek(content_end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
            file.write(json.dumps(entry).encode() + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the record, which ends with the process at the latest."""
        with explained(self.path, "written"), open(self.path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
