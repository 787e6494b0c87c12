"""Guards for tar files."""

import tarfile

MAX_MEMBER_BYTES = 1 << 29  # 512 MiB, because a member is read as a whole, and a compressed file can hold any size


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """Reads a regular member; None if it is too large, or sparse, which can have any size in a few bytes."""
    if member.issparse() or member.size > MAX_MEMBER_BYTES:
        return None
    file = tar.extractfile(member)
    return None if file is None else file.read()
