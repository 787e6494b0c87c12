"""Files of an image set: which files its paths, folders, patterns and URLs stand for."""

import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import fsspec

from svqvae_files.errors import explained
from svqvae_files.identity import InputIdentity
from svqvae_files.inputs import expand_braces, readable, walk_files
from svqvae_hf.data.splits import choose_folder, choose_shards, choose_split
from svqvae_hf.data.tar_files import TAR_SUFFIXES
from svqvae_hf.models.image_files import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # captions and labels of a folder of images
SUFFIXES = {  # by kind: images, or shards, which hold many
    "image": IMAGE_SUFFIXES,
    "tar": TAR_SUFFIXES,
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "zip": (".zip",),
}
UNREAD_SUFFIXES = (".jfif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".dng", ".cr2", ".nef", ".arw")
VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "created")  # in various file systems


class InputFiles(Protocol):
    """Files that an image set is read from."""

    @property
    def root(self) -> str:
        """Folder above all files."""

    def paths(self) -> list[str]:
        """Absolute path or URL of each image or shard, in the order of the set."""

    def inputs(self) -> list[InputIdentity]:
        """Identities of all files, in their order."""


@dataclass(frozen=True, slots=True)
class SetFile:
    """A file of an image set.

    Args:
        path (`str`): Absolute path or URL.
        size (`int`, *optional*): Bytes, from the listing of a URL; `None` for a local file.
        version (`str`): Version in the words of the file system, from the listing of a URL.
    """

    path: str
    size: int | None = None
    version: str = ""


@dataclass
class SetFiles:
    """Files that one name stands for, or all names of a set.

    Args:
        name (`str`): Path, pattern or URL, for errors.
        root (`str`): Folder above all files: the one that was searched, or else the deepest.
        files (`list[SetFile]`): Images or shards, of one split.
        folders (`list[str]`): Path of each file's folder below the folder that was searched; `.` for that itself.
        kind (`str`): Kind of all files, a key of `SUFFIXES`.
        metadata (`list[SetFile]`): Files in the folder with captions or labels of its images.
    """

    name: str
    root: str
    files: list[SetFile]
    folders: list[str]
    kind: str
    metadata: list[SetFile] = field(default_factory=list)

    @property
    def is_remote(self) -> bool:
        """Whether the files are at URLs."""
        return "://" in self.files[0].path

    def keys(self) -> list[str]:
        """Paths of the files, relative to the root."""
        return [_key(self.root, file) for file in self.files]

    def paths(self) -> list[str]:
        """Absolute path or URL of each image or shard."""
        return [file.path for file in self.files]

    def inputs(self) -> list[InputIdentity]:
        """Identities of all files, in their order, and of those with captions or labels."""
        identities = []
        for file in self.files + self.metadata:
            identities.append(_identity(self.root, file))
        return identities


def find_files(names: Sequence[str], split: str | None) -> SetFiles:
    """Finds the files of one split of a set.

    Args:
        names (`Sequence[str]`): Files, folders, patterns and URLs.
        split (`str`, *optional*): Split, which may be left out if there is only one.

    Raises:
        OSError: There is no such file or folder, or it cannot be reached.
        ValueError: There is no such split, the files are of several kinds, or metadata would be ignored.
    """
    listings = []
    for name in names:
        listings.extend(_list_name(name))
    kind = _kind_of_all(listings)
    sets = []
    for listing in listings:
        if listing.folder is not None:
            sets.append(_files_of_folder(listing, kind, split))
    named_files: list[SetFile] = []
    for listing in listings:
        if listing.folder is None:
            named_files += listing.files
    if named_files:
        choose_split(names[0], ["train"], split)
        sets.append(_named_files(names[0], named_files, kind))
    _check_metadata(sets)
    if len(sets) == 1:
        return sets[0]
    return _merge(sets)


def _check_metadata(sets: Sequence[SetFiles]) -> None:
    """Raises if captions or labels would be ignored."""
    for files in sets:
        is_read = files.kind == "image" and len(sets) == 1 and not files.is_remote
        is_of_images = files.kind in ("image", "zip")
        if files.metadata and is_of_images and not is_read:
            raise ValueError(
                f"`{files.root}` has a metadata file, for images of one local folder. Pass a pattern without it."
            )


def _merge(sets: Sequence[SetFiles]) -> SetFiles:
    """Joins the files of several names, each once. The name that comes first says the label of a file."""
    folder_of_file: dict[SetFile, str] = {}
    for files in sets:
        for file, folder in zip(files.files, files.folders, strict=True):
            folder_of_file.setdefault(file, folder)
    merged = list(folder_of_file)
    return SetFiles(sets[0].name, _common_folder(merged), merged, list(folder_of_file.values()), sets[0].kind)


# From a name to its files


@dataclass
class _Listing:
    """All files of a name.

    Args:
        name (`str`): Path, pattern or URL.
        folder (`str`, *optional*): Path or URL of the folder that was searched, if the name is a folder.
        files (`list[SetFile]`): Images and shards.
        metadata (`list[SetFile]`): Files in the folder with captions or labels.
        unread (`list[str]`): Files in the folder that are images of formats that are not read.
    """

    name: str
    folder: str | None
    files: list[SetFile] = field(default_factory=list)
    metadata: list[SetFile] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, file: SetFile) -> None:
        """Adds a file of the folder, if it is an image, a shard or metadata."""
        base_name = os.path.basename(file.path)
        if base_name in METADATA_FILES:
            self.metadata.append(file)
        elif kind_of(base_name) is not None:
            self.files.append(file)
        elif base_name.lower().endswith(UNREAD_SUFFIXES):
            self.unread.append(file.path)

    def finish(self) -> None:
        """Names the images that are left out, and raises if there are no others."""
        note = ""
        if self.unread:
            example = readable(self.unread[0])
            note = f"`{self.name}` has {len(self.unread):,} images in formats that are not read, such as `{example}`."
        if self.files and note:
            logger.warning(f"{note} They are left out. Convert them to JPEG or PNG to have them read.")
        if not self.files:
            raise FileNotFoundError(
                f"a set must hold images, but the folder has none: `{self.name}`. "
                f"{note or 'Pass images, shards or a folder of them, or a set on the Hub.'}"
            )


def _list_name(name: str) -> list[_Listing]:
    """Lists the files of a name, or of each of the patterns that its braces stand for."""
    if os.path.isdir(name):
        return [_list_folder(name)]
    if os.path.exists(name):
        return [_Listing(name, None, [SetFile(os.path.abspath(name))])]
    listings = []
    for pattern in expand_braces(name):
        if "://" in pattern:
            listings.append(_list_url(pattern))
        elif os.path.isdir(pattern):
            listings.append(_list_folder(pattern))
        else:
            listings.append(_list_pattern(pattern))
    return listings


def _list_folder(name: str) -> _Listing:
    folder = os.path.abspath(name)
    listing = _Listing(name, folder)
    for key in walk_files(folder):
        listing.add(SetFile(os.path.join(folder, key)))
    listing.finish()
    return listing


def _list_pattern(pattern: str) -> _Listing:
    listing = _Listing(pattern, None)
    matches = sorted(glob.glob(pattern, recursive=True))
    for path in matches:
        if os.path.isfile(path):
            listing.files.append(SetFile(os.path.abspath(path)))
    if matches and not listing.files:
        raise FileNotFoundError(
            f"a pattern must match files, but `{pattern}` matches only folders. Pass the folders, or `{pattern}/*`."
        )
    if not matches:
        raise FileNotFoundError(
            f"no file or folder matches: `{pattern}`. Pass images, shards or a folder of them, or a set on the Hub."
        )
    return listing


def _list_url(url: str) -> _Listing:
    listing = _Listing(url, None)
    with explained(url, "read"):
        try:
            file_system, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ValueError(f"`{url}` cannot be reached: {str(error).removesuffix('.')}.") from error
        if glob.has_magic(path) and not file_system.exists(path):
            infos = file_system.glob(path, detail=True)
        elif kind_of(path) is None and file_system.isdir(path):
            listing.folder = file_system.unstrip_protocol(path.rstrip("/"))
            infos = file_system.find(path, detail=True)
        elif path.startswith("http"):  # whose servers rarely list folders
            infos = {path: file_system.info(path)}
        else:
            infos = _info_from_folder(file_system, path)
    for path, info in sorted(infos.items()):
        if info["type"] == "directory":
            continue
        file = SetFile(file_system.unstrip_protocol(path), info["size"], _version(info))
        if listing.folder is None:
            listing.files.append(file)
        elif "/." not in file.path.removeprefix(listing.folder):  # not hidden
            listing.add(file)
    if listing.folder is not None:
        listing.finish()
    if not listing.files:
        raise FileNotFoundError(f"no file or folder matches `{url}`.")
    return listing


def _info_from_folder(file_system: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """Looks a file up in the listing of its folder: one request for all shards of a set, instead of one for each."""
    for info in file_system.ls(os.path.dirname(path), detail=True):
        if info["name"] == path:
            return {path: info}
    return {}


def _version(info: Mapping[str, Any]) -> str:
    for key in VERSION_KEYS:
        if info.get(key):
            return str(info[key])
    return ""


# From the files of a name to one split of them


def _files_of_folder(listing: _Listing, kind: str, split: str | None) -> SetFiles:
    folder = listing.folder or ""
    if kind != "image":
        chosen = set(choose_shards(listing.name, folder, [_key(folder, file) for file in listing.files], split))
        shards = [file for file in listing.files if _key(folder, file) in chosen]
        return SetFiles(listing.name, folder, shards, _folders(folder, shards), kind, listing.metadata)
    keys = [_key(folder, file) for file in listing.files]
    subfolder = choose_folder(folder, map(readable, keys), split)
    if not subfolder:
        return SetFiles(listing.name, folder, listing.files, _folders(folder, listing.files), kind, listing.metadata)
    root = f"{folder}/{subfolder}"
    for file in listing.metadata:
        if root.startswith(os.path.dirname(file.path) + "/"):
            raise ValueError(f"metadata of `{folder}` must lie in the folders of its splits, not above them.")
    files = [file for file in listing.files if file.path.startswith(f"{root}/")]
    metadata = [file for file in listing.metadata if file.path.startswith(f"{root}/")]
    return SetFiles(listing.name, root, files, _folders(root, files), kind, metadata)


def _named_files(name: str, files: Iterable[SetFile], kind: str) -> SetFiles:
    """Files that were named one by one or by patterns, each once."""
    unique_files = list(dict.fromkeys(files))
    root = _common_folder(unique_files)
    return SetFiles(name, root, unique_files, _folders(root, unique_files), kind)


# Names of files


def kind_of(name: str) -> str | None:
    """Kind of a file by its suffix: a key of `SUFFIXES`, or `None`."""
    for kind, suffixes in SUFFIXES.items():
        if name.lower().endswith(suffixes):
            return kind
    return None


def _kind_of_all(listings: Sequence[_Listing]) -> str:
    """The kind of all files. One with an unknown suffix, which was named, is an image."""
    kinds = set()
    for listing in listings:
        for file in listing.files:
            kinds.add(kind_of(file.path) or "image")
    if len(kinds) > 1:
        nouns = []
        for kind in kinds:
            nouns.append("images" if kind == "image" else f"{SUFFIXES[kind][0]} files")
        raise ValueError(
            f"files of a set must be of one kind, but are {' and '.join(sorted(nouns))}. "
            "Choose some by a pattern such as `photos/*.jpg`."
        )
    return kinds.pop()


def _key(root: str, file: SetFile) -> str:
    return file.path.removeprefix(root).lstrip("/")


def _folders(root: str, files: Sequence[SetFile]) -> list[str]:
    return [os.path.dirname(_key(root, file)) or "." for file in files]


def _common_folder(files: Sequence[SetFile]) -> str:
    """Deepest folder above all files."""
    schemes = {_scheme(file.path) for file in files}
    if len(schemes) > 1:
        raise ValueError(
            f"files of a set must be on one file system, but `{files[0].path}` and others are on several."
        )
    scheme = schemes.pop()
    folders = [os.path.dirname(file.path.removeprefix(scheme)) for file in files]
    return scheme + os.path.commonpath(folders)


def _scheme(path: str) -> str:
    """Start of a URL, such as `s3://`; empty for a path."""
    scheme, separator, _ = path.partition("://")
    if not separator:
        return ""
    return f"{scheme}://"


def _identity(root: str, file: SetFile) -> InputIdentity:
    key = readable(_key(root, file))
    if file.size is not None:
        return InputIdentity(key, file.size, file.version)
    try:
        facts = os.stat(file.path)
    except OSError:  # such as a broken link
        return InputIdentity(key, 0, "unreadable")
    return InputIdentity(key, facts.st_size, str(facts.st_mtime_ns))
