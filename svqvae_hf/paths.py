"""Paths of the files that a command reads and writes."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Finds the input files of a command and lists each once.

    Args:
        patterns (`Sequence[str]`): Files, folders and glob patterns. A folder stands for the files directly in it that
            have one of the suffixes and are not hidden.
        suffixes (`Sequence[str]`): Suffixes in lower case, such as `.png`.

    Raises:
        ValueError: A pattern matches no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            names = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in suffixes]
            files = [entry for entry in names if entry.name[0] != "." and entry.is_file()]
            missing = f"the folder `{pattern}` has no file that ends in {', '.join(suffixes)}."
        elif path.exists():
            files = [path] if path.is_file() else []
            missing = f"an input must be a file or a folder, but `{pattern}` is neither."
        else:
            files = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]
            missing = f"no file or folder matches `{pattern}`."
        if not files:
            raise ValueError(missing)
        found += files
    return distinct_files(found)


def distinct_files(paths: Iterable[Path]) -> list[Path]:
    """Drops paths that repeat a folder and name. Links with different names are kept, even to the same file."""
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.parent.resolve() / path.name, path)
    return list(unique.values())


def scale_endings(scales: Sequence[float]) -> list[str]:
    """Endings of the file names of an image, one per scale."""
    endings = [f"_x{scale:g}.png" for scale in scales]
    if len(set(endings)) < len(endings):
        raise ValueError(
            f"scales must differ within six digits, because they name files, but are {', '.join(map(str, scales))}."
        )
    return endings


def check_output(inputs: Sequence[Path], output: Path) -> None:
    """Raises if the output folder cannot be written or two inputs would write the same files."""
    nearest = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output must be a writable folder, but `{nearest}` is not.")
    writers: dict[str, Path] = {}
    for path in inputs:
        other = writers.setdefault(path.stem, path)
        if other != path:
            raise ValueError(f"`{other}` and `{path}` would write the same files. Rename one, or use two --output.")


def check_targets(paths: Sequence[Path], inputs: Sequence[Path], output: Path, endings: Sequence[str]) -> None:
    """Raises if an output file of `paths` would overwrite one of the inputs."""
    sources = {path.resolve() for path in inputs}
    for target in [output / f"{path.stem}{ending}" for path in paths for ending in endings]:
        if target.resolve() in sources:
            raise ValueError(f"the input `{target}` would be overwritten. Use another --output.")
