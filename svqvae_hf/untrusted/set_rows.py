"""Guards for the rows of image sets."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

ARCHIVES = ("bz2://", "gzip://", "lz4://", "tar://", "xz://", "zip://", "zstd://")  # before names of files in them


def confine_row(source: Any, repository: str | None) -> Any:
    """Makes a row of a Hub set unreadable if it names a file outside the set, such as one of the user's own files.

    Args:
        source: Image of a row: a mapping with `"bytes"` and `"path"`, or any other value, which names no file.
        repository (`str`, *optional*): Repository of the set on the Hub. Rows of a local set may name any file.

    Returns:
        `source`, with a `"fault"` if its path leads outside, so that `read_image` raises before it opens the file.
    """
    if repository is None or not isinstance(source, Mapping):
        return source
    names_file = source["bytes"] is None and source["path"] is not None
    if not names_file or _is_in_repository(source["path"], repository):
        return source
    fault = (
        f"the row must hold an image of its set, but names `{source['path']}`, which is not in the set. Store the set "
        "again with its images embedded."
    )
    return {**source, "fault": fault}


def _is_in_repository(path: str, repository: str) -> bool:
    """Whether a path of fsspec names a file of the repository, or a file in an archive of the repository.

    For example, `zip://a.png::hf://datasets/org/set@main/b.zip` is the file `a.png` in the archive `b.zip`. The
    innermost file comes first. Archives may lie in archives.
    """
    names = path.split("::")
    outermost_file = names[-1]  # such as "hf://datasets/org/set@main/b.zip"
    if not _is_file_of_repository(outermost_file, repository):
        return False
    names_in_archives = names[:-1]  # such as ["zip://a.png"]; a name such as "file://a.png" would lead outside
    return all(name.startswith(ARCHIVES) for name in names_in_archives)


def _is_file_of_repository(url: str, repository: str) -> bool:
    """Whether a URL such as `hf://datasets/org/set@main/b.zip` names a file of the repository."""
    match = re.fullmatch(rf"hf://datasets/{re.escape(repository)}@[^/]+/(.+)", url)
    if match is None:
        return False
    # The normal form of "a/../../b" is "../b". So a path that leads out of the repository shows it at its start.
    path = posixpath.normpath(match[1])
    leads_outside = path == ".." or path.startswith(("../", "/"))
    return not leads_outside
