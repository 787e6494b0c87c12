"""Files that commands read and write. Nothing slow is imported, so a wrong path is an error at once."""

import argparse
import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svqvae_files.file_names import (
    ARCHIVE_SUFFIXES,
    DEFAULT_MODEL,
    IMAGE_SUFFIXES,
    REPO_ID,
    STARTED_TOKEN_SET_FILE,
    TOKEN_SET_DATA,
    TOKEN_SET_FILE,
    TOKEN_SET_MANIFEST,
    TOKEN_SET_RECORDS,
    TOKEN_SUFFIXES,
)
from svqvae_files.inputs import is_url, walk_files
from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import is_writable, nearest_existing

CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
RUN_STATE = "run_state.pt"
CHECKPOINT_STATES = (RUN_STATE, "trainer_state.json")  # each checkpoint of a training script has one of them


@dataclass(frozen=True)
class InputFile:
    """Input of a command.

    Args:
        path (`Path`): The file.
        name (`Path`): Path below the folder in which the file was found, or its file name.
        target_name (`Path`): `name` without the suffix, or with it if another input differs in the suffix alone.
    """

    path: Path
    name: Path
    target_name: Path

    @property
    def folder(self) -> Path:
        """Folder in which the file was found."""
        return self.path.parents[len(self.name.parts) - 1]

    def target(self, output: Path, ending: str) -> Path:
        """Output file: the input `a/b.png` and the ending `_x1.png` make `a/b_x1.png` in the output folder."""
        return output / f"{self.target_name}{ending}"


@dataclass(frozen=True)
class FoundFile:
    """A file that an input of the command line stands for.

    Args:
        path (`Path`): The file.
        relative_path (`Path`): Path below the folder in which the file was found, or its file name.
    """

    path: Path
    relative_path: Path


def find_images(args: argparse.Namespace, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[InputFile]:
    """Finds the images that a command encodes, and checks the name of its model and its tiles."""
    check_source(args.model)
    check_tiles(args.model, getattr(args, "tile_size", None))
    return find_inputs(args.inputs, suffixes, args.output)


def find_inputs(patterns: Sequence[str], suffixes: Sequence[str], output: Path | None = None) -> list[InputFile]:
    """Finds the input files of a command and lists each once.

    Args:
        patterns (`Sequence[str]`): Files, folders and glob patterns of both. A folder stands for the files in it and
            in its subfolders that have one of the suffixes, and also for broken links and pipes, so that a run counts
            them as skipped. Hidden files and folders are left out.
        suffixes (`Sequence[str]`): Suffixes in lower case, such as `.png`.
        output (`Path`, *optional*): Folder that the command writes to. It is not searched.

    Raises:
        ValueError: A pattern matches no file, or is the output folder.
    """
    files: dict[Path, FoundFile] = {}
    for pattern in patterns:
        for file in _find(pattern, suffixes, output):
            # Links to folders are resolved, so that a file is listed once if two patterns find it by two paths. A link
            # to a file is not resolved: it is an input of its own, because its outputs have its own name.
            real_folder = file.path.parent.resolve()
            real_path = real_folder / file.path.name
            files.setdefault(real_path, file)
    num_files_of_stem = Counter(file.relative_path.with_suffix("") for file in files.values())
    inputs = []
    for file in files.values():
        stem = file.relative_path.with_suffix("")
        target_name = stem
        if num_files_of_stem[stem] > 1:  # `a.png` and `a.jpg`
            target_name = file.relative_path
        inputs.append(InputFile(file.path, file.relative_path, target_name))
    return inputs


def _find(pattern: str, suffixes: Sequence[str], output: Path | None) -> list[FoundFile]:
    """Files that one input of the command line stands for: a folder, a file or a glob pattern."""
    path = Path(pattern)
    if path.is_dir():
        return _find_in_folder(path, suffixes, output)
    if not path.exists():
        return _find_matches(pattern, suffixes, output)
    if pattern.lower().endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"`{pattern}` must be unpacked first, because archives are not read.")
    if not path.is_file():
        raise ValueError(f"an input must be a file or a folder, but `{pattern}` is neither.")
    return [FoundFile(path, Path(path.name))]


def _find_in_folder(folder: Path, suffixes: Sequence[str], output: Path | None) -> list[FoundFile]:
    """Files of a folder that is an input of the command line. Raises ValueError if it has none with the suffixes."""
    if _is_same(folder, output):
        raise ValueError(f"--output must not be an input folder, got `{output}`. Choose another.")
    files = search_folder(folder, suffixes, output)
    if not files:
        listed = ", ".join(suffixes)
        raise ValueError(f"the folder `{folder}`, subfolders included, has no file that ends in {listed}.")
    return files


def _find_matches(pattern: str, suffixes: Sequence[str], output: Path | None) -> list[FoundFile]:
    """Files that a glob pattern matches, and files in the folders that it matches."""
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    if not matches:
        raise ValueError(f"no file or folder matches `{pattern}`.")
    files = []
    for match in matches:
        if match.is_file():
            files.append(FoundFile(match, Path(match.name)))
        elif match.is_dir() and not _is_same(match, output):
            files += search_folder(match, suffixes, output)
    if not files:
        raise ValueError(f"`{pattern}` matches only folders without a file that ends in {', '.join(suffixes)}.")
    return files


def search_folder(folder: Path, suffixes: Sequence[str], output: Path | None = None) -> list[FoundFile]:
    """Files that [`find_inputs`] finds in a folder, in order of their paths."""
    files = []
    for name in walk_files(folder, leave_out=output):
        if name.lower().endswith(tuple(suffixes)):
            files.append(FoundFile(folder / name, Path(name)))
    return files


def _is_same(folder: Path, output: Path | None) -> bool:
    """Whether an input folder is the output folder."""
    return output is not None and folder.resolve() == output.resolve()


def is_token_set(name: str) -> bool:
    """Whether an input is the folder of a token set, also of one that is not complete, its URL or its Hub name."""
    if is_url(name):
        return True
    if is_token_set_folder(Path(name)):
        return True
    # A missing token file, such as `tokens/a.svqz`, also has the form of a Hub name.
    is_named_as_token_file = name.endswith(TOKEN_SUFFIXES)
    is_on_disk = os.path.lexists(name)
    has_form_of_hub_name = re.fullmatch(REPO_ID, name) is not None
    return has_form_of_hub_name and not is_named_as_token_file and not is_on_disk


def is_token_set_folder(folder: Path) -> bool:
    """Whether a folder holds a token set, also one that is not complete, or has lost the file with its options."""
    has_options = (folder / TOKEN_SET_FILE).is_file() or (folder / STARTED_TOKEN_SET_FILE).is_file()
    has_manifest = (folder / TOKEN_SET_MANIFEST).is_file() and (folder / TOKEN_SET_DATA).is_dir()
    has_record = any(folder.glob(TOKEN_SET_RECORDS))
    return has_options or has_manifest or has_record


def check_output(output: Path) -> None:
    """Raises ValueError if the output folder cannot be written."""
    nearest = nearest_existing(output)
    if not is_writable(nearest):
        raise ValueError(f"--output must be a writable folder, but `{nearest}` is not.")


def check_file(path: Path) -> None:
    """Raises ValueError for a broken link, a pipe or a device. A pipe may have no end."""
    if path.is_file():
        return
    fault = "not a file" if path.exists() else "a broken link"
    raise ValueError(f"`{path}` is {fault}.")


def check_absent(path: Path) -> None:
    """Raises ValueError if a file to write exists."""
    if path.exists():
        raise ValueError(f"`{path}` already exists. Pass --overwrite, or use another --output.")


def check_source(source: str | None, allow_subfolder: bool = False) -> None:
    """Raises ValueError unless a model is a folder, or its name has the form of a Hub id. Its files are not read.

    Args:
        source (`str`, *optional*): Folder or Hub id of the model; `None` for the bundled model.
        allow_subfolder (`bool`, defaults to `False`): Whether a subfolder may follow a Hub id: `org/repo/vqvae`.
    """
    if source is None:  # the bundled model
        return
    path = Path(source)
    if path.is_file():
        raise ValueError(f"a model must be a folder or a Hub id, got the file `{source}`. Use `svqvae convert` on it.")
    if path.is_dir():
        return
    pattern = REPO_ID
    if allow_subfolder:
        pattern = rf"{REPO_ID}(/\w[\w.-]*)*"
    if not re.fullmatch(pattern, source):
        raise ValueError(
            f"there is no file or folder `{source}`. On the Hub a model is `org/repo`. An original checkpoint, "
            "for `convert` and `info`, is `org/repo:file`."
        )
    owner, _, name = source.partition("/")
    if Path(owner).is_dir():
        raise ValueError(
            f"the folder `{owner}` has no folder `{name}`. Correct the name of the model. To load `{source}` from "
            "the Hub, run the command in another folder."
        )


def check_trained(source: str | None) -> None:
    """Raises ValueError for a checkpoint of a training run, and for the folder of a run that is not finished.

    Args:
        source (`str`, *optional*): Folder or Hub id of the model; `None` for the bundled model.
    """
    if source is None:
        return
    folder = Path(source)
    if _is_checkpoint(folder):
        raise ValueError(
            f"a model must be the result of a training run, but `{source}` is a checkpoint. {_how_to_finish(folder)}, "
            f"and pass `{folder.parent}`."
        )
    # A run has its checkpoints in subfolders. The config of its model, a JSON file, lies beside them only at the end.
    is_finished = any(folder.glob("*.json"))
    if is_finished:
        return
    checkpoints = [path for path in folder.glob("checkpoint-*") if _is_checkpoint(path)]
    if not checkpoints:
        return
    last_checkpoint = max(checkpoints, key=_step_of_checkpoint)
    raise ValueError(
        f"a model must be the result of a training run, but the run in `{source}` is not finished. Its last "
        f"checkpoint is {last_checkpoint.name}. {_how_to_finish(last_checkpoint)}."
    )


def _how_to_finish(checkpoint: Path) -> str:
    """How a run makes a model of its checkpoint.

    Runs whose checkpoints hold `RUN_STATE` can also end at a checkpoint. Those of transformers' `Trainer` were not
    tried.
    """
    advice = "Finish the run by the same command with --resume_from_checkpoint latest"
    if (checkpoint / RUN_STATE).is_file():
        advice += f", or end it there with --max_steps {_step_of_checkpoint(checkpoint)} as well"
    return advice


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a training script."""
    has_name = CHECKPOINT_NAME.fullmatch(folder.name) is not None
    return has_name and any((folder / name).is_file() for name in CHECKPOINT_STATES)


def _step_of_checkpoint(folder: Path) -> int:
    """Number of steps of a checkpoint."""
    return int(folder.name.rpartition("-")[2])


def check_tiles(source: str | None, tile_size: int | None) -> None:
    """Raises ValueError for a tile size that does not fit a local model. Others are checked once they are loaded."""
    config_file = Path(source or DEFAULT_MODEL, "config.json")
    if tile_size is None or not config_file.is_file():
        return
    multipliers = read_json_object(config_file).get("encoder_ch_mult")
    if not isinstance(multipliers, list) or not multipliers:  # damaged: an error once the model is loaded
        return
    downsampling = 2 ** (len(multipliers) - 1)  # pixels per id, along each side
    if tile_size < 1 or tile_size % downsampling:
        next_smaller = tile_size // downsampling * downsampling
        advice = max(downsampling, next_smaller)
        raise ValueError(f"--tile-size must be a multiple of {downsampling}, got {tile_size}. Try {advice}.")


def check_data(names: Sequence[str]) -> None:
    """Raises ValueError for an image set that does not exist, unless it is a pattern, a URL or may be on the Hub."""
    for name in names:
        is_pattern = re.search(r"[*?\[{]", name) is not None
        may_be_on_hub = re.fullmatch(REPO_ID, name) is not None
        if is_pattern or is_url(name) or may_be_on_hub:
            continue
        if not os.path.lexists(name):
            raise ValueError(f"no file or folder matches `{name}`. On the Hub an image set is `org/name`.")
