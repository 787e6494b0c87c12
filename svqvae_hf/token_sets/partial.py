"""A token set that is being written."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from svqvae_hf.atomic_io import write_file
from svqvae_hf.hub.repositories import push_output
from svqvae_hf.token_sets.cards import token_set_card
from svqvae_hf.token_sets.crops import CROPS
from svqvae_hf.token_sets.encoder import ShardContent, ShardName
from svqvae_hf.token_sets.settings import SETTINGS_FILE, TokenSettings
from svqvae_hf.tokens.token_files import METADATA_KEY

SKIPPED_FILE = "skipped.json"
SHARD_KEY = b"svqvae_shard"  # metadata of a Parquet file: number of images read for it, and the skipped ones


@dataclass(frozen=True)
class TokenizeReport:
    """Summary of a finished token set; `str` formats it.

    Args:
        out (`Path`): Folder of the set.
        images (`int`): Number of images of the image set, including the skipped ones.
        rows (`int`): Number of rows of the token set.
        shards (`int`): Number of Parquet files.
        skipped (`list[dict[str, str]]`): `key` and `reason` of each image that could not be read.
        url (`str`, *optional*): URL of the commit on the Hub; `None` if the set was not pushed.
    """

    out: Path
    images: int
    rows: int
    shards: int
    skipped: list[dict[str, str]]
    url: str | None

    def __str__(self) -> str:
        lines = [f"written  {self.out} (images: {self.images}, rows: {self.rows}, shards: {self.shards})"]
        if self.skipped:
            lines.append(f"skipped  {self.out / SKIPPED_FILE} (unreadable images: {len(self.skipped)})")
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


class PartialTokenSet:
    """A token set being written: its temporary folder and the shards finished so far.

    The folder `{out}.partial` and the record of the options, `{out}.partial.json`, stay after an interruption, so that
    the next run resumes.

    Args:
        out (`Path`): Folder of the finished set.
        settings ([`TokenSettings`]): Settings of the set.
        kept (`datasets.Features`): Columns of the image set that are kept.

    Raises:
        ValueError: A kept column has the name of a column of the token set.
    """

    def __init__(self, out: Path, settings: TokenSettings, kept: datasets.Features):
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.record = out.with_name(f"{out.name}.partial.json")
        self.settings = settings
        ids = datasets.List(datasets.Value(settings.id_dtype))
        columns = {f"ids_{index}": ids for index in range(len(settings.scales))}
        columns |= {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
        columns |= {"key": datasets.Value("string")}
        if len(CROPS[settings.crops]) > 1:
            columns |= {"crop": datasets.Value("string")}
        taken = sorted(set(columns) & set(kept))
        if taken:
            raise ValueError(
                f"columns of the image set must not have names of columns of the token set, but {', '.join(taken)} do."
            )
        self.features = datasets.Features({**columns, **kept})

    def create(self, options: Mapping[str, Any]) -> None:
        """Creates the folder and its record, or keeps them if an interrupted run left them.

        Args:
            options (`Mapping[str, Any]`): Options on which the ids depend, beside the settings.

        Raises:
            ValueError: The folder has no record.
        """
        if self.folder.exists() and not self.record.exists():
            raise ValueError(f"`{self.folder}` must have its record `{self.record}`, but has none. Delete the folder.")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.record.exists():
            write_file(self.record, self._record(options))
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        for temporary in self.folder.rglob(".*.tmp"):
            temporary.unlink()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises if the set was started with other options."""
        recorded, current = json.loads(self.record.read_bytes()), json.loads(self._record(options))
        for name, value in current.items():
            if recorded.get(name) != value:
                raise ValueError(
                    f"an interrupted run must resume with the same options, but in `{self.folder}` `{name}` was "
                    f"{recorded.get(name)!r:.80} and is now {value!r:.80}. Use the same value, or delete the folder "
                    "and its record."
                )

    def finished_shards(self) -> list[Path]:
        """Paths of the shards that are already written."""
        return sorted((self.folder / "data").glob("*.parquet"))

    def finished_images(self) -> int:
        """Number of images that were read for the finished shards."""
        return sum(_shard_facts(pq.read_metadata(path))["images"] for path in self.finished_shards())

    def write_shard(self, name: ShardName, content: ShardContent) -> None:
        """Writes a shard; the file is complete or absent."""
        schema = self.features.arrow_schema
        facts = {
            METADATA_KEY.encode(): self.settings.to_json().encode(),
            SHARD_KEY: json.dumps({"images": content.images, "skipped": content.skipped}).encode(),
        }
        table = pa.Table.from_pylist(content.rows, schema.with_metadata({**schema.metadata, **facts}))
        file = pa.BufferOutputStream()
        pq.write_table(table, file)
        write_file(self.folder / "data" / name.file, file.getvalue().to_pybytes())

    def commit(self, license: str | None, source_set: str | None, push_to_hub: str | None) -> TokenizeReport:
        """Adds settings and card, renames the folder to `out` and pushes it.

        Args:
            license (`str`, *optional*): Licence of the images, for the card.
            source_set (`str`, *optional*): Name of the image set on the Hub, for the card.
            push_to_hub (`str`, *optional*): `org/name` on the Hub.

        Raises:
            OSError: The set cannot be pushed.
            ValueError: No image could be read.
        """
        shards = [pq.read_metadata(path) for path in self.finished_shards()]
        facts = [_shard_facts(shard) for shard in shards]
        skipped = [image for shard in facts for image in shard["skipped"]]
        rows = sum(shard.num_rows for shard in shards)
        images = sum(shard["images"] for shard in facts)
        if not rows:
            first = f" The first, `{skipped[0]['key']}`: {skipped[0]['reason']}" if skipped else ""
            raise ValueError(f"at least one image must be readable, but none of {images} is.{first}")
        card = token_set_card(
            repo_id=push_to_hub or self.out.name,
            settings=dataclasses.asdict(self.settings),
            columns=self.features,
            images=images,
            rows=rows,
            license=license,
            source_set=source_set,
        )
        write_file(self.folder / SETTINGS_FILE, self.settings.to_json().encode())
        write_file(self.folder / SKIPPED_FILE, (json.dumps(skipped, indent=2) + "\n").encode())
        write_file(self.folder / "README.md", card.encode())
        self.folder.replace(self.out)
        self.record.unlink()
        url = push_output(self.out, push_to_hub, "Upload token set", repo_type="dataset") if push_to_hub else None
        return TokenizeReport(self.out, images, rows, len(shards), skipped, url)

    def _record(self, options: Mapping[str, Any]) -> bytes:
        record = {**dataclasses.asdict(self.settings), **options, "columns": self.features.to_dict()}
        return (json.dumps(record, indent=2) + "\n").encode()


def _shard_facts(metadata: pq.FileMetaData) -> dict[str, Any]:
    return json.loads(metadata.metadata[SHARD_KEY])
