"""The output folder of a command: what its runs have written there, from which inputs and with which options."""

import argparse
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svqvae_files.errors import explained
from svqvae_files.file_names import DEFAULT_MODEL
from svqvae_files.identity import CONTEXT_MODEL_FILE, InputIdentity, model_digest, weights_digest
from svqvae_files.outputs import delete_temporary
from svqvae_files.records import RecordError, RunRecord

# Arguments that do not change the content of an output.
NOT_OPTIONS = {"command", "device", "inputs", "output", "overwrite", "parser", "run", "batch_size", "max_images"}


@dataclass(frozen=True)
class Source:
    """What an output is made from.

    Args:
        folder (`str`): Folder in which the input was found, relative to the output folder; empty if the input is no
            file, such as a caption.
        input ([`InputIdentity`]): The input, by its path below that folder.
    """

    folder: str
    input: InputIdentity


@dataclass(frozen=True)
class Leftovers:
    """Outputs of earlier runs that do not belong to this one.

    Args:
        deleted (`list[Path]`): Files that were deleted.
        changed (`list[Path]`): Files that stay, because they have changed since they were written.
    """

    deleted: list[Path]
    changed: list[Path]


class OutputFolder:
    """A folder that a command writes to, with the record of its runs there.

    Args:
        args (`argparse.Namespace`): Parsed command line.
        default_model (`str`, defaults to the small bundled model): Model of the command if `--model` is left out.

    Raises:
        OSError: The record or a model cannot be read.
        ValueError: A run with other options wrote to the folder, and `--overwrite` is not given; or the record or a
            model is damaged.
    """

    def __init__(self, args: argparse.Namespace, default_model: str = DEFAULT_MODEL):
        self.path: Path = args.output
        self.overwrite: bool = args.overwrite
        self.record = RunRecord(self.path / f".svqvae-{_command_name(args.parser)}.jsonl")
        self.options = _recorded_options(args, default_model)
        if not self.overwrite:
            self.record.check_options(self.options)
        self._is_started = False
        self._lock_descriptor: int | None = None  # file descriptor of this folder, which is open during the run
        self._real_path = os.path.realpath(self.path)  # of this folder, without links
        self._recorded_paths: dict[Path, str] = {}  # results of `_recorded_path`, by the folder of the input
        self._existing_folders: set[Path] = set()  # folders of outputs that this run has created or found

    def source(self, folder: Path, identity: InputIdentity) -> Source:
        """What an output is made from, as it is recorded."""
        return Source(self._recorded_path(folder), identity)

    def _recorded_path(self, folder: Path) -> str:
        """Path of the folder of an input, relative to this folder, such as `../photos`.

        It is computed once per folder, because many inputs lie in the same one, and resolving links is slow.
        """
        if folder not in self._recorded_paths:
            self._recorded_paths[folder] = os.path.relpath(os.path.realpath(folder), self._real_path)
        return self._recorded_paths[folder]

    def holds(self, outputs: Iterable[Path], source: Source) -> bool:
        """Whether all outputs of an input are finished and were made from it as it is now.

        Raises:
            ValueError: An output exists, but no record names it; or it has changed, or was made from another input.
        """
        are_current = []
        for output in outputs:  # all of them, because each is checked for errors
            self._check_recorded(output)
            is_current = not self.overwrite and self._is_current(output, source)
            are_current.append(is_current)
        return all(are_current)

    def _check_recorded(self, output: Path) -> None:
        """Raises ValueError if an output exists, but no record names it."""
        is_recorded = self._name(output) in self.record.outputs
        if os.path.lexists(output) and not is_recorded:
            raise ValueError(
                f"`{output}` already exists, but no run of this command has written it. Move it, or use another "
                "--output."
            )

    def _is_current(self, output: Path, source: Source) -> bool:
        """Whether an output is finished and was made from an input as it is now.

        Raises:
            ValueError: The output has changed, or was made from an input in another folder.
        """
        name = self._name(output)
        if not self.record.is_finished(name):
            return False
        if self.record.has_changed(name):
            raise ValueError(
                f"`{output}` has changed since it was written. Delete it, or pass --overwrite to make all outputs "
                "again."
            )
        recorded_source = self._recorded_source(name)
        is_in_same_folder = recorded_source.folder == source.folder
        is_same_input = recorded_source.input == source.input  # by name, size and version
        if is_in_same_folder and is_same_input:
            return True
        if is_in_same_folder:
            # The input has changed since. Or another input had the same output, such as `a.png` in place of `a.jpg`.
            return False
        has_moved = is_same_input and self._may_have_moved(recorded_source)
        if has_moved:
            return True
        raise ValueError(
            f"`{output}` was made from another input, `{self._path_of(recorded_source)}`. Pass --overwrite to "
            "replace it, or use another --output."
        )

    def begin(self, outputs: Sequence[Path], source: Source, all_outputs: Iterable[Path]) -> None:
        """Records that outputs are about to be written. The first call starts the run.

        Args:
            outputs (`Sequence[Path]`): The outputs of an input.
            source ([`Source`]): The input.
            all_outputs (`Iterable[Path]`): All outputs of the run, which the first call deletes with `--overwrite`:
                they must not count as finished if the run is interrupted.

        Raises:
            OSError: The folder cannot be written.
            RecordError: A run with other options has started in the folder.
        """
        if not self._is_started:
            self._lock()
            self._start(all_outputs)
            self._is_started = True
        for output in outputs:
            self._make_folder(output.parent)
        record_of_source = {"folder": source.folder, "input": vars(source.input)}
        self.record.begin([self._name(output) for output in outputs], record_of_source)

    def _make_folder(self, folder: Path) -> None:
        if folder in self._existing_folders:
            return
        with explained(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        self._existing_folders.add(folder)

    def close(self) -> None:
        """Ends the run. The folder no longer counts as used by it."""
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def recorded_outputs(self) -> list[Path]:
        """Outputs of all runs."""
        return [self.path / name for name in self.record.outputs]

    def finish(self, outputs: Sequence[Path]) -> None:
        """Records the content of outputs that were written."""
        self.record.finish([self._name(output) for output in outputs])

    def _start(self, all_outputs: Iterable[Path]) -> None:
        """Records the options of the run. With `--overwrite`, deletes the outputs that it will make again."""
        earlier_options = self.record.options
        options_differ = earlier_options is not None and earlier_options != self.options
        if self.overwrite and options_differ:
            self.record.start_over(self.options)  # deletes all recorded outputs, because none has these options
            return
        self.record.start(self.options)
        if self.overwrite:
            self._delete_recorded(all_outputs)

    def _delete_recorded(self, outputs: Iterable[Path]) -> None:
        """Deletes those of the outputs that earlier runs have written. All other files of earlier runs stay."""
        recorded_names = []
        for output in outputs:
            name = self._name(output)
            if name in self.record.outputs:
                recorded_names.append(name)
        self.record.delete(recorded_names)

    def _lock(self) -> None:
        """Marks the folder as used until [`close`], and deletes temporary files of runs that were killed."""
        with explained(self.path, "written"):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        self._lock_descriptor = descriptor
        self._delete_temporary(descriptor)
        # Many runs can have a shared lock. It tells later runs that this one uses the folder.
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _delete_temporary(self, descriptor: int) -> None:
        """Deletes temporary files of runs that were killed, unless another run uses the folder.

        An exclusive lock tells that no other run uses the folder, because each run has a shared lock. So all temporary
        files in it are of runs that were killed.
        """
        with suppress(OSError):  # another run uses the folder, the file system has no locks, or a file stays
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in self._folders_of_unfinished():
                delete_temporary(folder.glob("*.tmp"))

    def _folders_of_unfinished(self) -> set[Path]:
        """Folders of the outputs that a run has begun and not finished."""
        folders = set()
        for name, output in self.record.outputs.items():
            if output.identity is None:
                folders.add((self.path / name).parent)
        return folders

    def delete_leftovers(self, outputs_by_source: Mapping[Source, Sequence[Path]]) -> Leftovers:
        """Deletes outputs of earlier runs whose inputs are gone, or have other outputs now.

        Outputs that have changed since they were written stay. So do all outputs of a folder that is gone as a whole,
        because it may have been moved.

        Args:
            outputs_by_source (`Mapping[Source, Sequence[Path]]`): Outputs of each input of this run. There are none
                for an input that cannot be read. Its earlier outputs stay.
        """
        current_names = set()
        paths_of_inputs = set()
        for source, outputs in outputs_by_source.items():
            can_be_read = len(outputs) > 0
            if can_be_read:
                paths_of_inputs.add(self._path_of(source))
            for output in outputs:
                current_names.add(self._name(output))
        leftovers = []
        for name in self.record.outputs:
            if name in current_names:
                continue
            source = self._recorded_source(name)
            has_other_outputs = self._path_of(source) in paths_of_inputs
            if has_other_outputs or self._is_gone(source):
                leftovers.append(name)
        return self._delete(leftovers)

    def delete_versions_before(self, source: Source) -> Leftovers:
        """Deletes the images of earlier versions of a token set, unless they have changed since they were written.

        Args:
            source ([`Source`]): The token set: its folder, and the digest of its content.
        """
        outdated = []
        for name in self.record.outputs:
            recorded_source = self._recorded_source(name)
            is_same_folder = recorded_source.folder == source.folder
            is_same_content = recorded_source.input.version == source.input.version  # the digest of the content
            if is_same_folder and not is_same_content:
                outdated.append(name)
        return self._delete(outdated)

    def _delete(self, names: Sequence[str]) -> Leftovers:
        """Deletes recorded outputs, unless they have changed since they were written."""
        unchanged = []
        leftovers = Leftovers([], [])
        for name in names:
            if self.record.has_changed(name):
                leftovers.changed.append(self.path / name)
            else:
                unchanged.append(name)
                leftovers.deleted.append(self.path / name)
        if unchanged:
            self.record.delete(unchanged)
        return leftovers

    def _recorded_source(self, name: str) -> Source:
        """What a recorded output was made from."""
        entry = self.record.outputs[name].source
        try:
            return Source(entry["folder"], InputIdentity(**entry["input"]))
        except (KeyError, TypeError) as error:
            raise RecordError(f"`{self.record.path}` must be the record of a run, but is damaged: {error}.") from error

    def _path_of(self, source: Source) -> str:
        """Path of an input. Links are not resolved, as they are not in its name."""
        return os.path.normpath(os.path.join(self._real_path, source.folder, source.input.name))

    def _is_gone(self, source: Source) -> bool:
        """Whether an input was deleted from its folder. An input that is no file in a folder is never gone."""
        if not source.folder or not source.input.name:
            return False
        return self._has_folder(source) and not os.path.lexists(self._path_of(source))

    def _may_have_moved(self, source: Source) -> bool:
        """Whether an input may be the same one in another folder.

        Files of two folders may agree in name, size and time. So a file may have moved only if its folder is gone. A
        token set has no name in its folder, because a digest of its content identifies it in any place.
        """
        is_token_set = not source.input.name
        return is_token_set or not self._has_folder(source)

    def _has_folder(self, source: Source) -> bool:
        """Whether the folder in which an input was found is still there."""
        return os.path.isdir(os.path.join(self._real_path, source.folder))

    def _name(self, output: Path) -> str:
        """Name of an output in the record: its path below the folder."""
        return os.fspath(output).removeprefix(os.path.join(self.path, ""))


def _command_name(parser: argparse.ArgumentParser) -> str:
    """Name of a command, such as `encode`. The program name of its parser is `svqvae encode`."""
    return parser.prog.split()[-1]


def _recorded_options(args: argparse.Namespace, default_model: str) -> dict[str, Any]:
    """Arguments that change the content of outputs, with digests of models, as JSON holds them."""
    options = {}
    for name, value in vars(args).items():
        if name not in NOT_OPTIONS:
            options[name] = value
    folder = _model_folder(args.model or default_model)
    options["model"] = model_digest(folder)
    if options.get("adapter") is not None:
        options["adapter"] = model_digest(_model_folder(options["adapter"]))
    if options.get("compress"):
        options["context_model"] = _context_model_digest(folder)
    return json.loads(json.dumps(options))


def _model_folder(source: str) -> Path:
    """Folder with the files of a model, which is a folder or on the Hub."""
    if os.path.isdir(source):
        return Path(source)
    from svqvae_files.hub import model_folder  # takes half a second to import

    return model_folder(source)


def _context_model_digest(folder: Path) -> str | None:
    """Digest of the context model in the folder of a model; `None` if it is absent, an error once it is loaded."""
    path = folder / CONTEXT_MODEL_FILE
    if not path.exists():
        return None
    return weights_digest(path)
