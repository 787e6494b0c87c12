"""Runs over many inputs. Finished outputs are kept, unusable inputs are skipped, and a summary ends each run."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from svqvae_cli.errors import check_none_skipped, one_line, prefix_errors
from svqvae_cli.files import PACKAGE, TOKEN_SUFFIXES, InputFile, check_absent, check_file, check_output

Item = TypeVar("Item", bound=Hashable)
Content = TypeVar("Content")

# Arguments that do not change the content of an output.
NOT_OPTIONS = {"command", "device", "inputs", "output", "overwrite", "parser", "run", "batch_size", "max_images"}


class Run(Generic[Item]):
    """A run of a command over inputs, which resumes an earlier run with the same options.

    The options and the input of each output are recorded in the output folder. An output of such a run is kept if it
    is complete and not older than its input and the model. `--overwrite` makes all of them again.

    Args:
        args (`argparse.Namespace`): Parsed command line.
        targets (`Mapping[Item, Sequence[Path]]`): Output files of each input.
        made (`str`): Plural noun for the output files.

    Raises:
        ValueError: The output folder cannot be written; an output file is an input, or is written for two inputs; or
            it exists, but was not made from this input with the same options.
    """

    def __init__(self, args: argparse.Namespace, targets: Mapping[Item, Sequence[Path]], made: str):
        self.output, self.targets, self.made, self.overwrite = args.output, targets, made, args.overwrite
        self.record = self.output / f".svqvae-{args.parser.prog.split()[-1]}.json"
        options = {name: value for name, value in vars(args).items() if name not in NOT_OPTIONS}
        options |= {name: _source(options[name]) for name in ("model", "adapter") if options.get(name)}
        self.options = json.loads(json.dumps(options))  # as they are read again
        self.sources = {os.path.relpath(path, self.output): _source(key) for key in targets for path in targets[key]}
        models = options.get("model") or PACKAGE, options.get("adapter")
        self.changed = max(_changed(Path(name)) for name in models if name)
        self.is_recorded = False
        self.written = self.skipped = 0
        self.pending = 0  # files of the input in work
        check_output(self.output)
        self._check_clashes()
        self._check_earlier()
        self.left = [item for item, paths in targets.items() if not self.is_done(paths, item)]
        self.done = len(targets) - len(self.left)

    def _check_clashes(self) -> None:
        sources = {item.path.resolve() for item in self.targets if isinstance(item, InputFile)}
        writers: dict[Path, Item] = {}
        for item, paths in self.targets.items():
            for path in paths:
                if path.resolve() in sources:
                    raise ValueError(f"the input `{path}` would be overwritten. Use another --output.")
                other = writers.setdefault(path, item)
                if other != item:
                    raise ValueError(f"`{_name(other)}` and `{_name(item)}` would both write `{path}`. Rename one.")

    def is_done(self, paths: Sequence[Path], item: Item) -> bool:
        """Whether outputs are to be kept: they are complete, and not older than their input and the model."""
        changed, found = max(self.changed, _changed(Path(_name(item)))), [path for path in paths if path.exists()]
        is_new = all(path.stat().st_mtime_ns >= changed and _is_whole(path) for path in found)
        return not self.overwrite and 0 < len(paths) == len(found) and is_new

    def _check_earlier(self) -> None:
        """Raises if there are outputs that were not made from the same inputs with the same options."""
        existing = [name for name in self.sources if (self.output / name).exists()]
        if self.overwrite or not (existing or self.record.exists()):
            return
        if not self.record.exists():
            check_absent(self.output / existing[0])
        with prefix_errors(self.record):
            earlier = json.loads(self.record.read_text())
        sources = earlier.pop("sources", {})
        for output in existing:
            now, before = self.options | {"input": self.sources[output]}, earlier | {"input": sources.get(output)}
            for name in [name for name in now if now[name] != before.get(name)]:
                raise ValueError(
                    f"`{self.output / output}` was made with other options: `{name}` was {before.get(name)}, got "
                    f"{now[name]}. Pass --overwrite to replace it, or use another --output."
                )
        self.sources = (sources if earlier == self.options else {}) | self.sources

    def __enter__(self) -> "Run[Item]":
        if self.done:
            print(f"resumed: {self.done:,} of {len(self.targets):,} were there")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Prints the summary, unless an error ended the run before its first output.

        Raises:
            SkippedError: Some inputs were skipped.
            ValueError: All inputs were skipped.
        """
        total = len(self.targets)
        if kind is None and self.skipped == total:
            raise ValueError(f"none of the {total} inputs could be used, for the reasons above.")
        interrupted = kind is not None and not issubclass(kind, Exception)
        if kind is None or interrupted or self.written:
            print(f"written  {self.output} ({self.made}: {self.written})")
        if interrupted:
            print(f"svqvae: `{self.output}` is not complete. Run the same command again to resume.", file=sys.stderr)
        if kind is None:
            check_none_skipped(self.skipped, total)

    def files(self) -> Iterator[Item]:
        """Yields each input whose outputs are missing. Shows a progress bar on a terminal."""
        with tqdm(total=len(self.targets), initial=self.done, unit="image", disable=None) as bar:
            for item in self.left:
                yield item
                bar.update()

    def read(self: "Run[InputFile]", read: Callable[[Path], Content]) -> Iterator[tuple[InputFile, Content]]:
        """Yields each input whose outputs are missing, and its content. Skips inputs that cannot be read."""
        for item in self.files():
            with self.attempt(item, OSError, ValueError):
                check_file(item.path)
                yield item, read(item.path)

    @contextmanager
    def attempt(self, item: Item, *errors: type[Exception]) -> Iterator[None]:
        """Skips the input whose work raises one of these errors, or runs out of memory. A single input raises."""
        try:
            yield
            self.written += self.pending
        except errors as error:
            self._skip(error, str(error))
        except (MemoryError, RuntimeError) as error:
            from svqvae_hf.tokens.image_tokens import OUT_OF_MEMORY, is_out_of_memory

            if not is_out_of_memory(error):
                raise
            self._skip(error, f"`{_name(item)}`: {OUT_OF_MEMORY}")
        finally:
            self.pending = 0

    def _skip(self, error: Exception, reason: str) -> None:
        if len(self.targets) == 1:
            raise error
        self.skipped += 1
        tqdm.write(f"svqvae: skipped: {one_line(reason)}", sys.stderr)  # above the progress bars

    def outputs(self, item: Item) -> Sequence[Path]:
        """Returns the output files of an input, after creating their folder and the record of the run."""
        from svqvae_files.outputs import write_file

        paths = self.targets[item]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_recorded:
            if self.overwrite:  # what is left of an earlier run must not count as done if this one is interrupted
                for old in (path for each in self.targets.values() for path in each if path.is_file()):
                    old.unlink()
            write_file(self.record, json.dumps(self.options | {"sources": self.sources}).encode())
            self.is_recorded = True
        self.pending = len(paths)
        return paths


def _changed(path: Path) -> int:
    """Time in ns of the last change of a file, or of the weights in a folder."""
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _source(item: Any) -> str:
    """Absolute path of an input or a model, or its name if it has none."""
    return os.path.abspath(name) if os.path.exists(name := _name(item)) else name


def _is_whole(path: Path) -> bool:
    """Whether an output file is not damaged or cut, as far as this can be told without decoding it."""
    from svqvae_files.outputs import is_whole

    try:
        if path.suffix in TOKEN_SUFFIXES:
            from svqvae_hf.tokens.token_files import load_compressed, load_tokens

            return bool(load_compressed(path) if path.suffix == ".svqz" else load_tokens(path))
        if path.suffix == ".tif":
            from svqvae_hf.large.tiff_reader import open_large_image

            with open_large_image(path) as image:
                return image.read(slice(image.height - 1, image.height), slice(image.width - 1, image.width)).size > 0
        return is_whole(path)
    except (OSError, ValueError):
        return False


def _name(item: Any) -> str:
    return str(item.path) if isinstance(item, InputFile) else str(item)
