"""The files that a command reads and writes."""

import contextlib
import glob
import io
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file beside its place, then moves it there, so that it is whole or not there at all.

    Args:
        path (`str` or `os.PathLike`): File to write, in a folder that exists.
        content (`bytes`): What it is to hold.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(4)}.tmp")  # short: the name itself may be as long as can be
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise os_error(f"`{path}` cannot be written: {error.strerror}.", error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def os_error(message: str, cause: OSError) -> OSError:
    """An error of this message alone, with the number of its cause."""
    error = OSError(message)
    error.errno = cause.errno
    return error


def save_png(image: Image.Image, path: Path) -> None:
    """Writes an image by [`write_file`], in a folder that it makes if need be."""
    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Files that the arguments name, each once: files, folders (files of these kinds right in them) and globs."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            names = [each for each in sorted(path.iterdir()) if each.suffix.lower() in suffixes]
            files = [each for each in names if each.name[0] != "." and each.is_file()]
            missing = f"the folder `{pattern}` has no file that ends in {', '.join(suffixes)}."
        elif path.exists():
            files = [path] if path.is_file() else []
            missing = f"an input must be a file or a folder, but `{pattern}` is neither."
        else:
            files = [Path(each) for each in sorted(glob.glob(pattern, recursive=True)) if Path(each).is_file()]
            missing = f"there is no file, folder or match `{pattern}`."
        if not files:
            raise ValueError(missing)
        found += files
    return distinct_files(found)


def distinct_files(paths: Iterable[Path]) -> list[Path]:
    """The first path of each name in each folder. Links of other names to one file, as on the Hub, are all kept."""
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.parent.resolve() / path.name, path)
    return list(unique.values())


def scale_endings(scales: Sequence[float]) -> list[str]:
    """Endings of the names of an image's files, one per scale."""
    endings = [f"_x{scale:g}.png" for scale in scales]
    if len(set(endings)) < len(endings):
        raise ValueError(
            f"scales must differ in six digits, since they name files, but are {', '.join(map(str, scales))}."
        )
    return endings


def check_output(inputs: Sequence[Path], output: Path) -> None:
    """Refuses an output folder that cannot be, and inputs whose files would overwrite each other."""
    nearest = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output must be a folder that can be written, but `{nearest}` is not.")
    writers: dict[str, Path] = {}
    for path in inputs:
        other = writers.setdefault(path.stem, path)
        if other != path:
            raise ValueError(f"`{other}` and `{path}` would write the same files. Rename one, or use two --output.")


def check_new_folder(out: Path) -> Path:
    """The folder to make, in full, if it can be made."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    fault = None
    if existing.is_symlink() and not existing.exists():
        fault = f"`{existing}` is a link to nothing"
    elif not existing.is_dir():
        fault = f"`{existing}` is a file"
    elif out.resolve() == Path.cwd():
        fault = "it is the folder you are in, which cannot be replaced"
    elif out.exists() and any(out.iterdir()):
        fault = "it has something in it"
    if fault:
        raise ValueError(f"`{out}` must be a new or an empty folder, but {fault}. Choose another.")
    return out.resolve()


def check_targets(paths: Sequence[Path], inputs: Sequence[Path], output: Path, endings: Sequence[str]) -> None:
    """Refuses to write what comes of `paths` over any of the inputs."""
    sources = {path.resolve() for path in inputs}
    for target in [output / f"{path.stem}{ending}" for path in paths for ending in endings]:
        if target.resolve() in sources:
            raise ValueError(f"the input `{target}` would be overwritten. Use another --output.")
