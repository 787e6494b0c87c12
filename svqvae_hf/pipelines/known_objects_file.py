"""The file of what a language model can draw, which lies beside its weights."""

import json
import os
from pathlib import Path
from typing import Any

from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import write_file
from svqvae_hf.loaders.saved_parts import find_part
from svqvae_hf.pipelines.known_objects import KnownObjects

KNOWN_OBJECTS_FILE = "known_objects.json"


def read_known_objects(source: str | os.PathLike, **options: Any) -> KnownObjects | None:
    """Reads the known objects of a language model; None if it has none.

    Args:
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        **options: Options of the Hub, such as `revision`.

    Raises:
        ValueError: The file is damaged.
    """
    path = find_part(source, "", KNOWN_OBJECTS_FILE, options)
    if path is None:
        return None
    entries = read_json_object(path)
    # A file may lack these two lists. They only tell the user what the model can draw.
    entries.setdefault("objects", [])
    entries.setdefault("grounds", [])
    for key in ("names", "things", "objects", "grounds"):
        if not isinstance(entries.get(key), list):
            raise ValueError(f"`{path}` must have a list of `{key}`. Restore the file, or delete it.")
    return KnownObjects(
        names=frozenset(entries["names"]),
        things=frozenset(entries["things"]),
        objects=tuple(entries["objects"]),
        grounds=tuple(entries["grounds"]),
    )


def write_known_objects(objects: KnownObjects, folder: str | os.PathLike) -> None:
    """Writes the known objects to the folder of a language model."""
    entries = {
        "objects": objects.objects,
        "grounds": objects.grounds,
        "names": sorted(objects.names),
        "things": sorted(objects.things),
    }
    text = json.dumps(entries, indent=0) + "\n"
    write_file(Path(folder, KNOWN_OBJECTS_FILE), text.encode())
