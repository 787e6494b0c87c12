"""Guards for the rows of image sets."""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

ARCHIVES = r"(bz2|gzip|lz4|tar|xz|zip|zstd)://.*"  # files inside a file, in fsspec's names


def confine_row(source: Any, repository: str | None) -> Any:
    """Marks a row of a Hub set if it names a file outside the set, so that it cannot read the user's own files.

    Args:
        source: Image of a row: a mapping with `"bytes"` and `"path"`, or any other value, which names no file.
        repository (`str`, *optional*): Repository of the set on the Hub. Rows of a local set may name any file.

    Returns:
        `source`, with a `"fault"` if its path leads outside, so that `read_image` raises before it opens the file.
    """
    if repository is None or not isinstance(source, Mapping) or source["bytes"] is not None or source["path"] is None:
        return source
    *archives, file = source["path"].split("::")
    match = re.fullmatch(rf"hf://datasets/{re.escape(repository)}@[^/]+/(.+)", file)
    path = "/" if match is None else posixpath.normpath(match[1])
    outside = path == ".." or path.startswith(("../", "/"))
    outside = outside or not all(re.fullmatch(ARCHIVES, archive, re.DOTALL) for archive in archives)
    if not outside:
        return source
    return {**source, "fault": _fault(source["path"])}


def confine_copied_row(source: Any, repository: str | None) -> Any:
    """Marks a row of a Hub set that `datasets` has copied, if it names a file outside the caches of its set.

    Args:
        source: Image of a row, see [`confine_row`].
        repository (`str`, *optional*): Repository of the set on the Hub. Rows of a local set may name any file.
    """
    if repository is None or not isinstance(source, Mapping) or source["bytes"] is not None or source["path"] is None:
        return source
    try:
        path = Path(source["path"]).resolve()
    except (ValueError, RuntimeError):  # a zero byte, or a loop of links
        return {**source, "fault": _fault(source["path"])}
    config = datasets.config
    folders = [
        Path(config.EXTRACTED_DATASETS_PATH),
        Path(config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_DIR),
    ]
    if repository:
        folders.append(Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="dataset")))
    if any(path.is_relative_to(folder.resolve()) for folder in folders):
        return source
    return {**source, "fault": _fault(source["path"])}


def _fault(path: str) -> str:
    return (
        f"the row must hold an image of its set, but names `{path}`, which is not in the set. Store the set again "
        "with its images embedded."
    )
