"""Image sets in tar files, in WebDataset's form: consecutive members of one name, told apart by their suffixes."""

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from lzma import LZMAError
from operator import attrgetter
from typing import Any, NamedTuple

import datasets

from svqvae_files.errors import is_unreachable
from svqvae_files.inputs import is_url, readable
from svqvae_hf.data.image_parts import shard_name
from svqvae_hf.data.image_rows import LABEL_COLUMNS, ImageRow, all_columns, fault_of, unreadable
from svqvae_hf.data.opened_files import opened_file
from svqvae_hf.data.selection import Selection
from svqvae_hf.models.image_files import IMAGE_SUFFIXES
from svqvae_hf.untrusted.tars import StrictTarInfo, check_end, read_member

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CLASS_SUFFIX = "cls"  # of members that hold the number of a class
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, LZMAError, OSError)
MEMBER_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)")  # a sample's name ends at the first dot
PEEKED_SAMPLES = 100  # at the start of a file, which are read first to find the columns of a set


@dataclass
class Sample:
    """Consecutive members of one name.

    Args:
        name (`str`): Path of the members without their suffixes.
        members (`dict[str, bytes | None]`): Content of each member by its suffix without a dot, such as `jpg`; `None`
            for a member that is too large to be read.
        repeated (`list[str]`): Suffixes that several members of the sample have. `members` holds the last of these.
        links (`list[str]`): Suffixes of members that are links, whose content lies elsewhere. `members` holds `None`.
    """

    name: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def add(self, suffix: str, content: bytes | None) -> None:
        """Adds a member."""
        if suffix in self.members:
            self.repeated.append(suffix)
        self.members[suffix] = content

    def image_suffixes(self, image_suffix: str | None) -> list[str]:
        """Suffixes of the sample's images.

        Args:
            image_suffix (`str`, *optional*): The only suffix of images. By default, all [`IMAGE_SUFFIXES`] are.
        """
        if image_suffix is None:
            return [suffix for suffix in self.members if f".{suffix}" in IMAGE_SUFFIXES]
        return [suffix for suffix in self.members if suffix == image_suffix]


class TarPart:
    """A tar file of an image set. Samples that cannot be read, and the rest of a damaged file, are unreadable rows.

    Args:
        path (`str`): Local path, or a path for `fsspec`.
        root (`str`): Folder of the set.
        features (`datasets.Features`): Columns to keep, by the suffixes of their members.
        selection ([`Selection`]): The suffix of the images, by default any suffix of images; and the columns that were
            asked for.
    """

    def __init__(self, path: str, root: str, features: datasets.Features, selection: Selection):
        self.path = path
        self.name = shard_name(path, root)
        self.features = features
        self.selection = selection
        self.image_suffix = selection.image_column

    def read(self) -> Iterator[ImageRow]:
        """Yields the images.

        Raises:
            OSError: The file cannot be reached.
            ValueError: The file has labels that the first samples of the set have not, or the members of a sample do
                not stand side by side.
        """
        try:
            for sample in _samples(self.path):
                yield self._row(sample)._replace(shard=self.name)
        except TAR_ERRORS as error:
            if is_unreachable(error, is_url(self.path)):
                raise
            # The file is damaged. One unreadable row stands for all samples after the damage.
            cause = fault_of(error).removesuffix(".")
            fault = f"the tar file ends early: {cause}."
            yield unreadable(self.name, fault, list(self.features))

    def _row(self, sample: Sample) -> ImageRow:
        """Row of a sample's image with its labels. A sample that cannot be read becomes an unreadable row."""
        self._check_labels(sample)
        columns = list(self.features)
        image_suffix = self._only_image_suffix(sample)
        if image_suffix is None:
            listed = ", ".join([*sample.members, *sample.repeated])
            fault = f"the sample must hold one image, its files side by side, one of each kind, got {listed}."
            return unreadable(sample.name, fault, columns)
        key = f"{sample.name}.{image_suffix}"
        for suffix in [image_suffix, *columns]:
            if suffix in sample.links:
                return unreadable(key, _link_fault(suffix), columns)
        values = {}
        try:
            for column, feature in self.features.items():
                values[column] = _parse_label(sample.members.get(column), feature)
        except ValueError as error:
            return unreadable(key, f"a label beside it cannot be read: {error}", columns)
        content = sample.members[image_suffix]
        if content is None:
            return unreadable(key, "the image is too large for a member of a tar file.", columns)
        return ImageRow(key, {"path": key, "bytes": content}, values)

    def _only_image_suffix(self, sample: Sample) -> str | None:
        """Suffix of a sample's image. None if it has not exactly one, or if the image or a label occurs twice."""
        image_suffixes = sample.image_suffixes(self.image_suffix)
        if len(image_suffixes) != 1:
            return None
        image_suffix = image_suffixes[0]
        label_suffixes = list(self.features)
        for suffix in [image_suffix, *label_suffixes]:
            if suffix in sample.repeated:
                return None
        return image_suffix

    def _check_labels(self, sample: Sample) -> None:
        """Raises if a label would be lost, because the first samples of the set have none of its kind."""
        for suffix in sample.members:
            is_label = self.selection.keeps(suffix) and suffix != self.image_suffix
            if is_label and suffix not in self.features:
                raise ValueError(
                    f"`{self.path}` has `{sample.name}.{suffix}`, but the first {PEEKED_SAMPLES} samples of the set "
                    f"have no {suffix}. Ask for the column, as by `--keep {suffix}`. If the members of a sample do "
                    "not stand side by side, pack them again with `tar --sort=name`."
                )


def open_tars(paths: Sequence[str], root: str, selection: Selection) -> list[TarPart]:
    """Opens tar files with the same columns, which it finds in the first samples of the first file that has any.

    The members with one suffix, such as `a.txt` and `b.txt`, are a column. Its name is the suffix, here `txt`.

    Args:
        paths (`Sequence[str]`): Local paths, or paths for `fsspec`.
        root (`str`): Folder of the set.
        selection ([`Selection`]): Column of the images, which is required if samples have several images; and further
            columns to keep. The columns of [`LABEL_COLUMNS`] need not be in the first samples.

    Raises:
        OSError: The first file cannot be fetched.
        ValueError: No file has a sample, the samples have no image or several, or they lack a column to keep.
    """
    samples = _first_samples(paths)
    columns_of_samples = all_columns([sample.members for sample in samples])  # each once, such as ["jpg", "txt"]
    _check_images(samples, columns_of_samples, selection.image_column)
    columns = columns_of_samples + _rare_labels(selection, columns_of_samples)
    selection.check_columns(columns)  # raises if a column to keep is not among them
    features = datasets.Features()
    for column in columns:
        if selection.keeps(column):
            features[column] = _feature_of_labels(column, samples)
    return [TarPart(path, root, features, selection) for path in paths]


def _rare_labels(selection: Selection, columns_of_samples: Sequence[str]) -> list[str]:
    """Usual labels, such as `txt`, that are asked for and that the first samples of a set lack.

    They may come later, because few images of the set may have such a label.
    """
    rare_labels: list[str] = []
    for column in selection.columns:
        is_new = column not in columns_of_samples and column not in rare_labels
        if column in LABEL_COLUMNS and is_new:
            rare_labels.append(column)
    return rare_labels


def _check_images(samples: Sequence[Sample], suffixes: Sequence[str], image_suffix: str | None) -> None:
    """Raises unless the samples have images, and each has one."""
    has_image = False
    for sample in samples:
        image_suffixes = sample.image_suffixes(image_suffix)
        if len(image_suffixes) > 1:
            listed = ", ".join(image_suffixes)
            raise ValueError(f"the samples have several images: {listed}. Choose one with --image-column.")
        if image_suffixes:
            has_image = True
    if not has_image:
        raise _no_images_error(suffixes, image_suffix)


def _no_images_error(suffixes: Sequence[str], image_suffix: str | None) -> ValueError:
    """Error for first samples without an image: their images have another suffix, or come later in the file.

    Images come later if the file was packed unsorted, such as first all labels, then all images.
    """
    rule = f"--image-column must be one of {', '.join(suffixes)}"
    if image_suffix is not None:
        rule += f", got `{image_suffix}`"
    return ValueError(
        f"{rule}. If the members of a sample do not stand side by side, pack the files again with `tar --sort=name`."
    )


@dataclass
class _FileStart:
    """Start of a file.

    Args:
        samples (`list[Sample]`): First samples; fewer than [`PEEKED_SAMPLES`] if the file is short or damaged.
        fault (`str`): Why no more samples can be read, if the file is damaged.
    """

    samples: list[Sample] = field(default_factory=list)
    fault: str = ""


def _first_samples(paths: Sequence[str]) -> list[Sample]:
    """Reads the first samples of the first file that has any. Raises ValueError if no file has one."""
    reasons = []  # why each file has no samples
    for path in paths:
        start = _read_start(path)
        if start.samples:
            return start.samples
        reasons.append(start.fault or "it is empty")
    # The error names one file as an example.
    raise ValueError(f"tar files must hold images, but `{paths[0]}` has none: {reasons[0]}.")


def _read_start(path: str) -> _FileStart:
    """Reads the start of a file. Of a damaged file, these are the samples before the damage."""
    start = _FileStart()
    try:
        for sample in islice(_samples(path), PEEKED_SAMPLES):
            start.samples.append(sample)
    except TAR_ERRORS as error:
        if is_unreachable(error, is_url(path)):
            raise
        start.fault = fault_of(error)
    return start


class _Member(NamedTuple):
    """A member of a tar file that belongs to a sample.

    Args:
        sample_name (`str`): Path of the member without its suffix.
        suffix (`str`): Suffix of the member without a dot.
        header (`tarfile.TarInfo`): Header of the member.
    """

    sample_name: str
    suffix: str
    header: tarfile.TarInfo


def _samples(path: str) -> Iterator[Sample]:
    """Yields the samples of a file. Raises ValueError if the members of one do not stand side by side."""
    earlier_names: set[str] = set()
    with _opened_tar(path) as tar:
        for name, members in groupby(_members(tar), key=attrgetter("sample_name")):
            if name in earlier_names:  # another sample stands between the members of this name
                raise ValueError(
                    f"the members of a sample must stand side by side, but those of `{name}` in `{path}` do not. Pack "
                    "the file again with `tar --sort=name`."
                )
            earlier_names.add(name)
            sample = Sample(name)
            for member in members:
                suffix = member.suffix.lower()
                if _is_link(member.header):
                    sample.links.append(suffix)
                    sample.add(suffix, None)
                else:
                    sample.add(suffix, read_member(tar, member.header))
            yield sample
        check_end(tar)


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    """Yields files and links with a suffix, which belong to samples. `tar` can read the content of the last file."""
    for header in _headers(tar):
        match = MEMBER_NAME.fullmatch(readable(header.name))
        if match is not None and (header.isfile() or _is_link(header)):
            sample_name, suffix = match.groups()
            yield _Member(sample_name, suffix, header)


def _is_link(header: tarfile.TarInfo) -> bool:
    """Whether a member is a hard or symbolic link. `tar` packs the second name of a file as a hard link."""
    return header.islnk() or header.issym()


def _link_fault(suffix: str) -> str:
    """Reason why a sample with a link cannot be read."""
    return (
        f"its {suffix} is a link in the tar file, which is not followed. Pack the file again with `tar --sort=name "
        "--dereference --hard-dereference`."
    )


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the header of each member, after which `tar` can read its content."""
    member = tar.next()
    while member is not None:
        tar.members = []  # type: ignore[attr-defined] # `tarfile` would store the headers of all members
        yield member
        member = tar.next()


@contextmanager
def _opened_tar(path: str) -> Iterator[tarfile.TarFile]:
    """Opens a tar file on this machine or at a URL, compressed or not."""
    if not is_url(path):
        with tarfile.open(path, tarinfo=StrictTarInfo) as tar:
            yield tar
        return
    with opened_file(path) as file:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as tar:  # as a stream
            yield tar


def _feature_of_labels(suffix: str, samples: Sequence[Sample]) -> datasets.Value:
    """Type of a column of labels: integers if it holds classes and all of them are integers, otherwise texts."""
    text = datasets.Value("string")
    if suffix != CLASS_SUFFIX:
        return text
    for sample in samples:
        if suffix not in sample.members or suffix in sample.links:  # such a sample says nothing about the type
            continue
        content = sample.members[suffix]
        if content is None:  # it is too large to be read, so it is not an integer
            return text
        if not _is_integer(content):
            return text
    return datasets.Value("int64")


def _is_integer(content: bytes) -> bool:
    """Whether the content of a member is an integer of at most 18 digits, with spaces or line ends around it."""
    return re.fullmatch(rb"\s*-?\d{1,18}\s*", content) is not None


def _parse_label(content: bytes | None, feature: datasets.Value) -> Any:
    """Label in the content of a member: a text or an integer, as its column has. None without a member."""
    if content is None:
        return None
    if feature.dtype == "string":
        return content.decode()
    if not _is_integer(content):
        raise ValueError(f"it must be an integer, but is {content[:40]!r}.")
    return int(content)
