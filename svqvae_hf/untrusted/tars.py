"""Guards for tar files."""

import tarfile
from typing import Self

MAX_MEMBER_BYTES = 1 << 29  # 512 MiB, because a member is read as a whole, and a compressed file can hold any size
MAX_HEADER_BYTES = 1 << 20  # of an extended header, which holds names and is read as a whole
EXTENDED_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
BLOCK_BYTES = 1 << 20


class StrictTarInfo(tarfile.TarInfo):
    """Member of a tar file. Raises ReadError for a damaged header, which `tarfile` takes for the end of the file.

    It also raises for an extended header that is too large, and for a long chain of them, which `tarfile` reads by
    recursion.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """Reads the next header."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            # The regular end of the file: zeros in place of a header. `tarfile` expects this error, and catches it.
            # It is a HeaderError, too, so it would be taken for damage below.
            raise
        except (tarfile.HeaderError, ValueError, RecursionError) as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        """Reads what follows a header, after a check of its size."""
        if self.type in EXTENDED_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes at byte {tarfile_.offset}")
        return super()._proc_member(tarfile_)  # type: ignore[misc] # documented there as the place to extend


def check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError if data follow the end, as after a member that was overwritten with zeros."""
    block = tar.fileobj.read(BLOCK_BYTES)
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"more data follow its end at byte {tar.offset}")
        block = tar.fileobj.read(BLOCK_BYTES)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """Reads a regular member; None if it is too large, or sparse, which can have any size in a few bytes."""
    if member.issparse() or member.size > MAX_MEMBER_BYTES:
        return None
    file = tar.extractfile(member)
    if file is None:  # a folder or a device
        return None
    return file.read()
