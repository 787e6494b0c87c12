"""Reasons why large files could not be written. Libraries do not say that the disk is full."""

import errno
import tempfile
from pathlib import Path

from safetensors import SafetensorError

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # of torch, safetensors and the system for a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk without space, and of a user whose quota is used up
PROBE_BYTES = 2**20


def write_fault(folder: Path, error: Exception) -> str:
    """Reason in one line why files could not be written.

    Args:
        folder (`Path`): Folder on the same disk.
        error (`Exception`): One of `WRITE_ERRORS`, before anything on the disk is deleted.
    """
    if is_full(folder):
        return "No space left on device, the disk is full"
    return " ".join(str(error).split()).removesuffix(".")


def is_full(folder: Path) -> bool:
    """Whether a mebibyte cannot be written to a folder, because its disk is full or the user's quota is used up."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.errno in FULL
    return False
