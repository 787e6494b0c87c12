"""Files of an image set: which files its paths, folders, patterns and URLs stand for."""

import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import fsspec

from svqvae_files.errors import explained
from svqvae_files.file_names import ARCHIVE_SUFFIXES
from svqvae_files.identity import InputIdentity
from svqvae_files.inputs import expand_braces, is_url, readable, walk_files
from svqvae_hf.data.saved_sets import STATE_FILE, find_leftovers
from svqvae_hf.data.splits import check_no_split, choose_folder, choose_shards
from svqvae_hf.data.tar_files import TAR_SUFFIXES
from svqvae_hf.models.image_files import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # captions and labels of a folder of images
SUFFIXES = {  # by kind: images, or shards, which hold many
    "image": IMAGE_SUFFIXES,
    "tar": TAR_SUFFIXES,
    "parquet": (".parquet",),
    "arrow": (".arrow",),
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
        named (`list[SetFile]`): Further images, which rows of metadata, Parquet or Arrow files name by their paths.
    """

    name: str
    root: str
    files: list[SetFile]
    folders: list[str]
    kind: str
    metadata: list[SetFile] = field(default_factory=list)
    named: list[SetFile] = field(default_factory=list)

    @property
    def is_remote(self) -> bool:
        """Whether the files are at URLs."""
        return is_url(self.files[0].path)

    def keys(self) -> list[str]:
        """Paths of the files, relative to the root."""
        return [_key(self.root, file) for file in self.files]

    def paths(self) -> list[str]:
        """Absolute path or URL of each image or shard."""
        return [file.path for file in self.files]

    def inputs(self) -> list[InputIdentity]:
        """Identities of all files, in their order, of those with captions or labels, and of images that rows name."""
        identities = []
        for file in self.files + self.metadata + self.named:
            identities.append(file_identity(self.root, file))
        return identities

    def add_named(self, paths: Iterable[str]) -> None:
        """Adds images that rows name by their paths on this machine, except for files of the set."""
        files_of_set = set(self.paths())
        for path in dict.fromkeys(paths):
            if path not in files_of_set:
                self.named.append(SetFile(path))


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
    listings = _without_leftovers(listings)
    kind = _kind_of_all(listings)
    holds_images = kind == "image"  # otherwise shards
    sets = []
    named_files: list[SetFile] = []
    for listing in listings:
        if listing.folder is None:
            named_files += listing.files
        elif holds_images:
            sets.append(_images_of_split(listing, listing.folder, split))
        else:
            sets.append(_shards_of_split(listing, listing.folder, kind, split))
    if named_files:
        check_no_split(names[0], split)
        sets.append(_named_files(names[0], named_files, kind))
    _check_metadata(sets)
    if len(sets) == 1:
        return sets[0]
    return _merge(sets)


def _check_metadata(sets: Sequence[SetFiles]) -> None:
    """Raises if captions or labels in metadata files would be ignored.

    Metadata files of images are read if the set is a single folder on this machine.
    """
    for files in sets:
        has_metadata = files.kind == "image" and len(files.metadata) > 0
        is_single_local_folder = len(sets) == 1 and not files.is_remote
        if has_metadata and not is_single_local_folder:
            raise ValueError(
                f"`{files.root}` has a metadata file, for images of one local folder. Pass a pattern without it."
            )


def _merge(sets: Sequence[SetFiles]) -> SetFiles:
    """Joins the files of several names. A file that several names stand for comes once.

    The folder of such a file depends on the name: `photos/cats/a.jpg` has the folder `cats` as a file of `photos`, and
    the folder `.` as a file of `photos/cats`. The first name decides.
    """
    folder_of_file: dict[SetFile, str] = {}
    for set_files in sets:
        for file, folder in zip(set_files.files, set_files.folders, strict=True):
            if file not in folder_of_file:
                folder_of_file[file] = folder
    files = list(folder_of_file)
    folders = list(folder_of_file.values())
    return SetFiles(
        name=sets[0].name,
        root=_common_folder(files),
        files=files,
        folders=folders,
        kind=sets[0].kind,
    )


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

    def paths(self) -> list[str]:
        """Absolute path or URL of each image or shard."""
        return [file.path for file in self.files]

    def finish(self) -> None:
        """Warns of images in formats that are not read. Raises FileNotFoundError if the folder has no others."""
        if not self.files:
            raise self._no_files_error()
        if self.unread:
            logger.warning(
                f"{self._count_of_unread()} They are left out. Convert them to JPEG or PNG to have them read."
            )

    def _no_files_error(self) -> FileNotFoundError:
        """Error for a folder without images that can be read."""
        second_sentence = "Pass images, shards or a folder of them, or a set on the Hub."
        if self.unread:
            second_sentence = self._count_of_unread()
        return FileNotFoundError(f"a set must hold images, but the folder has none: `{self.name}`. {second_sentence}")

    def _count_of_unread(self) -> str:
        """A sentence on the images in formats that are not read."""
        example = readable(self.unread[0])
        return f"`{self.name}` has {len(self.unread):,} images in formats that are not read, such as `{example}`."


def _list_name(name: str) -> list[_Listing]:
    """Lists the files of a name, or of each of the patterns that its braces stand for."""
    if os.path.isdir(name):
        return [_list_folder(name)]
    if os.path.exists(name):
        return [_Listing(name, None, [SetFile(os.path.abspath(name))])]
    listings = []
    for pattern in expand_braces(name):
        if is_url(pattern):
            listings.append(_list_url(pattern))
        elif os.path.isdir(pattern):
            listings.append(_list_folder(pattern))
        else:
            listings.append(_list_pattern(pattern))
    return listings


def _without_leftovers(listings: Sequence[_Listing]) -> list[_Listing]:
    """Leaves out Arrow files that lie beside a saved set and are not its shards, and listings without other files.

    Raises:
        FileNotFoundError: No file is left.
    """
    listings_to_read = []
    for listing in listings:
        leftovers = find_leftovers(listing.paths())
        listing.files = [file for file in listing.files if file.path not in leftovers]
        if listing.files:
            listings_to_read.append(listing)
    if not listings_to_read:
        raise FileNotFoundError(
            f"a set must have shards, but `{listings[0].name}` has only Arrow files that `{STATE_FILE}` beside them "
            "does not name. Save the set again with `save_to_disk`."
        )
    return listings_to_read


def _list_folder(name: str) -> _Listing:
    """Lists the files of a folder on this machine and of its subfolders."""
    folder = os.path.abspath(name)
    listing = _Listing(name, folder)
    for key in walk_files(folder):
        listing.add(SetFile(os.path.join(folder, key)))
    listing.finish()
    return listing


def _list_pattern(pattern: str) -> _Listing:
    """Lists the files on this machine that a pattern matches."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise FileNotFoundError(
            f"no file or folder matches: `{pattern}`. Pass images, shards or a folder of them, or a set on the Hub, "
            "which is `org/name`."
        )
    files = []
    for path in matches:
        if os.path.isfile(path):
            files.append(SetFile(os.path.abspath(path)))
    if not files:
        raise FileNotFoundError(
            f"a pattern must match files, but `{pattern}` matches only folders. Pass the folders, or `{pattern}/*`."
        )
    return _Listing(pattern, None, files)


def _list_url(url: str) -> _Listing:
    """Lists the files of a URL: of a file, a folder or a pattern."""
    folder = None
    with explained(url, "read"):
        file_system, path = _open_file_system(url)
        # A file such as `photo[1].jpg` looks like a pattern, but exists.
        is_pattern = glob.has_magic(path) and not file_system.exists(path)
        if is_pattern:
            infos = file_system.glob(path, detail=True)
        elif _is_folder(file_system, path):
            folder = file_system.unstrip_protocol(path.rstrip("/"))
            infos = file_system.find(path, detail=True)
        else:
            infos = _infos_of_file(file_system, path)
    files = _files_of_infos(file_system, infos)
    if folder is not None:
        return _listing_of_folder(url, folder, files)
    if not files:
        raise FileNotFoundError(f"no file or folder matches `{url}`.")
    return _Listing(url, None, files)


def _is_folder(file_system: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether a path is a folder. A path with the suffix of a file, such as `.jpg`, is not, which saves a request."""
    if kind_of(path) is not None:
        return False
    return file_system.isdir(path)


def _open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Opens the file system of a URL. Returns it, and the path in it."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"`{url}` cannot be reached: {str(error).removesuffix('.')}.") from error


def _infos_of_file(file_system: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """A mapping from the path of a file to what the file system tells about it; empty if there is no such file."""
    if path.startswith("http"):  # web servers rarely list folders
        return {path: file_system.info(path)}
    # One listing of the folder serves all shards of a set. `info` would take a request for each.
    for info in file_system.ls(os.path.dirname(path), detail=True):
        if info["name"] == path:
            return {path: info}
    return {}


def _files_of_infos(file_system: fsspec.AbstractFileSystem, infos: Mapping[str, Any]) -> list[SetFile]:
    """Files, in the order of their paths, from the facts that a file system tells by path."""
    files = []
    for path, info in sorted(infos.items()):
        if info["type"] != "directory":
            files.append(SetFile(file_system.unstrip_protocol(path), info["size"], _version(info)))
    return files


def _listing_of_folder(url: str, folder: str, files: Sequence[SetFile]) -> _Listing:
    """Listing of a folder at a URL, without hidden files."""
    listing = _Listing(url, folder)
    for file in files:
        is_hidden = "/." in file.path.removeprefix(folder)
        if not is_hidden:
            listing.add(file)
    listing.finish()
    return listing


def _version(info: Mapping[str, Any]) -> str:
    """Version of a file in the words of its file system; empty if the file system tells none."""
    for key in VERSION_KEYS:
        if info.get(key):
            return str(info[key])
    return ""


# From the files of a name to one split of them


def _shards_of_split(listing: _Listing, folder: str, kind: str, split: str | None) -> SetFiles:
    """Shards of a folder that are of a split, by words in their paths."""
    files_by_key = {_key(folder, file): file for file in listing.files}
    keys_of_split = set(choose_shards(listing.name, folder, list(files_by_key), split))
    shards = [file for key, file in files_by_key.items() if key in keys_of_split]
    return SetFiles(
        name=listing.name,
        root=folder,
        files=shards,
        folders=_folders(folder, shards),
        kind=kind,
        metadata=listing.metadata,
    )


def _images_of_split(listing: _Listing, folder: str, split: str | None) -> SetFiles:
    """Images of a folder that are of a split, which is a subfolder; or all of them if the folder has no splits."""
    keys = [readable(_key(folder, file)) for file in listing.files]
    subfolder = choose_folder(folder, keys, split)
    if not subfolder:
        return SetFiles(
            name=listing.name,
            root=folder,
            files=listing.files,
            folders=_folders(folder, listing.files),
            kind="image",
            metadata=listing.metadata,
        )
    root = f"{folder}/{subfolder}"
    _check_no_metadata_above(root, listing.metadata, folder)
    images = _files_below(root, listing.files)
    metadata = _files_below(root, listing.metadata)
    return SetFiles(
        name=listing.name,
        root=root,
        files=images,
        folders=_folders(root, images),
        kind="image",
        metadata=metadata,
    )


def _check_no_metadata_above(split_folder: str, metadata: Sequence[SetFile], folder: str) -> None:
    """Raises ValueError if a metadata file lies above the folder of a split."""
    for file in metadata:
        folder_of_metadata = os.path.dirname(file.path)
        if _is_below(split_folder, folder_of_metadata):
            raise ValueError(f"metadata of `{folder}` must lie in the folders of its splits, not above them.")


def _named_files(name: str, files: Iterable[SetFile], kind: str) -> SetFiles:
    """Files that were named one by one or by patterns, each once."""
    unique_files = list(dict.fromkeys(files))
    root = _common_folder(unique_files)
    return SetFiles(
        name=name,
        root=root,
        files=unique_files,
        folders=_folders(root, unique_files),
        kind=kind,
    )


# Names of files


def kind_of(name: str) -> str | None:
    """Kind of a file by its suffix: a key of `SUFFIXES`, or `None`."""
    for kind, suffixes in SUFFIXES.items():
        if name.lower().endswith(suffixes):
            return kind
    return None


def _kind_of_all(listings: Sequence[_Listing]) -> str:
    """The kind of all files. Raises ValueError if they are of several kinds, or archives."""
    kinds = set()
    for listing in listings:
        for file in listing.files:
            _check_unpacked(file.path)
            kind = kind_of(file.path)
            if kind is None:  # The user passed this file itself. Folders are searched for known suffixes only.
                kind = "image"
            kinds.add(kind)
    if len(kinds) > 1:
        listed = " and ".join(sorted(_plural(kind) for kind in kinds))
        raise ValueError(
            f"files of a set must be of one kind, but are {listed}. Choose some by a pattern such as `photos/*.jpg`."
        )
    return kinds.pop()


def _check_unpacked(path: str) -> None:
    """Raises ValueError for an archive, other than a tar file."""
    for suffix in ARCHIVE_SUFFIXES:
        if path.lower().endswith(suffix):
            kind = suffix.removeprefix(".")
            raise ValueError(f"`{path}` must be unpacked first, because {kind} files are not read.")


def _plural(kind: str) -> str:
    """Words for files of a kind, such as `images` or `.tar files`."""
    if kind == "image":
        return "images"
    suffix = SUFFIXES[kind][0]
    return f"{suffix} files"


def _files_below(folder: str, files: Sequence[SetFile]) -> list[SetFile]:
    """Files in a folder and its subfolders."""
    return [file for file in files if _is_below(file.path, folder)]


def _is_below(path: str, folder: str) -> bool:
    """Whether a file or folder lies in a folder or in its subfolders."""
    return path.startswith(f"{folder}/")


def _key(root: str, file: SetFile) -> str:
    """Path of a file, relative to the root."""
    return file.path.removeprefix(root).lstrip("/")


def _folders(root: str, files: Sequence[SetFile]) -> list[str]:
    """Path of each file's folder below the root; `.` for the root itself."""
    return [os.path.dirname(_key(root, file)) or "." for file in files]


def _common_folder(files: Sequence[SetFile]) -> str:
    """Deepest folder above all files."""
    scheme = _scheme(files[0].path)
    folders = []
    for file in files:
        if _scheme(file.path) != scheme:
            raise ValueError(
                f"files of a set must be on one file system, but `{files[0].path}` and others are on several."
            )
        path = file.path.removeprefix(scheme)
        folders.append(os.path.dirname(path))
    return scheme + os.path.commonpath(folders)


def _scheme(path: str) -> str:
    """Start of a URL, such as `s3://`; empty for a path."""
    scheme, separator, _ = path.partition("://")
    if not separator:
        return ""
    return f"{scheme}://"


def file_identity(root: str, file: SetFile) -> InputIdentity:
    """Identity of a file, from the listing of a URL or from its status on this machine."""
    key = readable(_key(root, file))
    if file.size is not None:
        return InputIdentity(key, file.size, file.version)
    try:
        status = os.stat(file.path)
    except (OSError, ValueError):  # such as a broken link, or a name in a row that no file can have
        return InputIdentity(key, 0, "unreadable")
    return InputIdentity(key, status.st_size, str(status.st_mtime_ns))
