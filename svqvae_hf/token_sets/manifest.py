"""The manifest of a token set, and reading the set through it."""

import dataclasses
import glob
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import ParquetFragmentScanOptions

from svqvae_files.file_names import TOKEN_SET_DATA, TOKEN_SET_MANIFEST
from svqvae_files.folders import Folder
from svqvae_files.inputs import is_url
from svqvae_files.json_files import parse_json_object
from svqvae_hf.data.set_errors import explained_set
from svqvae_hf.token_sets.settings import (
    SETTINGS_FILE,
    download_set_file,
    is_token_set_on_hub,
    parse_settings,
    read_set_file,
    read_settings_file,
)
from svqvae_hf.tokens.token_files import METADATA_KEY

DATA = TOKEN_SET_DATA
MANIFEST_FILE = TOKEN_SET_MANIFEST
MANIFEST_CHECKSUM = "manifest"  # key in the settings
VERIFY_CHECKSUMS = ParquetFragmentScanOptions(page_checksum_verification=True)
ROWS_AT_A_TIME = 256
REMEDY = "Copy the set again, or make it again with `svqvae tokenize --overwrite`."
REMEDY_FOR_MANIFEST = "Copy it from a backup of the set, or make the set again with `svqvae tokenize --overwrite`."


@dataclass(frozen=True)
class TokenFile:
    """A Parquet file of a token set.

    Args:
        name (`str`): Path below the folder of the set.
        rows (`int`): Rows in it.
        size (`int`): Bytes.
        checksum (`str`): SHA-256 in hexadecimal.
    """

    name: str
    rows: int
    size: int
    checksum: str


@dataclass
class PartRecord:
    """Facts of a part. They are the same each time that the part is made.

    Args:
        part (`int`): Number of the part.
        options (`str`): Digest of the options of the set: its image set, its model and how it is encoded.
        read (`list[str]`): Files, or the range of images, that were read.
        images (`int`): Images that were read, including the skipped ones.
        rows (`int`): Rows that were written.
        ids (`int`): Ids in them, of all scales.
        enlarged (`int`): Images that are smaller than their crops.
        skipped (`list[dict[str, str]]`): `key` and `reason` of each image that could not be read, and the tar, Parquet
            or Arrow `file` that holds it, if any.
        files (`list[TokenFile]`): Parquet files.
    """

    part: int
    options: str
    read: list[str]
    images: int = 0
    rows: int = 0
    ids: int = 0
    enlarged: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    files: list[TokenFile] = field(default_factory=list)

    def to_entry(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], name: str) -> "PartRecord":
        """Reads a record from JSON.

        Args:
            entry (`Mapping[str, Any]`): Content.
            name (`str`): Path or URL of the file, for the error.

        Raises:
            ValueError: The record is damaged.
        """
        try:
            files = [TokenFile(**file) for file in entry["files"]]
            record = cls(**{**entry, "files": files})
        except (KeyError, TypeError) as error:
            raise ValueError(f"`{name}` must be the record of a part, but is damaged: {error}.") from error
        for attribute, type_ in RECORD_TYPES.items():
            if not isinstance(getattr(record, attribute), type_):
                raise ValueError(f"`{name}` must be the record of a part, but its `{attribute}` is damaged.")
        return record


RECORD_TYPES = {"part": int, "options": str, "read": list, "images": int, "rows": int, "ids": int, "skipped": list}


def remedy_for_part(part: int, num_parts: int) -> str:
    """Advice for a file of a complete set that is missing or damaged.

    Args:
        part (`int`): Number of the part that has the file.
        num_parts (`int`): Number of parts of the set.
    """
    return (
        f"Copy it again, or make part {part} again: `svqvae tokenize` with the same images and options, and with "
        f"`--num-parts {num_parts} --part {part} --output OTHER`, then copy the file from OTHER."
    )


def check_sizes(records: Sequence[PartRecord], sizes: Mapping[str, int], place: str) -> None:
    """Raises unless all files of a set are there and whole, and no others.

    Args:
        records (`Sequence[PartRecord]`): All parts of the set.
        sizes (`Mapping[str, int]`): Bytes of the files that are there.
        place (`str`): Folder or URL of the set.

    Raises:
        ValueError: A file is missing, cut or foreign.
    """
    names = []
    for record in records:
        remedy = remedy_for_part(record.part, len(records))
        for file in record.files:
            _check_size(file, sizes, place, remedy)
            names.append(file.name)
    check_no_foreign_files(names, sizes, place)


def _check_size(file: TokenFile, sizes: Mapping[str, int], place: str, remedy: str) -> None:
    """Raises ValueError unless a file is there and has its size. The error ends with `remedy`."""
    size = sizes.get(file.name)
    if size is None:
        raise ValueError(f"`{place}/{file.name}` is missing, although the manifest of the set names it. {remedy}")
    if size != file.size:
        raise ValueError(
            f"`{place}/{file.name}` must have {file.size:,} bytes, as the manifest of the set says, but has "
            f"{size:,}. {remedy}"
        )


def check_no_foreign_files(names_of_set: Iterable[str], present_names: Iterable[str], place: str) -> None:
    """Raises ValueError if there is a Parquet file that the set does not have. `datasets` would read it as rows.

    Args:
        names_of_set (`Iterable[str]`): Names of the Parquet files of the set.
        present_names (`Iterable[str]`): Names of the files that are there.
        place (`str`): Folder or URL of the set.
    """
    names_of_set = set(names_of_set)
    for name in sorted(present_names):
        if name.endswith(".parquet") and name not in names_of_set:
            raise ValueError(f"`{place}/{name}` must not be there, because the token set has no such file. Move it.")


class TokenSet:
    """A complete token set. Only files that its manifest names are read, and each is compared with it.

    Args:
        name (`str`): Folder of the set, its URL for `fsspec`, or its name on the Hub.

    Attributes:
        settings ([`TokenSettings`]): What all rows share.
        options (`dict[str, Any]`): Options that the set was made with.
        totals (`dict[str, int]`): Numbers of images, rows, ids, skipped images and files.
        records (`list[PartRecord]`): All parts in their order, without the lists of skipped images.
        files (`list[TokenFile]`): Parquet files in the order of the rows.
        digest (`str`): Checksum of the manifest, which names the content of all files.

    Raises:
        OSError: The set does not exist or cannot be reached.
        ValueError: It is not a token set, is not complete, or its manifest is damaged.
    """

    def __init__(self, name: str | os.PathLike):
        self.name = os.fspath(name).rstrip("/")
        content = read_settings_file(self.name)
        self.settings = parse_settings(content, self.name)
        # Beside the settings, the file holds entries that `parse_settings` does not return.
        entries = parse_json_object(content, f"{self.name}/{SETTINGS_FILE}")
        self.options: dict[str, Any] = entries.get("options", {})
        self.totals: dict[str, int] = entries.get("totals", {})
        self.digest = str(entries.get(MANIFEST_CHECKSUM))
        self.records = self._read_manifest(self.digest)  # raises if the checksum is missing or wrong
        self.files: list[TokenFile] = []
        for record in self.records:
            self.files += record.files

    @property
    def features(self) -> datasets.Features:
        """Columns of the rows, as the set was made with them."""
        return datasets.Features.from_dict(self.options.get("columns", {}))

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return sum(file.rows for file in self.files)

    def check_files(self) -> None:
        """Raises ValueError unless all files are there and have their sizes, and no others are there."""
        if is_token_set_on_hub(self.name):
            return  # its files are compared when they are read
        check_sizes(self.records, Folder(self.name).sizes(DATA), self.name)

    def read_file(self, file: TokenFile) -> bytes:
        """Reads a file.

        Raises:
            ValueError: The file is missing, or is not the one that the manifest names.
        """
        content = read_set_file(self.name, file.name)
        if content is None:
            remedy = self._remedy(file)
            raise ValueError(f"`{self.name}/{file.name}` is missing, although the manifest names it. {remedy}")
        checksum = hashlib.sha256(content).hexdigest()
        if len(content) != file.size or checksum != file.checksum:
            raise ValueError(
                f"`{self.name}/{file.name}` must be the file that the manifest of the set names, but has other "
                f"content. {self._remedy(file)}"
            )
        return content

    def read_columns(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields the values of some columns of all rows, in their order."""
        for file in self.files:
            table = self._open(file)
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=list(columns)):
                yield from batch.to_pylist()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields all rows in their order. Only one file is in memory at a time."""
        for file in self.files:
            table = self._open(file)
            for batch in table.iter_batches(ROWS_AT_A_TIME):
                yield from batch.to_pylist()

    def load(self) -> datasets.Dataset:
        """Copies all rows to the cache of `datasets`, unless they are there.

        Raises:
            OSError: The set cannot be reached.
            ValueError: A file is missing, cut or foreign, or was replaced since the copy.
        """
        self.check_files()  # by their sizes alone
        paths = [self._path(file) for file in self.files]
        patterns = [_pattern_of(path) for path in paths]  # `datasets` takes no paths, but patterns
        with explained_set(self.name, "token"):
            # `datasets` knows a file by its path and its time, which another set at the same path may have as well.
            # The name of the config is part of the folder of the copy. So each set has a copy of its own.
            builder = datasets.load_dataset_builder(
                "parquet",
                name=self.digest,
                data_files={"train": patterns},
                fragment_scan_options=VERIFY_CHECKSUMS,
            )
        is_copied = os.path.exists(builder.cache_dir)
        if not is_copied:
            # A wrong file must not get into the cache, from which later calls take the rows without reading the files
            # again. So the checksum of each file is compared with the manifest first.
            for file in self.files:
                self.read_file(file)  # raises if the file has another checksum
        with explained_set(self.name, "token"):
            builder.download_and_prepare()
            rows = builder.as_dataset("train")
        if len(rows) != self.num_rows:
            raise ValueError(f"`{self.name}` must have {self.num_rows:,} rows, but has {len(rows):,}. {REMEDY}")
        return rows

    def _remedy(self, file: TokenFile) -> str:
        """Advice for a file that is missing or damaged."""
        for record in self.records:
            if file in record.files:
                return remedy_for_part(record.part, len(self.records))
        return REMEDY

    def _path(self, file: TokenFile) -> str:
        """Local path or URL of a file."""
        if is_token_set_on_hub(self.name):
            return str(download_set_file(self.name, file.name))
        return f"{self.name}/{file.name}"

    def _open(self, file: TokenFile) -> pq.ParquetFile:
        """Opens a file. Raises ValueError if it is damaged, or of a set with other settings."""
        path = f"{self.name}/{file.name}"
        content = self.read_file(file)
        try:
            table = pq.ParquetFile(io.BytesIO(content))
            metadata = table.schema_arrow.metadata or {}
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"`{path}` must be a Parquet file, but is damaged: {error}.") from error
        settings = metadata.get(METADATA_KEY.encode())
        if settings is None or parse_settings(settings, path) != self.settings:
            raise ValueError(f"`{path}` must have the settings of the set, but has others. {REMEDY}")
        return table

    def _read_manifest(self, checksum: str) -> list[PartRecord]:
        """Reads the records of all parts from the manifest, whose SHA-256 the settings name."""
        path = f"{self.name}/{MANIFEST_FILE}"
        content = read_set_file(self.name, MANIFEST_FILE)
        if content is None:
            raise ValueError(f"`{path}` is missing, which names the files of the set. {REMEDY_FOR_MANIFEST}")
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError(
                f"`{path}` must be the manifest that {SETTINGS_FILE} names, but has changed. {REMEDY_FOR_MANIFEST}"
            )
        records = []
        for line in content.splitlines():
            entry = parse_json_object(line, path)
            # In the manifest, `skipped` is the number of skipped images. In a `PartRecord` it is a list of them, which
            # is not needed here.
            entry["skipped"] = []
            records.append(PartRecord.from_entry(entry, path))
        return records


def load_rows(name: str | os.PathLike) -> datasets.Dataset:
    """Loads the rows of a token set by `datasets`, after a comparison of the checksums of all its files.

    The rows are copied to the cache of `datasets`. Before the copy, the SHA-256 of each file is compared with the
    manifest. Later calls read the copy. They compare only the sizes of the files.

    Args:
        name (`str` or `os.PathLike`): Folder of the set, its URL for `fsspec`, or its name on the Hub.

    Raises:
        OSError: The set cannot be reached.
        ValueError: A file is missing or damaged, or was replaced since the copy.
    """
    return TokenSet(name).load()


def _pattern_of(path: str) -> str:
    """Pattern that matches one file alone, even if its path has wildcards such as `[` in it."""
    if is_url(path):
        return path.replace("[", "[[]")
    return glob.escape(path)
