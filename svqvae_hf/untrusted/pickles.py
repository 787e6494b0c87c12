"""Reads PyTorch files from any source as weights and plain values only."""

import errno
import pickle
import threading
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LOCK = threading.Lock()  # torch's list of safe classes and Python's warning filters belong to the whole process


def load_pickle(path: Path, safe_globals: Sequence[type] = ()) -> Any:
    """Loads a file of `torch.save`. Stops pickles that run code, and archives that unpack to more than their file.

    Args:
        path (`Path`): File written by `torch.save`, of any version.
        safe_globals (`Sequence[type]`, defaults to `()`): Classes that it may hold beside weights and plain values.

    Returns:
        `Any`: Content of the file, as `torch.load` with `weights_only` returns it. Tensors are on the CPU.

    Raises:
        OSError: If the file cannot be opened.
        Exception: If the file is not from `torch.save`, is broken or hostile. The type may be almost any;
            `pickle.UnpicklingError` if it names other classes.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_unpacked_size(path)
        return _load_weights(path, safe_globals)
    except OSError as error:
        # A hostile archive may name a position before the start of its file. Seeking such a position fails with the
        # error number EINVAL, "invalid argument".
        names_position_before_start = error.errno == errno.EINVAL
        if names_position_before_start:
            raise pickle.UnpicklingError("the archive names positions outside the file") from error
        raise


def _load_weights(path: Path, safe_globals: Sequence[type]) -> Any:
    """Content of a file, without torch's warnings. Only one thread at a time may run the block, see `LOCK`."""
    with LOCK, torch.serialization.safe_globals(list(safe_globals)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns before it fails
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_unpacked_size(path: Path) -> None:
    """Raises UnpicklingError for a compressed archive. PyTorch does not compress."""
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    file_bytes = path.stat().st_size
    if unpacked_bytes > file_bytes:
        raise pickle.UnpicklingError(f"the archive unpacks to {unpacked_bytes} bytes")
