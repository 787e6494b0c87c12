"""Input files: which files a path, a folder or a pattern stands for."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DEFAULT_MODEL = str(Path(__file__).parents[1] / "pretrained")  # folder of the small bundled model


def check_local(name: str) -> str:
    """Returns a path or a name on the Hub. Raises for a URL, which would be taken for a local path otherwise."""
    if match := re.match(r"([a-zA-Z][\w+.-]*)://", name):
        raise ValueError(
            f"`{name}` must be a local path or a name on the Hub, because `{match[1]}://` is not supported. Copy or "
            "mount it first."
        )
    return name


class InputFile(NamedTuple):
    """Input of a command.

    Args:
        path (`Path`): The file.
        name (`Path`): Path below the folder in which the file was found, or its file name. Outputs are named after it.
    """

    path: Path
    name: Path

    def target(self, output: Path, ending: str) -> Path:
        """Output file: the input `a/b.png` and the ending `_x1.png` make `a/b_x1.png` in the output folder."""
        return output / self.name.parent / f"{self.name.stem}{ending}"


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str], output: Path | None = None) -> list[InputFile]:
    """Finds the input files of a command and lists each once.

    Args:
        patterns (`Sequence[str]`): Files, folders and glob patterns. A folder stands for the files in it and in its
            subfolders that have one of the suffixes. Hidden files and folders are left out.
        suffixes (`Sequence[str]`): Suffixes in lower case, such as `.png`.
        output (`Path`, *optional*): Folder that the command writes to. It is not searched.

    Raises:
        ValueError: A pattern matches no file, or is the output folder.
    """
    found: dict[Path, InputFile] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            if output is not None and path.resolve() == output.resolve():
                raise ValueError(f"--output must not be an input folder, got `{output}`. Choose another.")
            files = [InputFile(file, file.relative_to(path)) for file in search_folder(path, suffixes, output)]
            missing = f"the folder `{pattern}`, subfolders included, has no file that ends in {', '.join(suffixes)}."
        elif path.exists():
            files = [InputFile(path, Path(path.name))] if path.is_file() else []
            missing = f"an input must be a file or a folder, but `{pattern}` is neither."
        else:
            matches = (Path(match) for match in sorted(glob.glob(pattern, recursive=True)))
            files = [InputFile(match, Path(match.name)) for match in matches if match.is_file()]
            missing = f"no file or folder matches `{pattern}`."
        if not files:
            raise ValueError(missing)
        for file in files:  # links with different names are kept, even to the same file
            found.setdefault(file.path.parent.resolve() / file.path.name, file)
    return list(found.values())


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Paths that [`find_inputs`] finds."""
    return [file.path for file in find_inputs(patterns, suffixes)]


def search_folder(folder: Path, suffixes: Sequence[str], output: Path | None = None) -> Iterator[Path]:
    """Yields the files that [`find_inputs`] finds in a folder, in order of their paths."""
    for name in walk_files(folder, left_out=output and output.resolve()):
        if Path(name).suffix.lower() in suffixes and (folder / name).is_file():
            yield folder / name


def walk_files(folder: str | os.PathLike, left_out: Path | None = None) -> list[str]:
    """Lists the files of a folder and its subfolders, except for hidden ones.

    Args:
        folder (`str` or `os.PathLike`): Folder to search. Links are followed, except to a folder above them.
        left_out (`Path`, *optional*): Subfolder that is not searched, without links in its path.

    Returns:
        `list[str]`: Paths relative to the folder, in order.
    """
    return sorted(_walk(os.fspath(folder), "", (left_out,)))


def readable(name: str) -> str:
    """Name of a file as text that can be stored and shown: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _walk(folder: str, inside: str, closed: tuple[Path | None, ...]) -> Iterator[str]:
    here = Path(folder, inside).resolve()
    if here in closed:
        return
    with os.scandir(here) as entries:
        for entry in entries:
            name = os.path.join(inside, entry.name)
            if entry.name[0] == ".":
                continue
            if _is_folder(entry):
                yield from _walk(folder, name, (*closed, here))
            else:
                yield name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{00..07}` to numbers of equal width, and `{a,b}` to each of its words."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    options = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    if not options:
        raise ValueError(f"`{match[0]}` in `{pattern}` must count upwards.")
    expanded = [expand_braces(f"{pattern[: match.start()]}{option}{pattern[match.end() :]}") for option in options]
    return [each for patterns in expanded for each in patterns]
