"""Sets that `datasets` saved with `save_to_disk`: which Arrow files of their folder belong to them."""

import os
from collections.abc import Iterable

from svqvae_files.json_files import parse_json_object
from svqvae_hf.data.opened_files import opened_file
from svqvae_hf.data.tables import ARROW_SUFFIX

STATE_FILE = "state.json"
SHARDS = "_data_files"  # key in the state


def find_leftovers(paths: Iterable[str]) -> set[str]:
    """Finds Arrow files that lie beside a saved set and are not its shards.

    `map`, `filter` and `shuffle` of a loaded set write their results beside it, and a set that is saved anew leaves
    the shards of the earlier one there. The state of the saved set names its shards.

    Args:
        paths (`Iterable[str]`): Absolute paths or URLs of files.

    Raises:
        OSError: The state of a set cannot be read.
        ValueError: It is damaged.
    """
    shards_of_folder: dict[str, set[str] | None] = {}
    leftovers = set()
    for path in paths:
        is_on_web_server = path.startswith("http")  # where nothing can be listed, and a missing file may be an error
        if is_on_web_server or not path.lower().endswith(ARROW_SUFFIX):
            continue
        folder, name = os.path.split(path)
        if folder not in shards_of_folder:
            shards_of_folder[folder] = _read_shards(folder)
        shards = shards_of_folder[folder]
        if shards is not None and name not in shards:
            leftovers.add(path)
    return leftovers


def _read_shards(folder: str) -> set[str] | None:
    """Names of the shards of a saved set; `None` if the folder has no state of one."""
    path = f"{folder}/{STATE_FILE}"
    try:
        with opened_file(path) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    state = parse_json_object(content, path)
    if SHARDS not in state:  # a file of another program
        return None
    try:
        return {shard["filename"] for shard in state[SHARDS]}
    except (TypeError, KeyError) as error:
        raise ValueError(f"`{path}` must list files as `{SHARDS}`, but is damaged. Save the set again.") from error
