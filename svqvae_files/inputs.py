"""Input files: which files a path, a folder or a pattern stands for."""

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "svqvae_hf"
DEFAULT_MODEL = str(PACKAGE / "pretrained")  # folder of the small bundled model
DEFAULT_GENERATOR = str(PACKAGE / "pretrained_scenes")  # of the bundled language model that draws
BUNDLED = {"bundled": DEFAULT_MODEL, "scenes": DEFAULT_GENERATOR}  # names that commands and scripts take for them


def find_bundled(name: str) -> str:
    """Folder of a bundled model by its name, `bundled` or `scenes`, unless a file or folder of that name exists."""
    return name if os.path.exists(name) else BUNDLED.get(name, name)


def check_local(name: str) -> str:
    """Returns a path or a name on the Hub. Raises for a URL, which would be taken for a local path otherwise."""
    if match := re.match(r"([a-zA-Z][\w+.-]*)://", name):
        raise ValueError(
            f"`{name}` must be a local path or a name on the Hub, because `{match[1]}://` is not supported. Mount it."
        )
    return name


def walk_files(folder: str | os.PathLike) -> list[str]:
    """Lists the files of a folder and its subfolders, except for hidden ones.

    Args:
        folder (`str` or `os.PathLike`): Folder to search. Links are followed, except to a folder above them.

    Returns:
        `list[str]`: Paths relative to the folder, in order.
    """

    def fail(error: OSError) -> None:
        raise error

    root = os.path.join(folder, "")
    found: list[str] = []
    for here, folders, names in os.walk(root, onerror=fail, followlinks=True):
        above = {path.resolve() for path in (Path(here), *Path(here).parents)}
        folders[:] = [name for name in folders if name[0] != "." and Path(here, name).resolve() not in above]
        found += [os.path.join(here[len(root) :], name) for name in names if name[0] != "."]
    return sorted(found)


def readable(name: str) -> str:
    """Name of a file as text that can be stored and shown: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{00..07}` to numbers of equal width, and `{a,b}` to each of its words."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    options = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    if not options:
        raise ValueError(f"`{match[0]}` in `{pattern}` must count upwards.")
    expanded = [expand_braces(f"{pattern[: match.start()]}{option}{pattern[match.end() :]}") for option in options]
    return [each for patterns in expanded for each in patterns]
