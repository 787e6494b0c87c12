"""Parts of a token set: the files of a finished part, which parts are finished, and the set that all of them complete.

A part is a pure function of the image set, the options and its number. It is finished when its record exists, which
is written last, and its files are as the record says. Two processes that make the same part write the same files.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from svqvae_files.file_names import STARTED_TOKEN_SET_FILE
from svqvae_files.folders import Folder
from svqvae_files.identity import value_digest
from svqvae_files.json_files import parse_json_object
from svqvae_files.outputs import TEMPORARY_NAME
from svqvae_hf.token_sets.classes import list_classes
from svqvae_hf.token_sets.manifest import (
    DATA,
    MANIFEST_CHECKSUM,
    MANIFEST_FILE,
    PartRecord,
    TokenFile,
    TokenSet,
    check_no_foreign_files,
)
from svqvae_hf.token_sets.settings import ADVICE_FOR_DAMAGED, SETTINGS_FILE, lost_file_error

OPTIONS_FILE = STARTED_TOKEN_SET_FILE
RECORDS = os.path.dirname(OPTIONS_FILE)
SKIPPED_FILE = "skipped.jsonl"
CARD_FILE = "README.md"
COLUMNS = "columns"  # option that holds the columns of the rows, with the names of their classes
NUM_IMAGES = "images"  # option that holds their number
DIGESTS_OF_IMAGES = ("image_set", "image_files")  # options that hold digests of the set and of its files
OPTIONS_OF_IMAGES = (COLUMNS, NUM_IMAGES, *DIGESTS_OF_IMAGES)  # options that differ for other images
RECORD_NAME = re.compile(r"(?P<part>\d{7})\.json")
EXCERPT_LENGTH = 80  # of options in errors
SHARD_NAME = re.compile(DATA + r"/\d{4}-\d{4}/train-(?P<part>\d{7})-\d{5}\.parquet")


def describe_state(out: str | os.PathLike) -> dict[str, str]:
    """Describes how many parts a token set has, and which are missing.

    Args:
        out (`str` or `os.PathLike`): Folder of the set, or its URL for `fsspec`.

    Raises:
        OSError: The folder cannot be read.
        ValueError: It is not a token set; or a file of a complete set is missing, cut or foreign.
    """
    folder = Folder(out)
    options = read_options(folder)
    error = lost_file_error(folder)
    if error is not None:
        raise error
    if options is None or "parts" not in options:
        raise ValueError(f"`{folder.url}` must be a token set, but has no record of one. Start it: svqvae tokenize.")
    num_parts = options["parts"]
    if is_complete(folder):
        TokenSet(folder.url).check_files()
        return {"parts": f"{num_parts} (complete; finished: {num_parts})"}
    records = read_records(folder, options)
    missing_parts = [part for part in range(num_parts) if part not in records]
    num_finished = num_parts - len(missing_parts)
    facts = {"parts": f"{num_parts} (not complete; finished: {num_finished})"}
    if missing_parts:
        facts["missing"] = _ranges(missing_parts)
    return facts


# Options


def read_options(folder: Folder) -> dict[str, Any] | None:
    """Reads the options that a token set was started with; `None` if there is no token set."""
    # A process that completes the set writes the settings and then deletes the file of options. So at any moment, the
    # options are in one of the two files, and the file of options must be read first.
    options = _read_object(folder, OPTIONS_FILE)
    if options is not None:
        return options
    settings = _read_object(folder, SETTINGS_FILE)
    if settings is None:
        return None
    return settings.get("options", {})


def restore_options(folder: Folder, options: Mapping[str, Any]) -> None:
    """Writes the options of a token set again if they are lost.

    The records of its parts, or the lines of its manifest, say whether these options are the right ones. From the
    manifest, the records are written again, too. Then the set can be completed as if it had never been complete.

    Raises:
        ValueError: A part was made with other options, or the records are damaged.
    """
    if lost_file_error(folder) is None:
        return
    records = _records_of_manifest(folder) + _stored_records(folder)
    digest = value_digest(options)
    for record in records:
        if record.options != digest:
            raise ValueError(
                f"`{folder.url}` has lost its options, and part {record.part} was made with other images or options "
                "than those of this command. Run the command that made this part, or choose another folder."
            )
    for record in records:
        write_record(folder, record)
    _create_options(folder, options)


def _create_options(folder: Folder, options: Mapping[str, Any]) -> None:
    """Writes the file of options, unless another process has done so."""
    folder.create(OPTIONS_FILE, json.dumps(options, indent=2).encode())


def _stored_records(folder: Folder) -> list[PartRecord]:
    """Records of the parts of a set that is not complete, whatever their options are."""
    records = []
    for part in sorted(_recorded_parts(folder)):
        record = _parse_record(folder, part)
        if record is not None:
            records.append(record)
    return records


def _records_of_manifest(folder: Folder) -> list[PartRecord]:
    """Records of the parts in the manifest of a set that was complete; none if there is no manifest."""
    manifest = folder.read(MANIFEST_FILE) or b""
    skipped_lines = (folder.read(SKIPPED_FILE) or b"").splitlines()
    skipped = [parse_json_object(line, f"{folder.url}/{SKIPPED_FILE}") for line in skipped_lines]
    records = []
    for line in manifest.splitlines():
        path = f"{folder.url}/{MANIFEST_FILE}"
        entry = parse_json_object(line, path)
        num_skipped = entry.get("skipped", 0)
        if len(skipped) < num_skipped:
            raise ValueError(
                f"`{folder.url}/{SKIPPED_FILE}` must list all skipped images that {MANIFEST_FILE} counts, but does "
                "not. Copy it again, or make the set again in another folder."
            )
        entry["skipped"] = skipped[:num_skipped]  # they are listed in the order of the parts
        skipped = skipped[num_skipped:]
        records.append(PartRecord.from_entry(entry, path))
    return records


def start_set(folder: Folder, options: Mapping[str, Any]) -> None:
    """Starts a token set, or raises ValueError if it was started with other options, even a moment ago."""
    if read_options(folder) is None:
        _create_options(folder, options)
    check_options(folder, options)


def check_options(folder: Folder, options: Mapping[str, Any]) -> None:
    """Raises ValueError if a token set was started with other options."""
    recorded = read_options(folder)
    if recorded is None:
        raise ValueError(f"`{folder.url}` was deleted while this process worked on it. Run the command again.")
    changes_of_images = _changes_of_images(recorded, options)
    all_names = list(dict.fromkeys([*recorded, *options]))
    for name in all_names:
        recorded_value = recorded.get(name)
        value = options.get(name)
        if recorded_value == value:
            continue
        if name in OPTIONS_OF_IMAGES and changes_of_images:
            raise _changed_images(folder, "; ".join(changes_of_images))
        if name in DIGESTS_OF_IMAGES:
            difference = "names, sizes or times of change of their files, or columns or classes, differ"
            raise _changed_images(folder, difference)
        old_text, new_text = _differing_excerpts(repr(recorded_value), repr(value))
        raise ValueError(
            f"`{folder.url}` must be continued with the same images and options, but it was made otherwise: "
            f"`{name}` was {old_text} and is now {new_text}. Choose another folder, or pass --overwrite to delete the "
            "set and start over."
        )


def _changes_of_images(recorded: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Changes of the number of images and of their classes, in words."""
    changes = []
    if recorded.get(NUM_IMAGES) != options.get(NUM_IMAGES):
        changes.append(f"their number was {recorded.get(NUM_IMAGES)} and is now {options.get(NUM_IMAGES)}")
    recorded_classes = _class_names(recorded)
    classes = _class_names(options)
    new_classes = sorted(classes - recorded_classes)
    if new_classes:
        changes.append(f"new classes: {list_classes(new_classes)}")
    missing_classes = sorted(recorded_classes - classes)
    if missing_classes:
        changes.append(f"missing classes: {list_classes(missing_classes)}")
    return changes


def _class_names(options: Mapping[str, Any]) -> set[str]:
    """Names of the classes of all columns, each in backticks."""
    names = set()
    for feature in options.get(COLUMNS, {}).values():
        for name in feature.get("names", []):
            names.add(f"`{name}`")
    return names


def _differing_excerpts(old: str, new: str) -> tuple[str, str]:
    """Excerpts of two texts from the place where they differ: their starts, unless these are equal."""
    if old[:EXCERPT_LENGTH] != new[:EXCERPT_LENGTH]:
        return old[:EXCERPT_LENGTH], new[:EXCERPT_LENGTH]
    start = 0
    for start in range(0, len(old), EXCERPT_LENGTH // 2):
        end = start + EXCERPT_LENGTH
        if old[start:end] != new[start:end]:
            break
    return f"...{old[start:end]}", f"...{new[start:end]}"


def _changed_images(folder: Folder, difference: str) -> ValueError:
    """Error for images that differ. Which of them do is not recorded, so it says how to find them on a disk."""
    advice = "Restore them"
    is_started = folder.read(OPTIONS_FILE) is not None  # and not complete. The file is as old as the set.
    if folder.is_local and is_started:
        advice = f"`find IMAGES -cnewer {folder.url}/{OPTIONS_FILE}` lists changed files, and folders that lost some"
    return ValueError(
        f"`{folder.url}` must be continued with the same images, but {difference}. {advice}. `cp -p` and `rsync -t` "
        "restore files with their times. docs/token_sets.md says what to do if a photograph is gone for good. Or pass "
        "--overwrite to delete the set and start over."
    )


# Records of finished parts


def record_name(part: int) -> str:
    """Name of the record of a part."""
    return f"{RECORDS}/{part:07}.json"


def write_record(folder: Folder, record: PartRecord) -> None:
    """Records a part, which marks it as finished."""
    folder.write(record_name(record.part), json.dumps(record.to_entry()).encode())


def unfinished_parts(folder: Folder, options: Mapping[str, Any], parts: Iterable[int]) -> Iterator[int]:
    """Yields each part that is not finished when its turn comes.

    Raises:
        ValueError: A record is damaged or was made with other options; or the set is complete, and one of its files is
            missing, cut or foreign.
    """
    if is_complete(folder):
        TokenSet(folder.url).check_files()
        return
    for part in parts:
        if not is_finished(folder, options, part):
            yield part


def is_finished(folder: Folder, options: Mapping[str, Any], part: int) -> bool:
    """Whether a part is finished, and its files are there and whole.

    Raises:
        ValueError: The record of the part is damaged or was made with other options.
    """
    if is_complete(folder):
        return True
    record = _read_record(folder, options, part)
    if record is None:
        return False
    return _has_files(record, folder.sizes(DATA))


def read_records(folder: Folder, options: Mapping[str, Any]) -> dict[int, PartRecord]:
    """Reads the records of the parts that are finished, and whose files are there and whole.

    Raises:
        ValueError: A record is damaged, or was made with other options.
    """
    records = {}
    sizes = folder.sizes(DATA)
    for part in sorted(_recorded_parts(folder)):
        record = _read_record(folder, options, part)
        if record is not None and _has_files(record, sizes):
            records[part] = record
    return records


def _recorded_parts(folder: Folder) -> set[int]:
    """Numbers of the parts that have a record."""
    parts = set()
    for name in folder.names(RECORDS):
        match = RECORD_NAME.fullmatch(name)
        if match is not None:
            parts.add(int(match["part"]))
    return parts


def _read_record(folder: Folder, options: Mapping[str, Any], part: int) -> PartRecord | None:
    """Reads the record of a part; `None` if there is none. Raises ValueError if it is of another part or set."""
    name = record_name(part)
    record = _parse_record(folder, part)
    if record is None:
        return None
    is_of_this_set = record.part == part and record.options == value_digest(options)
    if not is_of_this_set:
        raise ValueError(
            f"`{folder.url}/{name}` must be the record of part {part} of this set, but is of part {record.part}, or "
            "of other images or options. Delete it, and the part is made again."
        )
    return record


def _parse_record(folder: Folder, part: int) -> PartRecord | None:
    """Reads the record of a part, without a check that it belongs to this set; `None` if there is none."""
    name = record_name(part)
    entry = _read_object(folder, name)
    if entry is None:
        return None
    with _advice_for_damaged():
        return PartRecord.from_entry(entry, f"{folder.url}/{name}")


def _has_files(record: PartRecord, sizes: Mapping[str, int]) -> bool:
    """Whether the files of a part are there and whole."""
    return all(sizes.get(file.name) == file.size for file in record.files)


# The complete set


def is_complete(folder: Folder) -> bool:
    """Whether a token set is complete."""
    return read_totals(folder) is not None


def read_totals(folder: Folder) -> dict[str, int] | None:
    """Reads the numbers of images, rows, ids, skipped images and files; `None` if the set is not complete."""
    settings = _read_object(folder, SETTINGS_FILE)
    if settings is None:
        return None
    return settings.get("totals")


def complete_set(folder: Folder, settings: dict[str, Any], card: Callable[..., str]) -> dict[str, int] | None:
    """Completes a token set if all its parts are finished.

    The settings are written last: they mark the set as complete. Then the records are deleted. No Parquet file is
    opened.

    Args:
        folder ([`Folder`]): Folder of the set.
        settings (`dict[str, Any]`): Content of the settings, with the options.
        card (`Callable`): Returns the text of the card for `totals`.

    Returns:
        `dict[str, int]`, *optional*: Numbers of images, rows, ids, skipped images and files; `None` if the set is not
        complete.

    Raises:
        ValueError: No image could be read; parts were made with other options; or there is a foreign file.
    """
    totals = read_totals(folder)
    if totals is None:
        totals = _write_set_if_finished(folder, settings, card)
    if totals is None:
        return None
    _delete_temporary_files(folder)
    _delete_records(folder)
    return totals


def _write_set_if_finished(
    folder: Folder, settings: dict[str, Any], card: Callable[..., str]
) -> dict[str, int] | None:
    """Completes a set by the records of its parts. Returns its totals, or `None` if parts are missing."""
    options = settings["options"]
    num_parts = options["parts"]
    num_recorded = len(_recorded_parts(folder))  # by the names of the records, which takes less time than reading them
    if num_recorded < num_parts:
        return None
    records = read_records(folder, options)  # without the parts that have lost a file
    if len(records) < num_parts:
        # If another process has just completed the set, it is deleting the records, and there are totals now. If a
        # part has lost a file, there are none.
        return read_totals(folder)
    records_in_order = [records[part] for part in range(num_parts)]
    return _write_set_or_read_totals(folder, settings, records_in_order, card)


def _write_set_or_read_totals(
    folder: Folder, settings: dict[str, Any], records: Sequence[PartRecord], card: Callable[..., str]
) -> dict[str, int]:
    """Completes a set by the records of all its parts, unless another process does so first. Returns its totals."""
    try:
        return _write_set(folder, settings, records, card)
    except FileNotFoundError:
        # The process that was first has deleted the temporary files of this one.
        totals = read_totals(folder)
        if totals is None:
            raise
        return totals


def _write_set(
    folder: Folder, settings: dict[str, Any], records: Sequence[PartRecord], card: Callable[..., str]
) -> dict[str, int]:
    """Writes what a complete set has besides the files of its parts. Returns its totals."""
    files: list[TokenFile] = []
    skipped: list[dict[str, str]] = []
    entries = []  # of the manifest, one per part
    for record in records:
        files += record.files
        skipped += record.skipped
        entry = record.to_entry()
        entry["skipped"] = len(record.skipped)
        entries.append(entry)
    totals = add_up(records)
    if totals["rows"] == 0:
        raise _no_readable_image(totals["images"], skipped)
    check_no_foreign_files([file.name for file in files], folder.sizes(DATA), folder.url)
    manifest = _json_lines(entries)
    folder.write(MANIFEST_FILE, manifest)
    folder.write(SKIPPED_FILE, _json_lines(skipped))
    folder.write(CARD_FILE, card(totals=totals).encode())
    # Another process may have deleted the set meanwhile, and started one with other options in the same folder.
    check_options(folder, settings["options"])
    content = dict(settings)
    content["totals"] = totals
    content[MANIFEST_CHECKSUM] = hashlib.sha256(manifest).hexdigest()
    text = json.dumps(content, indent=2) + "\n"
    folder.write(SETTINGS_FILE, text.encode())  # last, because it marks the set as complete
    return totals


def _no_readable_image(num_images: int, skipped: Sequence[Mapping[str, str]]) -> ValueError:
    """Error for a set whose images were all skipped. It names the first one."""
    example = ""
    if skipped:
        first_image = skipped[0]
        example = f" The first, `{first_image['key']}`: {first_image['reason']}"
    return ValueError(f"at least one image must be readable, but none of {num_images} is.{example}")


def add_up(records: Sequence[PartRecord]) -> dict[str, int]:
    """Numbers of images, rows, ids, skipped images and files of some parts."""
    totals = dict.fromkeys(("images", "rows", "ids", "enlarged", "skipped", "files"), 0)
    for record in records:
        totals["images"] += record.images
        totals["rows"] += record.rows
        totals["ids"] += record.ids
        totals["enlarged"] += record.enlarged
        totals["skipped"] += len(record.skipped)
        totals["files"] += len(record.files)
    return totals


def delete_set(folder: Folder) -> None:
    """Deletes all files of a token set, and nothing else.

    Raises:
        ValueError: There is a Parquet file that the set does not have.
    """
    options = read_options(folder)
    if options is None:
        return
    num_parts = options.get("parts", 0)
    shards = []  # names of the Parquet files of the set
    subfolders = set()
    present_names = folder.sizes(DATA)
    for name in present_names:
        match = SHARD_NAME.fullmatch(name)
        is_shard_of_set = match is not None and int(match["part"]) < num_parts
        if is_shard_of_set:
            shards.append(name)
            subfolders.add(os.path.dirname(name))
    check_no_foreign_files(shards, present_names, folder.url)
    for name in [MANIFEST_FILE, SKIPPED_FILE, CARD_FILE, *shards]:
        folder.delete(name)
    _delete_temporary_files(folder)
    _delete_records(folder)
    folder.delete(SETTINGS_FILE)  # last, so that after a kill the set is still known as one
    for subfolder in sorted(subfolders):
        folder.delete_empty(subfolder)
    folder.delete_empty(DATA)


def _delete_records(folder: Folder) -> None:
    """Deletes the records of all parts and the options, so that only the settings tell of the set."""
    for part in sorted(_recorded_parts(folder)):
        folder.delete(record_name(part))
    folder.delete(OPTIONS_FILE)
    for name in folder.names(RECORDS):
        if TEMPORARY_NAME.fullmatch(name):
            folder.delete(f"{RECORDS}/{name}")
    folder.delete_empty(RECORDS)


def _delete_temporary_files(folder: Folder) -> None:
    """Deletes the temporary files of processes that were killed."""
    for name in folder.sizes(DATA):
        if TEMPORARY_NAME.fullmatch(os.path.basename(name)):
            folder.delete(name)
    for name in folder.names(""):
        if TEMPORARY_NAME.fullmatch(name):
            folder.delete(name)


def _read_object(folder: Folder, name: str) -> dict[str, Any] | None:
    """Reads a JSON object from a file; `None` if there is no file."""
    content = folder.read(name)
    if content is None:
        return None
    with _advice_for_damaged():
        return parse_json_object(content, f"{folder.url}/{name}")


@contextmanager
def _advice_for_damaged() -> Iterator[None]:
    """Adds to a ValueError about a damaged file that it can be made again."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} {ADVICE_FOR_DAMAGED}") from error


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Content of a file with a JSON object per line."""
    lines = [f"{json.dumps(row)}\n" for row in rows]
    return "".join(lines).encode()


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, as `--array` of SLURM takes them: `3-5,9`."""
    runs: list[list[int]] = []  # of consecutive numbers
    for number in numbers:
        follows_last_run = len(runs) > 0 and number == runs[-1][-1] + 1
        if follows_last_run:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = []
    for run in runs:
        first = run[0]
        last = run[-1]
        texts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(texts)
