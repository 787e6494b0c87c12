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

    The path of a file in an archive has several parts, from the inside to the outside. The last part is a file of the
    repository: `zip://a.png::hf://datasets/org/set@main/a.zip` is the file `a.png` in the archive `a.zip` there.
    """
    parts = path.split("::")
    outermost_file = parts[-1]
    files_in_archives = parts[:-1]
    repository_file = re.fullmatch(rf"hf://datasets/{re.escape(repository)}@[^/]+/(.+)", outermost_file)
    if repository_file is None:
        return False
    path_in_repository = posixpath.normpath(repository_file[1])
    leads_outside = path_in_repository == ".." or path_in_repository.startswith(("../", "/"))
    if leads_outside:
        return False
    return all(re.fullmatch(FILE_IN_ARCHIVE, file, re.DOTALL) for file in files_in_archives)
