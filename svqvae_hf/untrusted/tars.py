"""Guards for tar files."""

import tarfile
from typing import Self

MAX_MEMBER_BYTES = 1 << 29  # 512 MiB, because a member is read as a whole, and a compressed file can hold any size


class StrictTarInfo(tarfile.TarInfo):
    """Member of a tar file. Raises ReadError for a damaged header, which `tarfile` takes for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """Reads the next header."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # zeros, which mark the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error


def check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError if data follow the end, as after a member that was overwritten with zeros."""
    while block := tar.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"more data follow its end at byte {tar.offset}")


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """Reads a regular member; None if it is too large, or sparse, which can have any size in a few bytes."""
    if member.issparse() or member.size > MAX_MEMBER_BYTES:
        return None
    file = tar.extractfile(member)
    return None if file is None else file.read()
