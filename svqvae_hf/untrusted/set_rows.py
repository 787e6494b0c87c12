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


def confine_row(source: Any, repository: str | None, is_copied: bool = False) -> Any:
    """Marks a row of a Hub set if it names a file outside the set, so that it cannot read the user's own files.

    Args:
        source: Image of a row: a mapping with `"bytes"` and `"path"`, or any other value, which names no file.
        repository (`str`, *optional*): Repository of the set on the Hub. Rows of a local set may name any file.
        is_copied (`bool`, defaults to `False`): Whether `datasets` has copied the set to its caches.

    Returns:
        `source`, with a `"fault"` if its path leads outside, so that `read_image` raises before it opens the file.
    """
    if repository is None or not isinstance(source, Mapping) or source["bytes"] is not None or source["path"] is None:
        return source
    if (_is_in_caches if is_copied else _is_in_repository)(source["path"], repository):
        return source
    fault = (
        f"the row must hold an image of its set, but names `{source['path']}`, which is not in the set. Store the set "
        "again with its images embedded."
    )
    return {**source, "fault": fault}


def _is_in_repository(path: str, repository: str) -> bool:
    *archives, file = path.split("::")
    match = re.fullmatch(rf"hf://datasets/{re.escape(repository)}@[^/]+/(.+)", file)
    inside = "/" if match is None else posixpath.normpath(match[1])
    if inside == ".." or inside.startswith(("../", "/")):
        return False
    return all(re.fullmatch(ARCHIVES, archive, re.DOTALL) for archive in archives)


def _is_in_caches(path: str, repository: str) -> bool:
    try:
        file = Path(path).resolve()
    except (ValueError, RuntimeError):  # a zero byte, or a loop of links
        return False
    config = datasets.config
    folders = [Path(config.EXTRACTED_DATASETS_PATH), Path(config.DOWNLOADED_DATASETS_PATH, "extracted")]
    if repository:
        folders.append(Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="dataset")))
    return any(file.is_relative_to(folder.resolve()) for folder in folders)
