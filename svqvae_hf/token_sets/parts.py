"""Parts of a token set: the files of a finished part, which parts are finished, and the set that all of them complete.

A part is a pure function of the image set, the options and its number. It is finished when its record exists, which
is written last. Two processes that make the same part write the same files.
"""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from svqvae_files.folders import Folder
from svqvae_hf.token_sets.settings import SETTINGS_FILE
from svqvae_hf.token_sets.shards import DATA

RECORDS = "parts"
OPTIONS_FILE = f"{RECORDS}/options.json"
MANIFEST_FILE = "manifest.jsonl"
SKIPPED_FILE = "skipped.jsonl"
CARD_FILE = "README.md"


@dataclass
class PartRecord:
    """Facts of a part. They are the same each time that the part is made.

    Args:
        part (`int`): Number of the part.
        read (`list[str]`): Files, or the range of images, that were read.
        images (`int`): Images that were read, including the skipped ones.
        rows (`int`): Rows that were written.
        ids (`int`): Ids in them, of all scales.
        enlarged (`int`): Images that are smaller than their crops.
        skipped (`list[dict[str, str]]`): `key` and `reason` of each image that could not be read.
        files (`list[dict[str, Any]]`): `name` and `rows` of each Parquet file.
    """

    part: int
    read: list[str]
    images: int = 0
    rows: int = 0
    ids: int = 0
    enlarged: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)


def describe_state(out: str | os.PathLike) -> dict[str, str]:
    """Describes how many parts a token set has, and which are missing.

    Args:
        out (`str` or `os.PathLike`): Folder of the set, or its URL for `fsspec`.

    Raises:
        OSError: The folder cannot be read.
        ValueError: It is not a token set.
    """
    folder = Folder(out)
    options = read_options(folder)
    if "parts" not in options:
        raise ValueError(f"`{folder.url}` must be a token set, but has no record of one. Start it: svqvae tokenize.")
    num_parts = options["parts"]
    finished = {*range(num_parts)} if read_totals(folder) is not None else finished_parts(folder)
    missing = [part for part in range(num_parts) if part not in finished]
    state = "not complete" if missing else "complete"
    facts = {"parts": f"{num_parts} ({state}; finished: {num_parts - len(missing)})"}
    return facts | ({"missing": _ranges(missing)} if missing else {})


def record_name(part: int) -> str:
    """Name of the record of a part."""
    return f"{RECORDS}/{part:07}.json"


def is_finished(folder: Folder, part: int) -> bool:
    """Whether a part is finished."""
    return folder.read(record_name(part)) is not None or read_totals(folder) is not None


def finished_parts(folder: Folder) -> set[int]:
    """Numbers of the parts that are finished, of a set that is not complete."""
    return {int(name[:7]) for name in folder.names(RECORDS) if name[:7].isdecimal()}


def read_totals(folder: Folder) -> dict[str, int] | None:
    """Reads the numbers of images, rows, ids, skipped images and files; `None` if the set is not complete."""
    return (folder.read_json(SETTINGS_FILE) or {}).get("totals")


def read_options(folder: Folder) -> dict[str, Any]:
    """Reads the options that a token set was started with. Returns an empty dict if there is no token set."""
    complete = folder.read_json(SETTINGS_FILE)
    return (folder.read_json(OPTIONS_FILE) or {}) if complete is None else complete.get("options", {})


def start_set(folder: Folder, options: Mapping[str, Any]) -> None:
    """Starts a token set, or raises if parts of it were made with other options."""
    recorded = read_options(folder)
    for name in {**recorded, **options}:
        before, now = recorded.get(name), options.get(name)
        if before != now and (finished_parts(folder) or read_totals(folder) is not None):
            reason = "the images have changed since" if name in ("images", "image_set") else "it was made otherwise"
            raise ValueError(
                f"`{folder.url}` must be continued with the same images and options, but {reason}: `{name}` was "
                f"{before!r:.80} and is now {now!r:.80}. Pass --overwrite to start over, or choose another folder."
            )
    if recorded != options:
        folder.write(OPTIONS_FILE, json.dumps(options, indent=2).encode())


def delete_set(folder: Folder) -> None:
    """Deletes all files of a token set."""
    for name in (SETTINGS_FILE, MANIFEST_FILE, SKIPPED_FILE, CARD_FILE, RECORDS, DATA):
        folder.delete(name)


def complete_set(folder: Folder, settings: dict[str, Any], card: Callable[..., str]) -> dict[str, int] | None:
    """Completes a token set if all its parts are finished. Deletes files that belong to no part.

    The settings are written last: they mark the set as complete. Then the records are deleted. No
    Parquet file is opened.

    Args:
        folder ([`Folder`]): Folder of the set.
        settings (`dict[str, Any]`): Content of the settings, with the options.
        card (`Callable`): Returns the text of the card for `totals`.

    Returns:
        `dict[str, int]`, *optional*: Numbers of images, rows, ids, skipped images and files; `None` if the set is not
        complete.

    Raises:
        ValueError: No image could be read.
    """
    num_parts, totals = settings["options"]["parts"], read_totals(folder)
    if totals is None:
        if len(finished_parts(folder)) < num_parts:
            return None
        contents = [folder.read_json(record_name(part)) for part in range(num_parts)]
        if None in contents:  # another process has completed the set at the same time
            return read_totals(folder)
        records = [PartRecord(**content) for content in contents if content]
        skipped = [image for record in records for image in record.skipped]
        totals = add_up(records)
        if not totals["rows"]:
            first = f" The first, `{skipped[0]['key']}`: {skipped[0]['reason']}" if skipped else ""
            raise ValueError(f"at least one image must be readable, but none of {totals['images']} is.{first}")
        files = {file["name"] for record in records for file in record.files}
        for name in set(folder.all_files(DATA)) - files:  # left by processes that were killed
            folder.delete(name)
        lines = [asdict(record) | {"skipped": len(record.skipped)} for record in records]
        for name, rows in ((MANIFEST_FILE, lines), (SKIPPED_FILE, skipped)):
            folder.write(name, "".join(json.dumps(row) + "\n" for row in rows).encode())
        folder.write(CARD_FILE, card(totals=totals).encode())
        folder.write(SETTINGS_FILE, (json.dumps(settings | {"totals": totals}, indent=2) + "\n").encode())
    folder.delete(RECORDS)
    return totals


def add_up(records: Sequence[PartRecord]) -> dict[str, int]:
    """Numbers of images, rows, ids, skipped images and files of some parts."""
    sums = {name: sum(getattr(one, name) for one in records) for name in ("images", "rows", "ids", "enlarged")}
    return sums | {name: sum(len(getattr(one, name)) for one in records) for name in ("skipped", "files")}


def _ranges(numbers: list[int]) -> str:
    """Numbers as SLURM's `--array` takes them: `3-5,9`."""
    grouped = itertools.groupby(enumerate(numbers), lambda each: each[1] - each[0])
    runs = [[number for _, number in group] for _, group in grouped]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
