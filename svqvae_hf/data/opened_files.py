"""Opens files of image sets, on this machine or at URLs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import fsspec

from svqvae_files.errors import explained
from svqvae_files.inputs import is_url


@contextmanager
def opened_file(path: str) -> Iterator[BinaryIO]:
    """Opens a file to read it. An error while a file at a URL is read becomes one line that names the URL.

    Args:
        path (`str`): Local path, or a URL for `fsspec`.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    with explained(path, "read"), fsspec.open(path, "rb") as file:
        yield file
