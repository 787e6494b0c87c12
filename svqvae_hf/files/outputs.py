"""Output files: their names, and files that are either complete or absent."""

import contextlib
import io
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Writes a temporary file in the same folder and then renames it, so that the file is complete or absent.

    Args:
        path (`str` or `os.PathLike`): File to write, in an existing folder.
        content (`bytes`): Content of the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")  # short, because the name may have the maximum length
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise os_error(f"`{path}` cannot be written: {error.strerror}.", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def os_error(message: str, cause: OSError) -> OSError:
    """An error with this message alone and the error number of its cause. A missing file stays a missing file."""
    error = FileNotFoundError(message) if isinstance(cause, FileNotFoundError) else OSError(message)
    error.errno = cause.errno
    return error


def save_png(image: Image.Image, path: Path) -> None:
    """Writes an image with [`write_file`] and creates its folder if necessary."""
    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def check_new_folder(out: Path) -> Path:
    """Resolves the path of a folder to create. Raises if something else is there, or files cannot be created."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    fault = None
    if existing.is_symlink() and not existing.exists():
        fault = f"`{existing}` is a broken link"
    elif not existing.is_dir():
        fault = f"`{existing}` is a file"
    elif out.resolve() == Path.cwd():
        fault = "it is the current folder, which cannot be replaced"
    elif out.exists() and any(out.iterdir()):
        fault = "it is not empty"
    elif not _is_writable(existing):
        fault = f"`{existing}` cannot be written to"
    if fault:
        raise ValueError(f"`{out}` must be a new or empty folder, but {fault}. Choose another.")
    return out.resolve()


def scale_endings(scales: Sequence[float]) -> list[str]:
    """Endings of the file names of an image, one per scale."""
    endings = [f"_x{scale:g}.png" for scale in scales]
    if len(set(endings)) < len(endings):
        raise ValueError(
            f"scales must differ within six digits, because they name files, but are {', '.join(map(str, scales))}."
        )
    return endings


def _is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder. Permissions alone do not tell: not even root can write to `/proc`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
