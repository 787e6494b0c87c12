"""Images of a validation must not be trained on."""

import filecmp
import os
from collections import defaultdict
from collections.abc import Sequence

from svqvae_files.inputs import readable
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
    trained_urls = {path for path in trained_paths if "://" in path}
    trained_files = _files_by_size(trained_paths)
    for path in held_out.files.paths():
        if path in trained_urls:
            _refuse(held_out, path, trained, path)
        if not os.path.isfile(path):
            continue
        for other in trained_files.get(os.path.getsize(path), []):
            if filecmp.cmp(path, other, shallow=False):
                _refuse(held_out, path, trained, other)


def _files_by_size(paths: Sequence[str]) -> dict[int, list[str]]:
    files = defaultdict(list)
    for path in paths:
        if os.path.isfile(path):
            files[os.path.getsize(path)].append(path)
    return files


def _refuse(held_out: ImageSet, path: str, trained: ImageSet, trained_path: str) -> None:
    raise ValueError(
        f"`--validation_data_dir` must hold images that are not trained on, but `{_key(held_out, path)}` is "
        f"`{_key(trained, trained_path)}` of the training images. Remove it from one of them."
    )


def _key(images: ImageSet, path: str) -> str:
    return readable(path.removeprefix(images.files.root).lstrip("/"))
