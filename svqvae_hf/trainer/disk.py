"""Reasons why large files could not be written. Libraries do not say that the disk is full."""

import errno
import tempfile
from pathlib import Path

from safetensors import SafetensorError

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # of torch, safetensors and the system for a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)
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
    """Whether the disk of a folder has less than a mebibyte, or its user may not write more."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as error:
        return error.errno in FULL
    return False
