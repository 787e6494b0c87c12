"""The libraries that the web page runs on: two npm packages of a pinned version, whose digests are checked."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NpmPackage:
    """A package of npm, as `npm pack` saves it.

    Args:
        name (`str`): Name and version, as npm takes them.
        archive (`str`): Name of the saved file.
        sha512 (`str`): Its digest in Base64, as npm states it.
        files (`tuple[str, ...]`): Files in it that the page needs.
    """

    name: str
    archive: str
    sha512: str
    files: tuple[str, ...]


ONNXRUNTIME = NpmPackage(
    name="onnxruntime-web@1.30.0",
    archive="onnxruntime-web-1.30.0.tgz",
    sha512="q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    files=("package/dist/ort.wasm.bundle.min.mjs", "package/dist/ort-wasm-simd-threaded.wasm"),
)
TOKENIZERS = NpmPackage(
    name="@huggingface/tokenizers@0.2.0",
    archive="huggingface-tokenizers-0.2.0.tgz",
    sha512="LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    files=("package/dist/tokenizers.min.mjs",),
)
PACKAGES = (ONNXRUNTIME, TOKENIZERS)
COMMAND = f"npm pack {ONNXRUNTIME.name} {TOKENIZERS.name}"


@contextmanager
def runtime_archives(folder: Path | None) -> Iterator[Path]:
    """Yields a folder with the archives of all `PACKAGES`, whose digests are checked.

    Args:
        folder (`Path`, *optional*): Folder that already has the archives. By default npm downloads them to a temporary
            folder.

    Raises:
        OSError: npm does not download the archives.
        ValueError: An archive is missing, or its digest differs from the digest that npm published.
    """
    if folder is not None:
        check_archives(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as downloaded:
        download_archives(Path(downloaded))
        check_archives(Path(downloaded))
        yield Path(downloaded)


def download_archives(folder: Path) -> None:
    """Lets npm download both packages to a folder.

    Raises:
        OSError: npm is not installed, or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(
            f"npm must be installed to download the page's runtime. Or run `{COMMAND}` elsewhere, and pass "
            "the folder of its two files with --runtime."
        )
    names = [package.name for package in PACKAGES]
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), *names]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if run.returncode != 0:
        _, _, last_line = run.stderr.strip().rpartition("\n")
        raise OSError(
            f"npm could not download the page's runtime: {last_line:.200}. Run `{COMMAND}` elsewhere, and "
            "pass the folder of its two files with --runtime."
        )


def check_archives(folder: Path) -> None:
    """Raises ValueError unless a folder has both archives, each with its digest."""
    for package in PACKAGES:
        path = folder / package.archive
        if not path.is_file():
            raise ValueError(f"`{folder}` must have the file `{package.archive}`, but has not. `{COMMAND}` saves it.")
        digest = hashlib.sha512(path.read_bytes()).digest()
        if base64.b64encode(digest).decode() != package.sha512:
            raise ValueError(
                f"`{path}` must be {package.name} as it was published, but its SHA-512 differs. Delete "
                f"it, and run `{COMMAND}`."
            )


def extract_runtime(archives: Path, folder: Path) -> None:
    """Writes the files that the page needs to a new folder."""
    folder.mkdir()
    for package in PACKAGES:
        for name in package.files:
            target = folder / Path(name).name
            target.write_bytes(read_member(archives / package.archive, name))


def tokenizers_license(archives: Path) -> str:
    """Licence text of the library of tokenizers."""
    return read_member(archives / TOKENIZERS.archive, "package/LICENSE").decode()


def read_member(archive_path: Path, name: str) -> bytes:
    """Content of a file in an archive."""
    with tarfile.open(archive_path) as archive:
        member = archive.extractfile(name)
        if member is None:
            raise ValueError(f"`{archive_path.name}` must have the file `{name}`, but has not.")
        return member.read()
