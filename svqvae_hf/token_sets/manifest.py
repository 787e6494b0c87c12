"""Joins the parts of a token set: which files are the set, which images were skipped, and its card."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import datasets

from svqvae_hf.files.folders import Folder
from svqvae_hf.token_sets.cards import token_set_card
from svqvae_hf.token_sets.records import RECORDS, PartRecords
from svqvae_hf.token_sets.settings import SETTINGS_FILE, TokenSettings

MANIFEST_FILE = "manifest.jsonl"
SKIPPED_FILE = "skipped.jsonl"
CARD_FILE = "README.md"


def read_totals(folder: Folder) -> dict[str, int] | None:
    """Reads the numbers of images, rows, ids, skipped images and files; `None` if the set is not complete."""
    content = folder.read(SETTINGS_FILE)
    return None if content is None else json.loads(content).get("totals")


def join_parts(
    folder: Folder,
    records: PartRecords,
    settings: TokenSettings,
    features: datasets.Features,
    options: Mapping[str, Any],
    license: str | None,
    source_set: str | None,
    repo_id: str,
) -> None:
    """Completes a token set from the gathered records of its parts. Opens no Parquet file.

    The settings are written last: they make the set complete. Then the records are deleted.

    Args:
        folder ([`Folder`]): Folder of the set.
        records ([`PartRecords`]): Records of its parts.
        settings ([`TokenSettings`]): Settings of the set.
        features (`datasets.Features`): Columns of the set.
        options (`Mapping[str, Any]`): Options on which the ids depend, beside the settings.
        license (`str`, *optional*): Licence of the images, for the card.
        source_set (`str`, *optional*): Name of the image set on the Hub, for the card.
        repo_id (`str`): Name of the set in the example on the card.

    Raises:
        FileNotFoundError: Some records are not gathered.
        ValueError: No image could be read.
    """
    totals = dict.fromkeys(("images", "rows", "ids", "skipped", "files"), 0)
    first_skipped = ""
    with folder.new_file(MANIFEST_FILE) as path, folder.new_file(SKIPPED_FILE) as skipped_path:
        with open(path, "w") as manifest, open(skipped_path, "w") as skipped:
            for record in records.read_gathered():
                images = record.pop("skipped")
                for image in images:
                    first_skipped = first_skipped or f" The first, `{image['key']}`: {image['reason']}"
                    skipped.write(json.dumps(image) + "\n")
                manifest.write(json.dumps(record | {"skipped": len(images)}) + "\n")
                totals["skipped"] += len(images)
                totals["files"] += len(record["files"])
                for name in ("images", "rows", "ids"):
                    totals[name] += record[name]
        if not totals["rows"]:
            raise ValueError(f"at least one image must be readable, but none of {totals['images']} is.{first_skipped}")
    card = token_set_card(
        repo_id=repo_id,
        settings=dataclasses.asdict(settings),
        columns=features,
        images=totals["images"],
        rows=totals["rows"],
        license=license,
        source_set=source_set,
    )
    folder.write(CARD_FILE, card.encode())
    complete = json.loads(settings.to_json()) | {"options": options, "totals": totals}
    folder.write(SETTINGS_FILE, (json.dumps(complete, indent=2) + "\n").encode())
    folder.delete_folder(RECORDS)
