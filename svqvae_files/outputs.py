"""Output files: their names, and files that are either complete or absent."""

import contextlib
import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svqvae_files.errors import explained

if TYPE_CHECKING:
    from PIL import Image


TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{8}\.tmp")  # name of a path that [`temporary_path`] returns


def temporary_path(path: Path) -> Path:
    """A new hidden name beside a file. It is short, because the name of the file may have the maximum length."""
    return path.with_name(f".{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which becomes `path` at the end, so that it is complete or absent.

    Args:
        path (`Path`): File to write, in an existing folder.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        with explained(path, done="written"):  # errors say that `path` cannot be written
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # after success there is no temporary file any more
            temporary.unlink()


def delete_temporary(paths: Iterable[Path]) -> None:
    """Deletes the paths that [`new_file`] has named, which only processes that were killed can have left."""
    for path in paths:
        if TEMPORARY_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file in an existing folder with [`new_file`]."""
    with new_file(Path(path)) as temporary:
        temporary.write_bytes(content)


def save_png(image: "Image.Image", path: Path) -> None:
    """Writes an image with [`write_file`] and creates its folder if necessary."""
    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def check_new_folder(out: Path) -> Path:
    """Checks a folder to create: nothing else is there, and files can be created.

    Args:
        out (`Path`): The folder. It need not exist.

    Returns:
        `Path`: The folder as an absolute path without links.

    Raises:
        ValueError: The folder is not empty or cannot be created.
    """
    fault = _fault_of_new_folder(out)
    if fault is not None:
        raise ValueError(f"`{out}` must be a new or empty folder, but {fault}. Choose another.")
    return out.resolve()


def _fault_of_new_folder(out: Path) -> str | None:
    nearest = nearest_existing(out)
    if nearest.is_symlink() and not nearest.exists():
        return f"`{nearest}` is a broken link"
    if not nearest.is_dir():
        return f"`{nearest}` is a file"
    if out.resolve() == Path.cwd():
        return "it is the current folder, which cannot be replaced"
    if out.exists() and any(out.iterdir()):
        return "it is not empty"
    if not is_writable(nearest):
        return f"`{nearest}` cannot be written to"
    return None


def nearest_existing(path: Path) -> Path:
    """The path itself if something is there, otherwise the nearest folder above it."""
    while not os.path.lexists(path):
        path = path.absolute().parent
    return path


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder. Permissions alone do not tell: not even root can write to `/proc`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which becomes `out` at the end, so that it is complete or absent.

    Args:
        out (`Path`): Folder to create, from [`check_new_folder`].

    Raises:
        OSError: The folder cannot be written.
    """
    with explained(out, done="written"):  # errors say that `out` cannot be written
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            folder = Path(beside, out.name)
            folder.mkdir()
            yield folder
            for path in folder.rglob("*"):
                if path.is_file():
                    path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            folder.replace(out)


def share_weights(folder: Path) -> None:
    """Gives weights the permissions of their folder. safetensors makes files that only their owner can read."""
    permissions = folder.stat().st_mode & 0o666  # without the right to execute
    for path in folder.glob("*.safetensors"):
        path.chmod(permissions)


def scale_endings(scales: Sequence[float]) -> list[str]:
    """Endings of the file names of an image, one per scale."""
    endings = [f"_x{scale:g}.png" for scale in scales]
    if len(set(endings)) < len(endings):
        shown = ", ".join(str(scale) for scale in scales)
        raise ValueError(f"scales must differ within six digits, because they name files, but are {shown}.")
    return endings
