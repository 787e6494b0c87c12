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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from svqvae_files.errors import explained
from svqvae_files.inputs import walk_files
from svqvae_files.json_files import parse_json_object
from svqvae_files.safetensors_header import read_header

# Patterns of the files that change what a model does: configs, templates, vocabularies and weights.
MODEL_FILES = (
    "*config.json",
    "*index.json",
    "*tokenizer.json",
    "*vocab.json",
    "*special_tokens_map.json",
    "*added_tokens.json",
    "*chat_template.json",
    "*.jinja",
    "*vocab.txt",
    "*merges.txt",
    "*.model",
    "*.safetensors",
)
CONTEXT_MODEL_FILE = "context_model.safetensors"  # beside a model: how its ids are compressed, not what they are
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
    status = os.stat(os.path.join(root, name))
    return InputIdentity(name.replace(os.sep, "/"), status.st_size, str(status.st_mtime_ns))


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
    names = None if class_names is None else list(class_names)
    digest.update(value_digest([list(columns), names]).encode())
    return digest.hexdigest()


def output_identity(path: str | os.PathLike) -> OutputIdentity:
    """Identity of a local file by its content.

    Raises:
        OSError: The file does not exist or cannot be read.
    """
    digest = hashlib.sha256()
    with explained(path, "read"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _add_bytes(digest, file, size)
    return OutputIdentity(size, digest.hexdigest())


def model_digest(folder: str | os.PathLike) -> str:
    """Digest of a model, adapter, tokenizer or pipeline in a folder, whatever its format and class.

    It covers all configs, templates, vocabularies and weights of the folder and its subfolders, except for hidden
    folders and checkpoints of training runs. It does not cover notes, such as the version of a library in a config or
    the metadata of a safetensors file, nor cards, pictures and the context model, which changes no id.

    Args:
        folder (`str` or `os.PathLike`): Folder of the model.

    Returns:
        `str`: SHA-256 in hexadecimal.

    Raises:
        OSError: The folder does not exist or cannot be read.
        ValueError: A config is not JSON, or a file of weights is damaged.
    """
    digest = hashlib.sha256()
    with explained(folder, "read"):
        names = _model_files(folder)
    for name in names:
        digest.update(f"{name} {model_file_digest(Path(folder, name))}\n".encode())
    return digest.hexdigest()


def weights_digest(path: str | os.PathLike) -> str:
    """Digest of a safetensors file: names, types, shapes and bytes of all tensors, in the order of their names.

    Returns:
        `str`: SHA-256 in hexadecimal.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: The file is damaged.
    """
    digest = hashlib.sha256()
    with explained(path, "read"), open(path, "rb") as file:
        tensors = read_header(file, path)
        data_start = file.tell()  # the header ends here
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(value_digest([name, tensor["dtype"], tensor["shape"]]).encode())
            start, end = tensor["data_offsets"]  # relative to `data_start`
            file.seek(data_start + start)
            _add_bytes(digest, file, end - start)
    return digest.hexdigest()


def _model_files(folder: str | os.PathLike) -> list[str]:
    """Names of the files that change what a model does, relative to its folder and in order."""
    return [name for name in walk_files(folder) if _is_model_file(Path(name))]


def _is_model_file(path: Path) -> bool:
    """Whether a file changes what a model does, by its path below the folder of the model."""
    is_in_checkpoint = any(folder.startswith("checkpoint-") for folder in path.parent.parts)
    if is_in_checkpoint or path.name == CONTEXT_MODEL_FILE:
        return False
    return any(fnmatchcase(path.name, pattern) for pattern in MODEL_FILES)


def model_file_digest(path: Path) -> str:
    """Digest of one file of a model, without notes; see [`model_digest`].

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is a config that is not JSON, or damaged weights.
    """
    if path.suffix == ".safetensors":
        return weights_digest(path)
    with explained(path, "read"):
        content = path.read_bytes()
    if path.suffix != ".json":
        return hashlib.sha256(content).hexdigest()
    config = parse_json_object(content, path)
    return value_digest(_without_notes(config))


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config that change what a model does. A config may hold further configs."""
    values = {}
    for key, value in config.items():
        if key in NOTES:
            continue
        if isinstance(value, Mapping):
            value = _without_notes(value)
        values[key] = value
    return values


def _add_bytes(digest: Any, file: BinaryIO, size: int) -> None:
    """Adds the next bytes of a file to a digest, block by block."""
    while size > 0:
        block = file.read(min(size, BLOCK_BYTES))
        digest.update(block)
        size -= len(block)
