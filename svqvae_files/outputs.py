"""Output files: their names, and files that are either complete or absent."""

import contextlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from svqvae_files.errors import explained


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which becomes `path` at the end, so that it is complete or absent.

    Args:
        path (`Path`): File to write, in an existing folder.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")  # short, because the name may have the maximum length
    try:
        with explained(path, "written"):
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file in an existing folder with [`new_file`]."""
    with new_file(Path(path)) as temporary:
        temporary.write_bytes(content)


def save_png(image: Image.Image, path: Path) -> None:
    """Writes an image with [`write_file`] and creates its folder if necessary."""
    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def is_whole(path: Path) -> bool:
    """Whether a PNG is not damaged, by the checksums in it, or another file ends in a line break.

    Raises:
        OSError: The file cannot be read.
    """
    if path.suffix != ".png":
        return path.read_bytes().endswith(b"\n")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except Exception:  # decoders raise almost any kind
        return False
    return True


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


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which becomes `out` at the end, so that it is complete or absent.

    Args:
        out (`Path`): Folder to create, from [`check_new_folder`].

    Raises:
        OSError: The folder cannot be written.
    """
    with explained(out, "written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            folder = Path(beside, out.name)
            folder.mkdir()
            yield folder
            for path in folder.rglob("*"):
                if path.is_file():
                    path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            folder.replace(out)


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
