"""Output files: their names, checks before the work, and files that are either complete or absent."""

import contextlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from svqvae_hf.files.inputs import InputFile


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
    """An error with this message alone and the error number of its cause."""
    error = OSError(message)
    error.errno = cause.errno
    return error


def save_png(image: Image.Image, path: Path) -> None:
    """Writes an image with [`write_file`] and creates its folder if necessary."""
    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def check_new_folder(out: Path) -> Path:
    """Resolves the path of a folder to create. Raises unless it is absent or an empty folder."""
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


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder. Permissions alone do not tell: not even root can write to `/proc`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_output(output: Path) -> None:
    """Raises if the output folder cannot be written."""
    nearest = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not is_writable(nearest):
        raise ValueError(f"--output must be a writable folder, but `{nearest}` is not.")


def check_targets(targets: Mapping[InputFile, Iterable[Path]], overwrite: bool) -> None:
    """Raises if output files clash.

    Args:
        targets (`Mapping[InputFile, Iterable[Path]]`): Output files of each input.
        overwrite (`bool`): Whether output files may exist.

    Raises:
        ValueError: An output file is an input, or is written for two inputs, or exists.
    """
    sources = {file.path.resolve() for file in targets}
    writers: dict[Path, InputFile] = {}
    for file, paths in targets.items():
        for path in paths:
            if path.resolve() in sources:
                raise ValueError(f"the input `{path}` would be overwritten. Use another --output.")
            other = writers.setdefault(path, file)
            if other != file:
                raise ValueError(
                    f"`{other.path}` and `{file.path}` would both write `{path}`. Rename one, or use two --output."
                )
            if not overwrite and path.exists():
                raise ValueError(f"`{path}` already exists. Pass --overwrite, or use another --output.")
