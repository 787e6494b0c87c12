"""Guards for the rows of image sets."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

FILE_IN_ARCHIVE = r"(bz2|gzip|lz4|tar|xz|zip|zstd)://.*"  # as fsspec names it, before the name of the archive


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
    """Whether a path leads into the repository.

    A file of the repository is named like `hf://datasets/org/set@main/a.png`. A file in an archive is named before its
    archive: `zip://a.png::hf://datasets/org/set@main/a.zip` is `a.png` in `a.zip`. Archives may lie in archives.
    """
    names = path.split("::")
    name_in_repository = names[-1]  # such as "hf://datasets/org/set@main/a.zip"
    names_in_archives = names[:-1]  # such as ["zip://a.png"]
    match = re.fullmatch(rf"hf://datasets/{re.escape(repository)}@[^/]+/(.+)", name_in_repository)
    if match is None:
        return False
    path_in_repository = posixpath.normpath(match[1])  # such as "a.zip"
    leads_outside = path_in_repository == ".." or path_in_repository.startswith(("../", "/"))
    if leads_outside:
        return False
    return all(re.fullmatch(FILE_IN_ARCHIVE, name, re.DOTALL) for name in names_in_archives)
