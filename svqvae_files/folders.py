"""Folders that `fsspec` reaches, on a disk or in an object store. Each file in them is complete or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from svqvae_files import outputs
from svqvae_files.errors import explained
from svqvae_files.inputs import check_url
from svqvae_files.json_files import parse_json_object
from svqvae_files.outputs import temporary_path


class Folder:
    """A folder, which need not exist. Credentials come from the environment of `fsspec`'s file systems alone.

    Args:
        url (`str` or `os.PathLike`): Local path, or URL such as `s3://bucket/tokens`.

    Raises:
        ValueError: The URL names no bucket, `fsspec` does not know its scheme, or a package for it is missing.
    """

    def __init__(self, url: str | os.PathLike):
        self.url = check_url(os.fspath(url)).rstrip("/") or "/"
        try:
            self.files, self.path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"`{self.url}` cannot be reached: {str(error).removesuffix('.')}.") from error
        self.is_local = isinstance(self.files, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """Content of a file; `None` if it is absent."""
        with self._explained(name, "read"), suppress(FileNotFoundError):
            return self.files.cat_file(self._path(name))
        return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Object in a JSON file; `None` if it is absent. Raises ValueError if it is damaged."""
        content = self.read(name)
        if content is None:
            return None
        return parse_json_object(content, self._path(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, and its folder if necessary."""
        with self.new_file(name) as path:
            path.write_bytes(content)

    def create(self, name: str, content: bytes) -> None:
        """Writes a file unless it exists.

        If several processes do so at once, the file of the first one stays. This holds on disks whose file system has
        hard links. Elsewhere a later file replaces an earlier one.
        """
        if self.read(name) is not None:
            return
        if not self.is_local:
            self.write(name, content)
            return
        path = Path(self._path(name))
        with self._explained(name, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_path(path)
            try:
                temporary.write_bytes(content)
                _move_unless_exists(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def new_file(self, name: str) -> AbstractContextManager[Path]:
        """Makes a context whose value is a temporary local path to write to.

        What was written becomes the file `name` at the end of the context, unless an error is raised within.
        """
        if self.is_local:
            path = Path(self._path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            return outputs.new_file(path)
        return self._new_remote_file(name)

    @contextmanager
    def _new_remote_file(self, name: str) -> Iterator[Path]:
        """Yields a temporary local path, and uploads what was written to it."""
        with tempfile.TemporaryDirectory() as temporary_folder:
            temporary = Path(temporary_folder, "content")
            with self._explained(name, "written"):  # errors say that the file `name` cannot be written
                yield temporary
                self.files.put_file(str(temporary), self._path(name))

    def names(self, subfolder: str) -> set[str]:
        """Names of what is in a subfolder; none if it is absent."""
        with self._explained(subfolder, "read"), suppress(FileNotFoundError):
            self.files.invalidate_cache()  # because other processes write to the folder, too
            paths = self.files.ls(self._path(subfolder), detail=False)
            return {path.rsplit("/", 1)[-1] for path in paths}
        return set()

    def sizes(self, subfolder: str) -> dict[str, int]:
        """Bytes of each file in a subfolder and its subfolders, by names relative to this folder."""
        with self._explained(subfolder, "read"):
            self.files.invalidate_cache()
            listed = self.files.find(self._path(subfolder), detail=True)
        sizes = {}
        for path, info in listed.items():
            sizes[self._name(path)] = info["size"]
        return sizes

    def delete_empty(self, subfolder: str) -> None:
        """Deletes a subfolder of a disk if it is empty. Object stores have no empty ones."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self._path(subfolder))

    def delete(self, name: str) -> None:
        """Deletes a file, or a subfolder with all that is in it, if it exists."""
        with self._explained(name, "deleted"), suppress(FileNotFoundError):
            self.files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        """Path of a file in its file system, from its name relative to this folder."""
        return f"{self.path.rstrip('/')}/{name}"

    def _name(self, path: str) -> str:
        """Name of a file relative to this folder, from its path in its file system."""
        return path.removeprefix(self.path).lstrip("/")

    def _explained(self, name: str, done: str) -> AbstractContextManager[None]:
        """Explains errors of a block that works on a file, see [`explained`]. `done` is a word such as `"read"`."""
        if self.is_local:
            return explained(self._path(name), done)
        return explained(f"{self.url}/{name}", done)


def _move_unless_exists(temporary: Path, path: Path) -> None:
    """Gives a temporary file its name, unless there is a file of this name."""
    # A hard link is made in one step, and only if the name is free. So one of several processes succeeds.
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # the file system has no links
        temporary.replace(path)
