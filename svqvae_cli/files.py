"""Files that commands read and write. Nothing slow is imported, so a wrong path is an error at once."""

import argparse
import glob
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# As in `svqvae_hf.models.image_files`, in the same order.
IMAGE_SUFFIXES = tuple(".bmp .gif .jpg .jpeg .png .ppm .pgm .pnm .tif .tiff .webp .avif".split())
TIFF_SUFFIXES = (".tif", ".tiff")  # as in `svqvae_hf.large.tiff_reader`
TOKEN_SUFFIXES = (".safetensors", ".svqz")  # of plain and of compressed token files
SETTINGS_FILE = "svqvae_tokens.json"  # as in `svqvae_hf.token_sets.settings`
PACKAGE = Path(__file__).parents[1] / "svqvae_hf"  # beside this package
BUNDLED = {"bundled": PACKAGE / "pretrained", "scenes": PACKAGE / "pretrained_scenes"}
REPO_ID = r"\w[\w.-]*/\w[\w.-]*"  # as in `svqvae_hf.hub.repositories`


class InputFile(NamedTuple):
    """Input of a command.

    Args:
        path (`Path`): The file.
        name (`Path`): Path below the folder in which the file was found, or its file name.
        target_name (`Path`): `name` without the suffix, or with it if another input differs in the suffix alone.
    """

    path: Path
    name: Path
    target_name: Path

    def target(self, output: Path, ending: str) -> Path:
        """Output file: the input `a/b.png` and the ending `_x1.png` make `a/b_x1.png` in the output folder."""
        return output / f"{self.target_name}{ending}"


def find_images(args: argparse.Namespace, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[InputFile]:
    """Finds the images that a command encodes, and checks the name of its model and its tiles."""
    check_source(args.model)
    check_tiles(args.model, getattr(args, "tile_size", None))
    return find_inputs(args.inputs, suffixes, args.output)


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str], output: Path | None = None) -> list[InputFile]:
    """Finds the input files of a command and lists each once.

    Args:
        patterns (`Sequence[str]`): Files, folders and glob patterns. A folder stands for the files in it and in its
            subfolders that have one of the suffixes, and also for broken links and pipes, so that a run counts them as
            skipped. Hidden files and folders are left out.
        suffixes (`Sequence[str]`): Suffixes in lower case, such as `.png`.
        output (`Path`, *optional*): Folder that the command writes to. It is not searched.

    Raises:
        ValueError: A pattern matches no file, or is the output folder.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            if output is not None and path.resolve() == output.resolve():
                raise ValueError(f"--output must not be an input folder, got `{output}`. Choose another.")
            files = [(file, file.relative_to(path)) for file in search_folder(path, suffixes, output)]
            missing = f"the folder `{pattern}`, subfolders included, has no file that ends in {', '.join(suffixes)}."
        elif path.exists():
            if pattern.lower().endswith((".zip", ".rar", ".7z")):
                raise ValueError(f"`{pattern}` must be unpacked first, because archives are not read.")
            files = [(path, Path(path.name))] if path.is_file() else []
            missing = f"an input must be a file or a folder, but `{pattern}` is neither."
        else:
            matches = (Path(match) for match in sorted(glob.glob(pattern, recursive=True)))
            files = [(match, Path(match.name)) for match in matches if match.is_file()]
            missing = f"no file or folder matches `{pattern}`."
        if not files:
            raise ValueError(missing)
        for path, name in files:  # links with different names are kept, even to the same file
            found.setdefault(path.parent.resolve() / path.name, (path, name))
    stems = Counter(name.with_suffix("") for _, name in found.values())
    return [
        InputFile(path, name, name if stems[name.with_suffix("")] > 1 else name.with_suffix(""))
        for path, name in found.values()
    ]


def is_token_set(name: str) -> bool:
    """Whether an input is the folder of a token set, its URL or its name on the Hub."""
    is_on_hub = re.fullmatch(REPO_ID, name) and not os.path.lexists(name) and not name.endswith(TOKEN_SUFFIXES)
    return bool(is_on_hub) or "://" in name or os.path.isfile(os.path.join(name, SETTINGS_FILE))


def find_bundled(name: str) -> str:
    """Folder of a bundled model by its name, unless a file or folder of that name exists."""
    return name if os.path.exists(name) else str(BUNDLED.get(name, name))


def search_folder(folder: Path, suffixes: Sequence[str], output: Path | None = None) -> Iterator[Path]:
    """Yields the files that [`find_inputs`] finds in a folder, in order of their paths."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        closed = {path.resolve() for path in (Path(here), *Path(here).parents)}  # links may lead back to them
        if output is not None:
            closed.add(output.resolve())
        folders[:] = [name for name in folders if name[0] != "." and Path(here, name).resolve() not in closed]
        files += [Path(here, name) for name in names if name[0] != "." and Path(name).suffix.lower() in suffixes]
    yield from sorted(files, key=os.fspath)


def check_output(output: Path) -> None:
    """Raises ValueError if the output folder cannot be written."""
    nearest = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone do not tell: not even root can write to `/proc`
            pass
    except OSError as error:
        raise ValueError(f"--output must be a writable folder, but `{nearest}` is not.") from error


def check_file(path: Path) -> None:
    """Raises ValueError for a broken link, a pipe or a device. A pipe may have no end."""
    if not path.is_file():
        raise ValueError(f"`{path}` is {'not a file' if path.exists() else 'a broken link'}.")


def check_absent(path: Path) -> None:
    """Raises ValueError if a file to write exists."""
    if path.exists():
        raise ValueError(f"`{path}` already exists. Pass --overwrite, or use another --output.")


def check_source(source: str | None, subfolder: bool = False) -> None:
    """Raises ValueError unless a model can be loaded from `source`: a folder or a Hub id, here with a subfolder."""
    if source is None:  # the bundled model
        return
    path = Path(source)
    if path.is_file():
        raise ValueError(f"a model must be a folder or a Hub id, got the file `{source}`. Use `svqvae convert` on it.")
    if not path.is_dir() and not re.fullmatch(REPO_ID + (r"(/[\w.-]+)?" if subfolder else ""), source):
        raise ValueError(
            f"there is no file or folder `{source}`. On the Hub a model is `org/repo`. An original checkpoint, "
            "for `convert` and `info`, is `org/repo:file`."
        )


def check_tiles(source: str | None, tile_size: int | None) -> None:
    """Raises ValueError for a tile size that does not fit a local model. Others are checked once they are loaded."""
    config = Path(source or BUNDLED["bundled"], "config.json")
    if tile_size is not None and config.is_file():
        f = 2 ** (len(json.loads(config.read_text()).get("encoder_ch_mult", [])) - 1)
        if tile_size < 1 or tile_size % f:
            near = max(f, tile_size // f * f)
            raise ValueError(f"--tile-size must be a multiple of {f}, got {tile_size}. Try {near}.")


def check_new_folder(out: str | os.PathLike) -> None:
    """Raises ValueError if a local folder to create exists and is not empty, or cannot be created."""
    path = Path(out)
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    fault = "" if nearest.is_dir() else f"`{nearest}` is a file"
    if path.is_dir() and any(path.iterdir()):
        fault = "it is not empty"
    if fault:
        raise ValueError(f"`{out}` must be a new or empty folder, but {fault}. Choose another.")


def check_data(names: Sequence[str]) -> None:
    """Raises ValueError for an image set that does not exist, unless it is a pattern, a URL or may be on the Hub."""
    for name in names:
        may_be_elsewhere = "://" in name or re.search(r"[*?\[{]", name) or re.fullmatch(REPO_ID, name)
        if not may_be_elsewhere and not os.path.lexists(name):
            raise ValueError(f"no file or folder matches `{name}`. On the Hub an image set is `org/name`.")
