"""Checks that a reader, given any bytes, returns a right result or raises an error that names the file.

Each function takes one input of the fuzzer and raises if its reader does anything else.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from context_models import make_context_model

from svqvae_hf import SVQVAE
from svqvae_hf.large.tiff_reader import open_large_image
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.image_files import load_image
from svqvae_hf.token_sets.settings import SETTINGS_FILE, TokenSettings, read_settings
from svqvae_hf.tokens.compressed_tokens import CRC, SCALE
from svqvae_hf.tokens.token_files import is_compressed, is_token_file, load_tokens, save_tokens

CONTEXT_MODEL = make_context_model()
ERRORS = (ValueError, OSError, TypeError)
ZEROS = 32 * 32 * 3 * 3 * 4  # bytes of the storage that all tensors of a packed pickle share
MAX_ZEROS = 1 << 22
WINDOW = 64  # side in pixels of the windows that are read
Result = TypeVar("Result")


def read_any_checkpoint(content: bytes, folder: Path) -> None:
    """The first byte tells what follows: `z` a PyTorch file, `p` its pickle, `s` safetensors, `h` its header."""
    kind = content[:1]
    content = content[1:]
    path = folder / "fuzz.pt"
    if kind in (b"s", b"h"):
        path = folder / "fuzz.safetensors"
    if kind == b"p":
        content = pack(content)
    if kind == b"h":
        content = with_data(content)
    path.write_bytes(content)
    checkpoint = result_or_none(lambda: read_checkpoint(path, SVQVAE), path)
    if checkpoint is not None:
        weights = checkpoint.model(SVQVAE).state_dict()
        assert all(weight.isfinite().all() for weight in weights.values())
        assert SVQVAE(**checkpoint.config).state_dict().keys() == weights.keys()


def read_any_tokens(content: bytes, folder: Path) -> None:
    """The first byte tells what follows: `h` a header, `c` the parts of a compressed file, else a whole file."""
    path = folder / "fuzz.safetensors"
    make = {b"h": with_data, b"c": with_checksums}.get(content[:1], bytes)
    path.write_bytes(make(content[1:]))
    says_tokens = is_token_file(path) or is_compressed(path)
    tokens = result_or_none(lambda: load_tokens(path, CONTEXT_MODEL), path)
    if tokens is not None:
        assert says_tokens
        save_tokens(folder / "again.safetensors", tokens)
        again = load_tokens(folder / "again.safetensors")
        assert all(torch.equal(ids, other) for ids, other in zip(tokens.ids, again.ids, strict=True))
        assert vars(tokens).keys() == vars(again).keys()
        assert all(vars(tokens)[key] == vars(again)[key] for key in vars(tokens) if key != "ids")


def read_any_image(content: bytes, folder: Path) -> None:
    """The input is the file."""
    path = folder / "fuzz.image"
    path.write_bytes(content)
    image = result_or_none(lambda: load_image(path), path)
    if image is not None:
        assert image.mode == "RGB"
        assert image.width * image.height > 0
        image.getextrema()


def read_any_large(content: bytes, folder: Path) -> None:
    """The input is a TIFF. Its first and last window are read."""
    path = folder / "fuzz.tif"
    path.write_bytes(content)
    result_or_none(lambda: read_corners(path), path)


def read_corners(path: Path) -> None:
    with open_large_image(path) as image:
        height, width = min(image.height, WINDOW), min(image.width, WINDOW)
        for top, left in ((0, 0), (image.height - height, image.width - width)):
            pixels = image.read(slice(top, top + height), slice(left, left + width))
            assert pixels.shape == (height, width, 3)
            assert pixels.dtype == np.uint8


def read_any_token_set(content: bytes, folder: Path) -> None:
    """The settings of a folder follow after the first byte."""
    (folder / SETTINGS_FILE).write_bytes(content[1:])
    settings = result_or_none(lambda: read_settings(folder), folder)
    if settings is not None:
        assert isinstance(settings, TokenSettings)
        (folder / SETTINGS_FILE).write_text(settings.to_json())
        assert read_settings(folder) == settings


def result_or_none(read: Callable[[], Result], path: Path) -> Result | None:
    """Returns the result of `read`, or None if it raises an error that names the file."""
    try:
        return read()
    except ERRORS as error:
        message = str(error)
    assert str(path) in message, ascii(message)
    return None


def pack(pickled: bytes) -> bytes:
    """Makes a PyTorch file of a pickle."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("data/0", bytes(ZEROS))):
            archive.writestr(f"fuzz/{name}", content)
    return packed.getvalue()


def with_data(header: bytes) -> bytes:
    """Makes a safetensors file of a header, with as many zeros as it asks for."""
    try:
        entries = json.loads(header)
        size = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        data = bytes(min(int(size), MAX_ZEROS))
    except Exception:  # not a header
        data = b""
    return len(header).to_bytes(8, "little") + header + data


def with_checksums(parts: bytes) -> bytes:
    """Makes a compressed token file of its header and chunks: adds the fingerprint and the checksums."""
    header = parts[:24].ljust(24, b"\0") + bytes.fromhex(CONTEXT_MODEL.fingerprint)[:8]
    num_scales = header[7]
    entries = parts[24 : 24 + num_scales * SCALE.size]
    num_whole_entries = len(entries) // SCALE.size
    entries = entries[: num_whole_entries * SCALE.size]
    sections = [header + entries]
    chunks = parts[24 + len(entries) :]
    for _, size in SCALE.iter_unpack(entries):
        sections.append(chunks[:size])
        chunks = chunks[size:]
    content = b""
    for section in sections:
        content += section + CRC.pack(zlib.crc32(section))
    return content


READERS = {"checkpoint": read_any_checkpoint, "tokens": read_any_tokens, "image": read_any_image}
READERS |= {"large": read_any_large, "token_set": read_any_token_set}
