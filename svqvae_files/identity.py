"""What a thing is: a model, an input, a set of inputs, an output. No other property stands for it.

| thing | its identity |
|---|---|
| model | digest of its configs, its tokenizer and its weights, see [`model_digest`] |
| input | path below the root, size and version, see [`InputIdentity`] |
| set | digest of its inputs, its columns and its class names, see [`set_digest`] |
| output | size and checksum, see [`OutputIdentity`] |
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from svqvae_files.errors import explained
from svqvae_files.json_files import parse_json_object
from svqvae_files.safetensors_header import read_header

CONFIG_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # of files that change what a model does
NOTES = {  # config keys that say where a model comes from, not what it does
    "_name_or_path",
    "_commit_hash",
    "_diffusers_version",
    "transformers_version",
}
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class InputIdentity:
    """An input file.

    Args:
        name (`str`): Path below the root of its set, with `/` between folders.
        size (`int`): Bytes.
        version (`str`): Time of the last change in ns on a disk, which is compared as equal and never as older or
            newer; at a URL, the version or the ETag that the store lists.
    """

    name: str
    size: int
    version: str


@dataclass(frozen=True)
class OutputIdentity:
    """Content of an output file.

    Args:
        size (`int`): Bytes.
        checksum (`str`): SHA-256 in hexadecimal.
    """

    size: int
    checksum: str


def value_digest(value: Any) -> str:
    """Digest of a value that JSON can hold, such as options. The order of keys does not count.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def input_identity(root: str | os.PathLike, name: str) -> InputIdentity:
    """Identity of a local file.

    Args:
        root (`str` or `os.PathLike`): Folder of its set.
        name (`str`): Path below it.

    Raises:
        OSError: The file does not exist or cannot be read.
    """
    facts = os.stat(os.path.join(root, name))
    return InputIdentity(name.replace(os.sep, "/"), facts.st_size, str(facts.st_mtime_ns))


def set_digest(
    inputs: Iterable[InputIdentity], columns: Sequence[str] = (), class_names: Sequence[str] | None = None
) -> str:
    """Digest of a set: all its inputs in their order, its columns and the names of its classes in their order.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for file in inputs:
        digest.update(value_digest(asdict(file)).encode())
    digest.update(value_digest([list(columns), class_names and list(class_names)]).encode())
    return digest.hexdigest()


def output_identity(path: str | os.PathLike) -> OutputIdentity:
    """Identity of a local file by its content.

    Raises:
        OSError: The file does not exist or cannot be read.
    """
    with explained(path, "read"), open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return OutputIdentity(file.tell(), checksum)


def model_digest(folder: str | os.PathLike) -> str:
    """Digest of a model, adapter, tokenizer or pipeline in a folder, whatever its format and class.

    It covers all configs, templates, vocabularies and weights of the folder and its subfolders, except for hidden
    folders and checkpoints of training runs. It does not cover notes, such as the version of a library in a config or
    the metadata of a safetensors file, nor cards and pictures.

    Args:
        folder (`str` or `os.PathLike`): Folder of the model.

    Returns:
        `str`: SHA-256 in hexadecimal.

    Raises:
        OSError: The folder does not exist or cannot be read.
        ValueError: A config is not JSON, or a file of weights is damaged.
    """
    digest = hashlib.sha256()
    for name in _model_files(Path(folder)):
        digest.update(f"{name} {_model_file_digest(Path(folder, name))}\n".encode())
    return digest.hexdigest()


def _model_files(root: Path) -> list[str]:
    """Files that change what a model does, relative to its folder and in order."""

    def fail(error: OSError) -> None:
        raise error

    names = []
    for here, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-"))]
        for name in files:
            if name.startswith("."):
                continue
            if name.endswith((*CONFIG_SUFFIXES, ".safetensors")):
                names.append(Path(here, name).relative_to(root).as_posix())
    return sorted(names)


def _model_file_digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        return _weights_digest(path)
    content = path.read_bytes()
    if path.suffix != ".json":
        return hashlib.sha256(content).hexdigest()
    return value_digest(_without_notes(parse_json_object(content, path)))


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for key, value in config.items():
        if key in NOTES:
            continue
        values[key] = _without_notes(value) if isinstance(value, Mapping) else value
    return values


def _weights_digest(path: Path) -> str:
    """Digest of the names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        tensors = read_header(file, path)
        first_byte = file.tell()
        for name in sorted(tensors):
            start, end = tensors[name]["data_offsets"]
            digest.update(value_digest([name, tensors[name]["dtype"], tensors[name]["shape"]]).encode())
            file.seek(first_byte + start)
            _update(digest, file, end - start)
    return digest.hexdigest()


def _update(digest: Any, file: BinaryIO, size: int) -> None:
    while size > 0:
        block = file.read(min(size, BLOCK_BYTES))
        digest.update(block)
        size -= len(block)
