"""Loads from repositories on the Hub, creates them, uploads folders to them, and explains the Hub's errors."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, errors, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from svqvae_files.file_names import BUNDLED, REPO_ID
from svqvae_files.hub import check_may_be_on_hub
from svqvae_files.hub import hub_reason as hub_reason

# What stands, in Python, for the names that commands and scripts take
CONSTANTS_OF_BUNDLED = {"bundled": "svqvae_hf.DEFAULT_MODEL", "scenes": "svqvae_hf.DEFAULT_GENERATOR"}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
LICENSES = Path(__file__).with_name("licenses.txt").read_text().split()  # of hf.co/docs/hub/repositories-licenses

Loaded = TypeVar("Loaded")


def is_hub_id(source: str | Path) -> bool:
    """Whether a source is `org/name` on the Hub, and not a local file or folder."""
    return re.fullmatch(REPO_ID, str(source)) is not None and not Path(source).exists()


def public_name(source: str | Path) -> str:
    """A source as it may be published: its Hub id, `org/repo:file`, its bundled name, or its name without folders."""
    name_of_bundled_model = bundled_name(source)
    if name_of_bundled_model is not None:
        return name_of_bundled_model
    if is_hub_id(source) or hub_repo(source) is not None:
        return str(source)
    return Path(source).absolute().name


def bundled_name(source: str | Path) -> str | None:
    """Name of the bundled model in a folder; `None` for any other source."""
    for name, folder in BUNDLED.items():
        if Path(source).resolve() == Path(folder).resolve():
            return name
    return None


def hub_repo(source: str | Path) -> str | None:
    """Returns the repository in `org/repo:file`, or None for a local file."""
    match = re.fullmatch(rf"({REPO_ID}):(.+)", str(source))
    if match is None or Path(source).exists():
        return None
    return match[1]


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a `from_pretrained` that say how the Hub is read."""
    return {name: value for name, value in options.items() if name in HUB_OPTIONS}


def from_hub(load: Callable[..., Loaded], source: str | os.PathLike, **options: Any) -> Loaded:
    """Calls a loader of files that may be on the Hub, and explains its errors.

    Args:
        load (`Callable`): Function that takes a folder or Hub id, such as `from_pretrained`.
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        **options: Further arguments of `load`.

    Raises:
        OSError: If the repository does not exist, or the Hub does not answer and the cache has no complete copy.
    """
    _check_not_bundled_name(source)
    check_may_be_on_hub(source)
    try:
        return load(source, **options)
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        is_local = Path(source).exists()
        is_one_file_missing = lacks_file(error)  # the repository is on the Hub, but lacks a file
        if is_local or is_one_file_missing:
            raise  # the error of `load` names the file, so it needs no explanation
        raise OSError(f"could not load `{source}`: there is no such folder, and {hub_reason(error)}") from error


def _check_not_bundled_name(source: str | os.PathLike) -> None:
    """Raises OSError for a name that commands and scripts take for a bundled model, before the Hub is asked for it."""
    name = str(source)
    if name in CONSTANTS_OF_BUNDLED and not Path(name).exists():
        constant = CONSTANTS_OF_BUNDLED[name]
        raise OSError(
            f"could not load `{name}`: only commands and scripts know the bundled model by this name. In Python, pass "
            f"`{constant}`."
        )


def lacks_file(error: Exception) -> bool:
    """Whether an error of `huggingface_hub` says that a repository lacks a file.

    A file that is not in the cache while the Hub does not answer has an error of a subclass, and may exist.
    """
    if isinstance(error, errors.LocalEntryNotFoundError):
        return False
    return isinstance(error, errors.EntryNotFoundError)


def download_file(repo_id: str, file: str, source: str | Path, **options: Any) -> Path:
    """Downloads a file from the Hub, or finds it in the cache if the Hub does not answer.

    Args:
        repo_id (`str`): `org/name` on the Hub.
        file (`str`): Path of the file in the repository.
        source (`str` or `Path`): What the user named, for the error.
        **options: Further arguments of [`~huggingface_hub.hf_hub_download`].

    Raises:
        OSError: If the file does not exist or cannot be downloaded.
    """
    try:
        return Path(hf_hub_download(repo_id, file, **options))
    except (errors.HTTPError, OSError) as error:
        raise OSError(f"could not download `{source}` from the Hub: {hub_reason(error)}") from error


def check_repo_id(repo_id: str, argument: str = "push_to_hub") -> None:
    """Raises ValueError unless the name is `org/name`, as the Hub allows it."""
    if not re.fullmatch(REPO_ID, repo_id):
        raise ValueError(f"`{argument}` must be `org/name`, got {repo_id!r}.")
    validate_repo_id(repo_id)


def prepare_repo(repo_id: str, *, private: bool | None, license: str | None, token: str | None = None) -> str:
    """Creates a repository on the Hub unless it exists, and checks the licence. Call it before the work to upload.

    Args:
        repo_id (`str`): `org/name`, or `name` of the user.
        private (`bool`, *optional*): Whether a new repository is private. By default, the setting of the
            organization decides.
        license (`str`, *optional*): Licence for the card, by the Hub's identifier.
        token (`str`, *optional*): Access token, by default the stored one.

    Returns:
        `str`: `org/name`.

    Raises:
        OSError: If the Hub denies the request or cannot be reached.
        ValueError: If the Hub does not know the licence.
    """
    check_license(license)
    try:
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (errors.HTTPError, OSError) as error:
        raise OSError(f"Could not create `{repo_id}` on the Hub: {hub_reason(error)}") from error


def check_license(license: str | None) -> None:
    """Raises ValueError unless a licence, if any, is one of the Hub's identifiers. Call it before the work."""
    if license is not None and license not in LICENSES:
        raise ValueError(
            "`license` must be an identifier that the Hub knows, such as `apache-2.0`, or `other` for the rest, got "
            f"{license!r:.80}."
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    message: str,
    *,
    create_pr: bool = False,
    token: str | None = None,
    files: list[str] | None = None,
) -> str:
    """Uploads a folder to an existing repository.

    Args:
        folder (`str` or `Path`): The folder.
        repo_id (`str`): `org/name`.
        message (`str`): Title of the commit.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        token (`str`, *optional*): Access token, by default the stored one.
        files (`list[str]`, *optional*): Globs of the files to upload, all by default.

    Returns:
        `str`: URL of the commit or pull request.

    Raises:
        OSError: If the Hub denies the request or cannot be reached.
    """
    try:
        commit = HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, create_pr=create_pr, allow_patterns=files
        )
    except (errors.HTTPError, OSError) as error:
        raise OSError(f"the upload to `{repo_id}` failed: {hub_reason(error)}") from error
    return commit.pr_url or commit.commit_url
