"""PyTorch files of any origin, read as weights and plain values only."""

import errno
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
MAX_TUPLES = 10_000  # in one, within others
# What torch lets through and what takes as much memory as its arguments say.
GREEDY = re.compile(r"(__builtin__|builtins)\.bytearray|torch(\.\w+)*\.(\w*Tensor|TypedStorage)")
# Two of that kind are in honest files: the first in the place of a type, for float8 and others that have no storage of
# their own; the second called with text and "latin1", which is how bytes are stored.
STORAGE, ENCODE = "torch.storage.UntypedStorage", "_codecs.encode"
UNTYPED = r"torch(\.storage)?\.UntypedStorage"
LATIN1 = "latin1"


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
    try:
        with path.open("rb") as file:
            if file.peek(len(ARCHIVE_START)).startswith(ARCHIVE_START):
                _check_archive(file, path.stat().st_size)
            else:
                for _ in range(OLD_PICKLES):
                    if file.peek(1):
                        _check_pickle(file)
        with READING, torch.serialization.safe_globals(list(safe_globals)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they announce makes the read fail
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # of a seek to before the file's start
            raise pickle.UnpicklingError("the archive names places that are not there") from error
        raise


def _check_archive(file: IO[bytes], size: int) -> None:
    """Refuses an archive that would take more memory than the file has bytes: PyTorch compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:
            raise pickle.UnpicklingError(f"the archive unpacks to {unpacked} bytes")
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                entry.CRC = None  # type: ignore[assignment]  # torch may have left it out, and does not look
                with archive.open(entry) as pickled:
                    _check_pickle(pickled)


def _check_pickle(pickled: IO[bytes]) -> None:
    """Refuses calls of what allocates at will, and nests of tuples whose hash, as a key, takes the stack or no end.

    The stack is the unpickler's. In place of a value it has the number of tuples in it, each as often as it is hashed,
    since a tuple may hold another many times by its number in the memo; `None` for a mark; and the names above for
    themselves and for tuples that hold them.
    """
    stack: list[int | str | None] = []
    memo: dict[Any, int | str | None] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name, before = opcode.name, opcode.stack_before
        taken: list[int | str | None] = []
        if pickletools.markobject in before:
            before = before[: before.index(pickletools.markobject)]
            while (above := stack.pop()) is not None:
                taken.append(above)
        taken += [stack.pop() for _ in before]
        value: int | str | None = 0
        if name == "GLOBAL":
            called = str(argument).replace(" ", ".")
            if GREEDY.fullmatch(called):
                raise pickle.UnpicklingError(f"GLOBAL {called} can take any memory")
            value = STORAGE if re.fullmatch(UNTYPED, called) else ENCODE if called == ENCODE else 0
        elif "GET" in name:
            value = memo[argument]
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif argument == LATIN1:
            value = LATIN1
        elif "TUPLE" in name and ENCODE not in taken:
            if STORAGE in taken:
                value = STORAGE
            elif taken[:1] == [LATIN1] and len(taken) == 2:
                value = LATIN1
            else:
                value = 1 + sum(each for each in taken if isinstance(each, int))
                if value > MAX_TUPLES:
                    raise pickle.UnpicklingError(f"a nest of tuples has more than {MAX_TUPLES} of them")
        elif name != "BINPERSID" and (ENCODE in taken or STORAGE in taken) and taken != [LATIN1, ENCODE]:
            raise pickle.UnpicklingError(f"GLOBAL {STORAGE if STORAGE in taken else ENCODE} can take any memory")
        stack += [None if each is pickletools.markobject else value for each in opcode.stack_after]
