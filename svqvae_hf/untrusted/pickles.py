"""Reads PyTorch files from any source as weights and plain values only."""

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

LOCK = threading.Lock()  # torch's list of safe classes and Python's warning filters belong to the whole process
ARCHIVE_START = b"PK\3\4"  # all PyTorch files but the oldest are zip archives
LEGACY_PICKLES = 5  # in a file of the oldest form: two numbers, the machine, the content, the names of its storages
MAX_TUPLES = 10_000  # in one tuple, itself and all nested ones
# Globals that torch allows although they allocate as much memory as their arguments say.
GREEDY = re.compile(r"(__builtin__|builtins)\.bytearray|torch(\.\w+)*\.(\w*Tensor|TypedStorage)")
# Honest files use three such globals: the storage in place of a dtype, for float8 and other dtypes without a storage
# class; the encoder called with text and "latin1", which is how bytes are stored; the type of a tensor that has
# attributes, which is stored as `REBUILD_TYPED(REBUILD, TENSOR, arguments of REBUILD, attributes)`.
STORAGE, ENCODE, TENSOR = "torch.storage.UntypedStorage", "_codecs.encode", "torch.Tensor"
UNTYPED_STORAGE = re.compile(r"torch(\.storage)?\.UntypedStorage")
LATIN1 = "latin1"
REBUILD, REBUILD_TYPED = "torch._utils._rebuild_tensor_v2", "torch._tensor._rebuild_from_type_v2"
TYPED_TENSOR = f"{TENSOR} as a type"  # these four arguments
HONEST_CALLS = ([LATIN1, ENCODE], [TYPED_TENSOR, REBUILD_TYPED])  # arguments and callee

StackValue = int | str | None  # see _check_pickle


def load_pickle(path: Path, safe_globals: Sequence[type] = ()) -> Any:
    """Loads a file of `torch.save`. Stops pickles that run code, or take more memory or time than their size explains.

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
        with path.open("rb") as file:
            if file.peek(len(ARCHIVE_START)).startswith(ARCHIVE_START):
                _check_archive(file, path.stat().st_size)
            else:
                for _ in range(LEGACY_PICKLES):
                    if file.peek(1):
                        _check_pickle(file)
        with LOCK, torch.serialization.safe_globals(list(safe_globals)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns before it fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # from a seek to before the start of the file
            raise pickle.UnpicklingError("the archive names positions outside the file") from error
        raise


def _check_archive(file: IO[bytes], size: int) -> None:
    """Stops zip bombs: an archive may not unpack to more than its file, because PyTorch does not compress."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > size:
            raise pickle.UnpicklingError(f"the archive unpacks to {unpacked} bytes")
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                entry.CRC = None  # type: ignore[assignment]  # torch may omit the checksum, and does not read it
                with archive.open(entry) as pickled:
                    _check_pickle(pickled)


def _check_pickle(pickled: IO[bytes]) -> None:
    """Stops calls that allocate unlimited memory, and nested tuples that overflow the stack or hash endlessly as keys.

    Interprets the pickle without building its values. In place of each value, the stack holds the number of tuples
    that hashing the value visits. That number can be huge in a small file, because the memo lets a tuple hold another
    many times. The names above stand for themselves and for tuples that hold them, `None` for a mark.
    """
    stack: list[StackValue] = []
    memo: dict[Any, StackValue] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        taken = _take(stack, opcode)
        value: StackValue = 0
        if opcode.name == "GLOBAL":
            value = _check_global(str(argument).replace(" ", "."))
        elif "GET" in opcode.name:
            value = memo[argument]
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif argument == LATIN1:
            value = LATIN1
        elif "TUPLE" in opcode.name and ENCODE not in taken:
            value = _check_tuple(taken)
        elif opcode.name != "BINPERSID" and taken not in HONEST_CALLS:
            for name in (STORAGE, ENCODE, TENSOR, TYPED_TENSOR):
                if name in taken:
                    raise pickle.UnpicklingError(f"GLOBAL {name} can take any memory")
        stack += [None if kind is pickletools.markobject else value for kind in opcode.stack_after]


def _take(stack: list[StackValue], opcode: pickletools.OpcodeInfo) -> list[StackValue]:
    """Pops the values that an opcode takes, the last one first."""
    before, taken = opcode.stack_before, []
    if pickletools.markobject in before:
        before = before[: before.index(pickletools.markobject)]
        while (above := stack.pop()) is not None:
            taken.append(above)
    return taken + [stack.pop() for _ in before]


def _check_global(name: str) -> StackValue:
    if name in (ENCODE, TENSOR, REBUILD, REBUILD_TYPED):
        return name
    if GREEDY.fullmatch(name):
        raise pickle.UnpicklingError(f"GLOBAL {name} can take any memory")
    return STORAGE if UNTYPED_STORAGE.fullmatch(name) else 0


def _check_tuple(items: list[StackValue]) -> StackValue:
    """Value of a tuple with these items, the last one first."""
    if STORAGE in items:
        return STORAGE
    if TENSOR in items or TYPED_TENSOR in items:
        is_typed = items[2:] == [TENSOR, REBUILD] and {TENSOR, TYPED_TENSOR}.isdisjoint(items[:2])
        return TYPED_TENSOR if is_typed else TENSOR
    if items[:1] == [LATIN1] and len(items) == 2:
        return LATIN1
    tuples = 1 + sum(item for item in items if isinstance(item, int))
    if tuples > MAX_TUPLES:
        raise pickle.UnpicklingError(f"a tuple must hold at most {MAX_TUPLES} nested tuples, itself included")
    return tuples
