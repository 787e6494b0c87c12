"""Settings that all rows of a token set share, and the tokens of a row."""

import fnmatch
import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svqvae_files.file_names import (
    STARTED_TOKEN_SET_FILE,
    TOKEN_SET_DATA,
    TOKEN_SET_FILE,
    TOKEN_SET_MANIFEST,
    TOKEN_SET_RECORDS,
)
from svqvae_files.folders import Folder
from svqvae_files.inputs import is_url
from svqvae_files.json_files import parse_json_object
from svqvae_hf.data.repositories import is_hub_set
from svqvae_hf.hub.repositories import download_file
from svqvae_hf.models.checks import check_integers
from svqvae_hf.token_sets.crops import CROPS, is_whole
from svqvae_hf.tokens.compressed_tokens import read_compressed
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.encoding import FINGERPRINT, Encoding
from svqvae_hf.tokens.token_files import UINT16_CODES, ImageTokens, decompressed_tokens

SETTINGS_FILE = TOKEN_SET_FILE
ADVICE_FOR_DAMAGED = "Delete it and run the same `svqvae tokenize` again, which makes it again."


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Encoding):
    """Settings that all rows of a token set share.

    Args:
        model (`str`): Hub id of the model that encoded the images, or the name of its folder.
        crops (`str`): Crops of an image that are rows, a key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.
        context_model (`str`, *optional*): Fingerprint of the [`ContextModel`] that compresses the rows. They have one
            column `tokens`, the content of a compressed token file, in place of `ids_0`, `ids_1`, ...
        **encoding: How the images were encoded; see [`~svqvae_hf.tokens.encoding.Encoding`]. The columns `ids_0`,
            `ids_1`, ... are in the order of `scales`.

    Raises:
        ValueError: A value is out of range.
    """

    model: str
    crops: str
    resolution: int | None
    context_model: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.model, str):
            raise _out_of_range("model", self.model)
        if len(self.scales) == 0:
            raise _out_of_range("scales", self.scales)
        if self.crops not in list(CROPS):  # a damaged file may hold a list, which a dictionary cannot look up
            raise _out_of_range("crops", self.crops)
        if not is_whole(self.crops):
            check_integers({"resolution": self.resolution})
        if is_whole(self.crops) and self.resolution is not None:
            raise _out_of_range("resolution", self.resolution)
        if self.context_model is not None and not FINGERPRINT.fullmatch(str(self.context_model)):
            raise _out_of_range("context_model", self.context_model)

    @property
    def id_dtype(self) -> str:
        """Type of the ids in the columns: 16 bits if the codebook is small enough."""
        if self.codebook_size <= UINT16_CODES:
            return "uint16"
        return "int32"

    @property
    def id_columns(self) -> list[str]:
        """Names of the columns of ids, one per scale of a row, or of the column of compressed ids."""
        if self.context_model is not None:
            return ["tokens"]
        return [f"ids_{index}" for index in range(len(self.scales))]

    def count_ids(self, row: Mapping[str, Any]) -> int:
        """Number of ids of a row."""
        count = 0
        for scale in self.scales:
            rows, columns = self.grid(scale, row["height"], row["width"])
            count += rows * columns
        return count

    def to_json(self) -> str:
        """Formats the settings as [`read_settings`] reads them."""
        return json.dumps(self.to_record(), indent=2) + "\n"


def _out_of_range(name: str, value: Any) -> ValueError:
    """Error about a setting that is out of range."""
    return ValueError(f"`{name}` of a token set is out of range, got {value!r:.80}.")


def read_settings(path: str | os.PathLike) -> TokenSettings:
    """Reads the settings of a token set.

    Args:
        path (`str` or `os.PathLike`): Folder of the set, its URL for `fsspec`, or its name on the Hub.

    Raises:
        OSError: The set does not exist or cannot be reached.
        ValueError: It is not a token set, is not complete, or has another format version.
    """
    name = os.fspath(path)
    return parse_settings(read_settings_file(name), name)


def read_settings_file(name: str) -> bytes:
    """Content of the settings of a token set. Raises an error that says what to do if they are absent or damaged."""
    content = read_set_file(name, SETTINGS_FILE)
    if content is None:
        raise _absent_set_error(name)
    try:
        parse_json_object(content, f"{name}/{SETTINGS_FILE}")
    except ValueError as error:
        raise ValueError(f"{error} {ADVICE_FOR_DAMAGED}") from error
    return content


def lost_file_error(folder: Folder) -> ValueError | None:
    """Error for a token set whose options are lost; `None` if they are there, or there is no token set.

    The options are in one file until the set is complete, and then in another. Either can be made again.
    """
    has_options = folder.read(STARTED_TOKEN_SET_FILE) is not None or folder.read(SETTINGS_FILE) is not None
    if has_options:
        return None
    lost_file = None
    names = folder.names("")
    if TOKEN_SET_MANIFEST in names and TOKEN_SET_DATA in names:
        lost_file = SETTINGS_FILE
    records, _, pattern = TOKEN_SET_RECORDS.partition("/")
    if fnmatch.filter(folder.names(records), pattern):
        lost_file = STARTED_TOKEN_SET_FILE
    if lost_file is None:
        return None
    return ValueError(
        f"`{folder.url}/{lost_file}` is missing, although the token set has other files. Run the same "
        "`svqvae tokenize` again, which makes it again from these files."
    )


def _absent_set_error(name: str) -> Exception:
    """Error for a folder or URL without the settings of a token set, which are written last."""
    was_started = read_set_file(name, STARTED_TOKEN_SET_FILE) is not None
    if was_started:
        return ValueError(
            f"a token set must be complete, but parts of `{name}` are missing. Run the same `svqvae tokenize` again. "
            "`svqvae info` says which are missing."
        )
    if is_url(name) or Path(name).is_dir():
        error = lost_file_error(Folder(name))
        if error is not None:
            return error
    return FileNotFoundError(
        f"a token set must be a folder with {SETTINGS_FILE} or a set on the Hub, but `{name}` is neither. Make one "
        "with `svqvae tokenize`, which writes that file last."
    )


def parse_settings(content: bytes, name: str) -> TokenSettings:
    """Reads settings from the content of a file.

    Args:
        content (`bytes`): JSON.
        name (`str`): Folder, URL or name of the set, for the error.

    Raises:
        ValueError: The content is damaged, or has another format version.
    """
    try:
        return TokenSettings.from_record(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` is not a token set of this version: {error}") from error


def is_token_set_on_hub(name: str) -> bool:
    """Whether `name` is the name of a token set on the Hub."""
    return is_hub_set(name)


def download_set_file(name: str, file: str) -> Path:
    """Downloads a file of a token set on the Hub to the cache."""
    return download_file(name, file, name, repo_type="dataset")


def read_set_file(name: str, file: str) -> bytes | None:
    """Content of a file of a token set on a disk, at a URL or on the Hub; `None` if it is absent."""
    if is_token_set_on_hub(name):
        return download_set_file(name, file).read_bytes()
    if is_url(name) or Path(name).is_dir():
        return Folder(name).read(file)
    return None


def row_tokens(
    row: Mapping[str, Any], settings: TokenSettings, context_model: ContextModel | None = None
) -> ImageTokens:
    """Converts a row to the tokens of an image, which can be decoded.

    Args:
        row (`Mapping[str, Any]`): Row of the set, as `datasets` returns it.
        settings ([`TokenSettings`]): Settings of the set.
        context_model ([`ContextModel`], *optional*): Context model of a set whose rows are compressed.

    Returns:
        [`ImageTokens`]: One grid of ids per scale of the row.

    Raises:
        ValueError: A column is missing, or the ids do not match the height and the width.
    """
    if settings.context_model is not None:
        return _compressed_tokens(row, context_model)
    names = settings.id_columns
    try:
        height = operator.index(row["height"])
        width = operator.index(row["width"])
        flat_ids = [np.asarray(row[name]).astype(np.int64, casting="safe") for name in names]
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong_columns(row, names) from error
    grids = []
    for ids, scale in zip(flat_ids, settings.scales, strict=True):
        shape = settings.grid(scale, height, width)
        num_ids = math.prod(shape)
        if ids.shape != (num_ids,):
            raise ValueError(
                f"a row of {height} x {width} pixels has {num_ids} ids at scale {scale:g}, not {ids.size}."
            )
        grids.append(torch.as_tensor(ids).view(shape))  # (h, w)
    return ImageTokens(grids, height, width, **_encoding_of(settings))


def _encoding_of(settings: TokenSettings) -> dict[str, Any]:
    """How the images were encoded: the settings that [`ImageTokens`] have as well, because both are an `Encoding`."""
    return {field.name: getattr(settings, field.name) for field in fields(Encoding)}


def _wrong_columns(row: Mapping[str, Any], id_columns: Sequence[str]) -> ValueError:
    """Error for a row that lacks a column, or has other values than integers in one."""
    values = []
    for name in ("height", "width", *id_columns):
        value = repr(row.get(name))
        values.append(f"{name} = {value:.40}")  # the first 40 characters
    return ValueError(
        f"a row must have integers as height, width, {', '.join(id_columns)} to match its settings, but has "
        f"{', '.join(values)}. Make the set again with `svqvae tokenize`."
    )


def _compressed_tokens(row: Mapping[str, Any], context_model: ContextModel | None) -> ImageTokens:
    """Tokens of a row whose column `tokens` holds a compressed token file."""
    content = row.get("tokens")
    if not isinstance(content, bytes):
        raise ValueError(f"`tokens` of a row must be bytes to match its settings, got {content!r:.40}.")
    return decompressed_tokens(read_compressed(content), context_model)
