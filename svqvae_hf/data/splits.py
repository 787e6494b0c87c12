"""Splits of image sets: which files belong to which, by words in the names of folders and shards."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORDS_OF_SPLITS = {  # as `datasets` reads them, and the usual names of held-out images
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "held_out": ("held_out", "held-out", "held out", "heldout"),
}
WORD = "held[_ -]out(?![a-z])|[a-z]+"  # in a name in lower case. `held_out` counts as one word


def choose_split(name: str, splits: Sequence[str], split: str | None, remedy: str = "") -> str:
    """Chooses a split of a set.

    Args:
        name (`str`): Name of the set, for errors.
        splits (`Sequence[str]`): Splits of the set.
        split (`str`, *optional*): Split that is asked for; required if there are several.
        remedy (`str`, defaults to `""`): Another way to choose one, for the error.

    Raises:
        ValueError: There is no such split, or there are several and none is asked for.
    """
    listed = ", ".join(splits)
    if split is None and len(splits) > 1:
        raise ValueError(f"the set `{name}` has the splits {listed}. Choose one with --split{remedy}.")
    if split is not None and split not in splits:
        raise ValueError(f"--split must be one of {listed} in the set `{name}`, got `{split}`.")
    return split or splits[0]


def check_no_split(name: str, split: str | None) -> None:
    """Raises ValueError if a split is asked for in a set without splits, all of whose images are of `train`.

    Args:
        name (`str`): Name of the set, for the error.
        split (`str`, *optional*): Split that is asked for.
    """
    choose_split(name, ["train"], split)


def choose_folder(folder: str, keys: Iterable[str], split: str | None) -> str:
    """Chooses the subfolder of a split in a folder of images.

    Subfolders are splits if the names of several splits occur, such as `train` and `test`, or if all images lie in
    folders of one split. A folder `train` beside a folder `car` is no split, because both may be classes.

    Args:
        folder (`str`): Path or URL of the folder.
        keys (`Iterable[str]`): Paths of its images, relative to it.
        split (`str`, *optional*): Split that is asked for, by the name of its subfolder.

    Returns:
        `str`: Path of the subfolder, relative to `folder`; empty if the folder has no splits.

    Raises:
        ValueError: There is no such split, or an image lies outside the splits.
    """
    folders = _find_split_folders(keys)
    if not folders.are_splits():
        check_no_split(folder, split)
        return ""
    listed = ", ".join(folders.paths)
    example = f"{folder}/{folders.paths[0]}"
    if folders.key_outside is not None:
        raise ValueError(
            f"all images of `{folder}` must lie in its splits, {listed}, but `{folders.key_outside}` does not. Move "
            f"it, or pass `{example}`."
        )
    if len(folders.parents()) > 1:
        raise ValueError(
            f"the splits of `{folder}` must lie side by side, but are {listed}. Pass `{example}` and others like it."
        )
    path_of_split = {os.path.basename(path): path for path in folders.paths}
    chosen_split = choose_split(folder, list(path_of_split), split, f", or pass `{example}`")
    return path_of_split[chosen_split]


@dataclass
class _SplitFolders:
    """Folders of a set that are named as splits.

    Args:
        paths (`list[str]`): Their paths in order, relative to the folder of the set.
        key_outside (`str`, *optional*): First image that lies in none of them.
    """

    paths: list[str]
    key_outside: str | None

    def parents(self) -> set[str]:
        """Folders in which they lie."""
        return {os.path.dirname(path) for path in self.paths}

    def are_splits(self) -> bool:
        """Whether the folders are splits, and not classes."""
        splits = {split_of_name(os.path.basename(path)) for path in self.paths}
        if len(splits) > 1:
            return True
        return self.key_outside is None and len(self.parents()) == 1


def _find_split_folders(keys: Iterable[str]) -> _SplitFolders:
    """Finds the folders named as splits, on the paths of images relative to the folder of the set."""
    first_key_of_folder: dict[str, str] = {}
    for key in keys:
        image_folder = os.path.dirname(key)
        if image_folder not in first_key_of_folder:
            first_key_of_folder[image_folder] = key
    paths_of_splits = set()
    keys_outside = []
    for image_folder, first_key in first_key_of_folder.items():
        path = _uppermost_split_folder(image_folder)
        if path is None:
            keys_outside.append(first_key)
        else:
            paths_of_splits.add(path)
    first_key_outside = keys_outside[0] if keys_outside else None
    return _SplitFolders(sorted(paths_of_splits), first_key_outside)


def choose_shards(name: str, folder: str, keys: Sequence[str], split: str | None) -> list[str]:
    """Chooses the shards of a split in a folder of shards, by the first word in their paths that stands for a split.

    Args:
        name (`str`): Name of the set, for errors.
        folder (`str`): Path or URL of the folder.
        keys (`Sequence[str]`): Paths of the shards, relative to it.
        split (`str`, *optional*): Split that is asked for.

    Returns:
        `list[str]`: Paths of the shards. If no shard has a word of another split, all are of the split `train`.

    Raises:
        ValueError: There is no such split, or a shard belongs to none.
    """
    keys_of_split: dict[str, list[str]] = defaultdict(list)
    keys_without_split: list[str] = []
    for key in keys:
        shard_split = _split_of_path(key)
        if shard_split is None:
            keys_without_split.append(key)
        else:
            keys_of_split[shard_split].append(key)
    splits = sorted(keys_of_split)
    has_other_split_than_train = not {"train"}.issuperset(splits)
    if not has_other_split_than_train:  # then shards without a word are of `train`, too
        check_no_split(name, split)
        return list(keys)
    if keys_without_split:
        raise ValueError(
            f"all shards of `{folder}` must be of its splits, {', '.join(splits)}, but `{keys_without_split[0]}` has "
            "no such word in its name. Rename it, or pass files by a pattern."
        )
    first_shard = keys_of_split[splits[0]][0]
    remedy = f", or pass the shards of one by a pattern such as `{folder}/{first_shard}`"
    chosen_split = choose_split(name, splits, split, remedy)
    return keys_of_split[chosen_split]


def split_of_name(name: str) -> str | None:
    """Split that a word in the name of a folder or file stands for."""
    for word in re.findall(WORD, name.lower()):
        for split, words in WORDS_OF_SPLITS.items():
            if word in words:
                return split
    return None


def _split_of_path(key: str) -> str | None:
    """Split that a word in a path stands for; the first one, if several words do."""
    for part in key.split("/"):
        split = split_of_name(part)
        if split is not None:
            return split
    return None


def _uppermost_split_folder(folder: str) -> str | None:
    """Path of the uppermost folder that is named as a split, among a folder and the folders above it."""
    parts = folder.split("/")
    for depth, part in enumerate(parts, start=1):
        if split_of_name(part) is not None:
            return "/".join(parts[:depth])
    return None
