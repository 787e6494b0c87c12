"""Images of a validation must not be trained on."""

import filecmp
import os
from collections import defaultdict
from collections.abc import Sequence

from svqvae_files.inputs import is_url, readable
from svqvae_hf.data.image_sets import ImageSet


def check_held_out(held_out: ImageSet, trained: ImageSet | None) -> None:
    """Raises if a file of one set is one of the other: it has the same URL, or the same bytes on this machine.

    Args:
        held_out ([`ImageSet`]): Images of the validation, of any kind.
        trained ([`ImageSet`], *optional*): Images that are trained on; with `None`, nothing is compared.

    Raises:
        ValueError: The sets share a file.
    """
    if trained is None:
        return
    trained_paths = trained.files.paths()
    trained_urls = {path for path in trained_paths if is_url(path)}
    trained_files = _files_by_size(trained_paths)
    for path in held_out.files.paths():
        if path in trained_urls:
            raise _shared_file_error(held_out, path, trained, path)
        if not os.path.isfile(path):
            continue
        for trained_path in trained_files.get(os.path.getsize(path), []):
            if filecmp.cmp(path, trained_path, shallow=False):
                raise _shared_file_error(held_out, path, trained, trained_path)


def _files_by_size(paths: Sequence[str]) -> dict[int, list[str]]:
    """Paths of the files on this machine, by their bytes."""
    files = defaultdict(list)
    for path in paths:
        if os.path.isfile(path):
            files[os.path.getsize(path)].append(path)
    return files


def _shared_file_error(held_out: ImageSet, path: str, trained: ImageSet, trained_path: str) -> ValueError:
    return ValueError(
        f"`--validation_data_dir` must hold images that are not trained on, but `{_key(held_out, path)}` is "
        f"`{_key(trained, trained_path)}` of the training images. Remove it from one of them."
    )


def _key(images: ImageSet, path: str) -> str:
    """Path of a file, relative to the folder of its set."""
    return readable(path.removeprefix(images.files.root).lstrip("/"))
