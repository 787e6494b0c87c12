"""Runs over many inputs. Finished outputs are kept, unusable inputs are skipped, and a summary ends each run."""

import argparse
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from svqvae_cli.errors import check_none_skipped, one_line
from svqvae_cli.files import InputFile, check_file, check_output
from svqvae_cli.output_folder import Leftovers, OutputFolder, Source
from svqvae_files.file_names import DEFAULT_MODEL
from svqvae_files.identity import InputIdentity, input_identity
from svqvae_files.records import RecordError

Item = TypeVar("Item", bound=Hashable)
Content = TypeVar("Content")


class Run(Generic[Item]):
    """A run of a command over inputs, which adds to an earlier run with the same options.

    An output of an earlier run is kept if it was made from the same input with the same options and model, and has
    not changed since. `--overwrite` makes all of them again.

    Args:
        args (`argparse.Namespace`): Parsed command line.
        targets (`Mapping[Item, Sequence[Path]]`): Output files of each input. An input, or item, is an [`InputFile`]
            or a text, such as a caption.
        noun (`str`): Plural noun for the output files.
        default_model (`str`, defaults to the small bundled model): Model of the command if `--model` is left out.

    Raises:
        ValueError: The output folder cannot be written; an output file is an input, or is written for two inputs; or
            it exists, but was not made by this command from this input with the same options.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        targets: Mapping[Item, Sequence[Path]],
        noun: str,
        default_model: str = DEFAULT_MODEL,
    ):
        check_output(args.output)
        self.targets = targets
        self.noun = noun
        self._check_clashes()
        # Knows the outputs of earlier runs, and what they were made from.
        self.folder = OutputFolder(args, default_model)
        self.sources: dict[Item, Source] = {}  # each input as the folder records it
        for item in targets:
            self.sources[item] = self._source(item)
        self.todo = [item for item in targets if not self._is_done(item)]  # inputs whose outputs are missing
        self.num_done = len(targets) - len(self.todo)  # inputs
        self.num_written = 0  # output files of this run
        self.num_skipped = 0  # inputs that could not be used
        self._unfinished_outputs: Sequence[Path] = ()  # of the input in work, which are being written

    def _check_clashes(self) -> None:
        """Raises if an output is an input, or is written for two inputs."""
        real_folders: dict[Path, Path] = {}
        input_paths = set()
        for item in self.targets:
            if isinstance(item, InputFile):
                input_paths.add(_real_path(item.path, real_folders))
        writers: dict[Path, Item] = {}
        for item, outputs in self.targets.items():
            for output in outputs:
                if _real_path(output, real_folders) in input_paths:
                    raise ValueError(f"the input `{output}` would be overwritten. Use another --output.")
                if output in writers and writers[output] != item:
                    first_writer = _name(writers[output])
                    raise ValueError(f"`{first_writer}` and `{_name(item)}` would both write `{output}`. Rename one.")
                writers[output] = item

    def _source(self, item: Item) -> Source:
        """An input, a file or a text, as the record of the output folder names it."""
        if isinstance(item, InputFile):
            return self._source_of_file(item)
        return _source_of_text(str(item))

    def _source_of_file(self, file: InputFile) -> Source:
        """An input file as the record names it."""
        try:
            identity = input_identity(file.folder, str(file.name))
        except OSError:  # a broken link has only a name; `read` will skip it
            identity = InputIdentity(name=file.name.as_posix(), size=0, version="")
        return self.folder.source(file.folder, identity)

    def _is_done(self, item: Item) -> bool:
        """Whether earlier runs have made all outputs of an input."""
        outputs = self.targets[item]
        return len(outputs) > 0 and self.folder.holds(outputs, self.sources[item])

    def __enter__(self) -> "Run[Item]":
        outputs_by_source = {source: self.targets[item] for item, source in self.sources.items()}
        print_leftovers(self.folder.delete_leftovers(outputs_by_source))
        if self.num_done:
            print(f"resumed: {self.num_done:,} of {len(self.targets):,} were there")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Prints the summary, unless an error ended the run before its first output.

        Raises:
            SkippedError: Some inputs were skipped.
            ValueError: All inputs were skipped.
        """
        self.folder.close()
        if kind is None:  # no error has ended the run
            total = len(self.targets)
            if self.num_skipped == total:
                raise ValueError(f"none of the {total} inputs could be used, for the reasons above.")
            self._print_written()
            check_none_skipped(self.num_skipped, total)  # raises SkippedError
            return
        was_interrupted = not issubclass(kind, Exception)  # by Ctrl-C or a signal
        if was_interrupted:
            self._print_written()
            message = f"`{self.folder.path}` is not complete. Run the same command again to resume."
            print(f"svqvae: {message}", file=sys.stderr)
        elif self.num_written:
            self._print_written()

    def _print_written(self) -> None:
        print(f"written  {self.folder.path} ({self.noun}: {self.num_written})")

    def files(self) -> Iterator[Item]:
        """Yields each input whose outputs are missing. Shows a progress bar on a terminal."""
        with tqdm(total=len(self.targets), initial=self.num_done, unit="image", disable=None) as bar:
            for item in self.todo:
                yield item
                bar.update()

    def read(self: "Run[InputFile]", read: Callable[[Path], Content]) -> Iterator[tuple[InputFile, Content]]:
        """Yields each input whose outputs are missing, and its content. Skips inputs that cannot be read."""
        for item in self.files():
            with self._skipping(item, (OSError, ValueError)):
                check_file(item.path)
                yield item, read(item.path)

    @contextmanager
    def attempt(self, item: Item, *errors: type[Exception]) -> Iterator[None]:
        """Runs a block that writes the outputs of an input, and then records that they are finished.

        Skips the input if the block raises one of the errors, or runs out of memory. The only input of a run is not
        skipped: its error is raised.

        Args:
            item: The input.
            *errors (`type[Exception]`): Errors about a single input.
        """
        try:
            with self._skipping(item, errors):
                yield  # the block calls `outputs`, which sets the unfinished outputs, and writes them
                self._finish()
        finally:
            # If the block has failed, its outputs are not written, and must not be finished with those of the next.
            self._unfinished_outputs = ()

    @contextmanager
    def _skipping(self, item: Item, errors: tuple[type[Exception], ...]) -> Iterator[None]:
        """Skips an input if the block raises one of these errors, or runs out of memory."""
        try:
            yield
        except RecordError:  # is a ValueError, but about the whole run: another run has started in the folder
            raise
        except errors as error:
            self._skip(error, str(error))
        except (MemoryError, RuntimeError) as error:
            from svqvae_hf.tokens.image_tokens import OUT_OF_MEMORY, is_out_of_memory  # imports torch, which is slow

            if not is_out_of_memory(error):
                raise
            self._skip(error, f"`{_name(item)}`: {OUT_OF_MEMORY}")

    def outputs(self, item: Item) -> Sequence[Path]:
        """Output files of an input, which the caller writes next, in a block of [`attempt`]. Creates their folder."""
        outputs = self.targets[item]
        self.folder.begin(outputs, self.sources[item], self._all_outputs())
        self._unfinished_outputs = outputs
        return outputs

    def _all_outputs(self) -> Iterator[Path]:
        for outputs in self.targets.values():
            yield from outputs

    def _finish(self) -> None:
        """Records that the unfinished outputs are written."""
        if self._unfinished_outputs:
            self.folder.finish(self._unfinished_outputs)
            self.num_written += len(self._unfinished_outputs)

    def _skip(self, error: Exception, reason: str) -> None:
        """Counts an input as skipped and prints the reason. Raises the error of the only input of a run."""
        if len(self.targets) == 1:
            raise error
        self.num_skipped += 1
        tqdm.write(f"svqvae: skipped: {one_line(reason)}", sys.stderr)  # above the progress bars


def _source_of_text(text: str) -> Source:
    """A text, such as a caption, as the record names it. It lies in no folder, and has no version."""
    return Source(folder="", input=InputIdentity(name=text, size=0, version=""))


def print_leftovers(leftovers: Leftovers) -> None:
    """Says which outputs of earlier runs were deleted, and which have changed and stay."""
    if leftovers.deleted:
        example = one_line(str(leftovers.deleted[0]))
        print(f"deleted  {len(leftovers.deleted):,} outputs of earlier inputs, such as {example}")
    if leftovers.changed:
        example = one_line(str(leftovers.changed[0]))
        print(f"kept     {len(leftovers.changed):,} outputs of earlier inputs that have changed, such as {example}")


def _real_path(path: Path, real_folders: dict[Path, Path]) -> Path:
    """Path whose folders are not links. The file itself may be a link, because writing the file replaces the link.

    Args:
        path (`Path`): Path of a file.
        real_folders (`dict[Path, Path]`): Resolved folders by their paths, to which the folder of the file is added.
    """
    folder = path.parent
    if folder not in real_folders:
        real_folders[folder] = folder.resolve()
    return real_folders[folder] / path.name


def _name(item: Any) -> str:
    """An input in messages: the path of a file, or a text."""
    if isinstance(item, InputFile):
        return str(item.path)
    return str(item)
