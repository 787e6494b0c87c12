"""PyTorch files of any origin, read as weights and plain values only."""

import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

READING = threading.Lock()  # what torch lets through, and warnings, are settings of the whole process
ARCHIVE_START = b"PK\3\4"  # PyTorch's files but the oldest are zip archives
OLD_PICKLES = 5  # in one of the oldest: two numbers, the machine, the content, the names of its storages
MAX_TUPLE = 10_000
# What torch lets through and what takes as much memory as its arguments say. Honest files name an UntypedStorage for
# types that have no storage of their own, such as float8, of which no model is made here.
GREEDY = re.compile(r"(__builtin__|builtins)\.bytearray|_codecs\.encode|torch(\.\w+)*\.(\w*Tensor|(Unt|T)ypedStorage)")


def load_pickle(path: Path, safe_globals: Sequence[type] = ()) -> Any:
    """What `torch.load` with `weights_only` gives, of a file that takes no more memory or time than its size explains.

    Args:
        path (`Path`): File of `torch.save`, of any version.
        safe_globals (`Sequence[type]`, defaults to `()`): Classes that it may hold beside weights and plain values.

    Returns:
        `Any`: Its content, tensors on the CPU.

    Raises:
        OSError: The file cannot be opened.
        Exception: It is none of `torch.save`, or broken, or hostile; of almost any type, `pickle.UnpicklingError`
            where it calls for other classes.
    """
    with path.open("rb") as file:
        if file.peek(len(ARCHIVE_START)).startswith(ARCHIVE_START):
            try:
                _check_archive(file, path.stat().st_size)
            except OSError as error:  # it names places before its start
                raise pickle.UnpicklingError("the archive is broken") from error
        else:
            for _ in range(OLD_PICKLES):
                if file.peek(1):
                    _check_pickle(file)
    with READING, torch.serialization.safe_globals(list(safe_globals)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they announce makes the read fail
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(file: IO[bytes], size: int) -> None:
    """Refuses an archive that would take more memory than the file has bytes: PyTorch compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:
            raise pickle.UnpicklingError(f"the archive unpacks to {unpacked} bytes")
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                with archive.open(entry) as pickled:
                    _check_pickle(pickled)


def _check_pickle(pickled: IO[bytes]) -> None:
    """Refuses calls of what allocates at will, and nests of tuples whose hash, as a key, takes the stack or no end.

    A tuple may hold another many times, by its number in the memo, and that one a third: each counts as often as it
    is hashed. The stack is the unpickler's, with these counts in place of values and `None` for a mark.
    """
    stack: list[int | None] = []
    memo: dict[Any, int | None] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and GREEDY.fullmatch(name := str(argument).replace(" ", ".")):
            raise pickle.UnpicklingError(f"GLOBAL {name} can take any memory")
        count = 1
        if pickletools.markobject in opcode.stack_before:
            while (above := stack.pop()) is not None:
                count += above
        for taken in opcode.stack_before:
            if taken is pickletools.markobject:
                break
            count += stack.pop() or 0
        if "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            count = memo[argument] or 0
        elif "TUPLE" not in opcode.name:
            count = 1
        if count > MAX_TUPLE:
            raise pickle.UnpicklingError(f"a nest of tuples holds more than {MAX_TUPLE} values")
        stack += [None if value is pickletools.markobject else count for value in opcode.stack_after]
