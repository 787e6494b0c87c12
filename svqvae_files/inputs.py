"""Input files: which files a path, a folder or a pattern stands for."""

import os
import re
from pathlib import Path

from svqvae_files.file_names import BUNDLED, IMAGE_SUFFIXES

NUMBERS_IN_BRACES = r"\{(?P<first>\d+)\.\.(?P<last>\d+)\}"  # such as {00..07}
WORDS_IN_BRACES = r"\{(?P<words>[^{}]*,[^{}]*)\}"  # such as {a,b}
LOCAL_SCHEMES = ("file", "local", "memory")  # of URLs without a bucket or a server


def find_bundled(name: str) -> str:
    """Folder of a bundled model by its name, `bundled` or `scenes`. Any other name is returned as it is.

    Raises:
        ValueError: If the working directory has a file or folder of that name, other than a folder of pictures.
    """
    if name not in BUNDLED:
        return name
    if os.path.exists(name) and not holds_only_pictures(name):
        raise ValueError(
            f"`{name}` is both a bundled model and a file or folder here. Write `./{name}` for the folder, or run the "
            "command elsewhere for the bundled model."
        )
    return BUNDLED[name]


def holds_only_pictures(path: str) -> bool:
    """Whether a path is a folder of pictures, and so no model. Hidden files, such as records, may be there."""
    if not os.path.isdir(path):
        return False
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    are_pictures = [name.lower().endswith(IMAGE_SUFFIXES) for name in names]
    return len(names) > 0 and all(are_pictures)


def is_url(name: str) -> bool:
    """Whether a name is a URL, and not a path or a name on the Hub."""
    return "://" in name


def check_local(name: str) -> str:
    """Returns a path or a name on the Hub. Raises for a URL, which would be taken for a local path otherwise."""
    scheme = re.match(r"([a-zA-Z][\w+.-]*)://", name)
    if scheme is not None:
        raise ValueError(
            f"`{name}` must be a local path or a name on the Hub, because `{scheme[1]}://` is not supported. Mount it."
        )
    return name


def check_url(name: str) -> str:
    """Returns a path, a name on the Hub or a URL. Raises for a URL without a bucket, such as `s3://` or `s3:///a`."""
    if not is_url(name):
        return name
    scheme, _, path = name.partition("://")
    has_no_bucket = not path.strip("/") or path.startswith("/")
    if has_no_bucket and scheme not in LOCAL_SCHEMES:
        raise ValueError(f"`{name}` must name a bucket or a server. If it is a shell variable, set it.")
    return name


def walk_files(folder: str | os.PathLike, leave_out: str | os.PathLike | None = None) -> list[str]:
    """Lists the files of a folder and its subfolders, except for hidden ones.

    Args:
        folder (`str` or `os.PathLike`): Folder to search. Links are followed, except to a folder above them.
        leave_out (`str` or `os.PathLike`, *optional*): Subfolder that is not searched.

    Returns:
        `list[str]`: Paths relative to the folder, in order. Broken links and pipes are among them.

    Raises:
        OSError: A folder cannot be read.
    """
    root = os.path.join(folder, "")
    left_out = set()
    if leave_out is not None:
        left_out.add(Path(leave_out).resolve())
    files = []
    for current, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        subfolders[:] = _subfolders_to_search(Path(current), subfolders, left_out)  # `os.walk` continues with these
        relative_folder = current[len(root) :]
        for name in names:
            if not name.startswith("."):
                files.append(os.path.join(relative_folder, name))
    return sorted(files)


def _raise(error: OSError) -> None:
    """Raises an error that `os.walk` would pass over."""
    raise error


def _subfolders_to_search(folder: Path, names: list[str], left_out: set[Path]) -> list[str]:
    """Names of subfolders that are neither hidden, nor left out, nor links to the folder or to a folder above it."""
    real_folder = folder.resolve()
    folders_above = {path.resolve() for path in folder.parents}
    names_to_search = []
    for name in names:
        real_subfolder = Path(folder, name).resolve()
        is_link_upwards = real_subfolder == real_folder or real_subfolder in folders_above
        if not name.startswith(".") and real_subfolder not in left_out and not is_link_upwards:
            names_to_search.append(name)
    return names_to_search


def readable(name: str) -> str:
    """Name of a file as text that can be stored and shown: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(text: str) -> str:
    """Text for a terminal or a page: line breaks and control characters, which names may have, become escapes."""
    characters = []
    for character in text:
        if character.isprintable():
            characters.append(character)
        else:
            characters.append(ascii(character)[1:-1])
    return "".join(characters)


def expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{00..07}` to numbers of equal width, and `{a,b}` to each of its words."""
    braces = re.search(f"{NUMBERS_IN_BRACES}|{WORDS_IN_BRACES}", pattern)
    if braces is None:
        return [pattern]
    if braces["words"] is not None:
        options = braces["words"].split(",")
    else:
        first = int(braces["first"])
        last = int(braces["last"])
        width = len(braces["first"])
        options = [str(number).zfill(width) for number in range(first, last + 1)]
    if not options:
        raise ValueError(f"`{braces[0]}` in `{pattern}` must count upwards.")
    patterns = []
    text_before = pattern[: braces.start()]
    text_after = pattern[braces.end() :]
    for option in options:
        patterns += expand_braces(text_before + option + text_after)  # the text after may have braces, too
    return patterns
