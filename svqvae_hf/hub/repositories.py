"""Loads from repositories on the Hub, creates them, uploads folders to them, and explains the Hub's errors."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

REPO_ID = r"\w[\w.-]*/\w[\w.-]*"
ANSWER_SECONDS = 4  # after which the Hub counts as unreachable

Loaded = TypeVar("Loaded")

UNREACHABLE = (
    "the Hub cannot be reached, and the cache has no complete copy. Check the network, HF_HUB_OFFLINE and HF_ENDPOINT."
)
HUB_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (GatedRepoError, "access is restricted. Accept the terms on its page and log in with `hf auth login`."),
    (RepositoryNotFoundError, "the repository does not exist, or is private. Check its name, or `hf auth login`."),
    (
        LocalEntryNotFoundError,
        UNREACHABLE,
    ),
    (EntryNotFoundError, "the repository has no such file."),
)


def hub_repo(source: str | Path) -> str | None:
    """Returns the repository in `org/repo:file`, or None for a local file."""
    match = re.fullmatch(rf"({REPO_ID}):(.+)", str(source))
    return match[1] if match and not Path(source).exists() else None


def hub_reason(error: BaseException) -> str:
    """Explains an error of the Hub and what to do about it, in text that ends with a full stop."""
    for kind, reason in HUB_REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return "you are not logged in. Log in with `hf auth login`."
    return f"{' '.join(str(error).split()).removesuffix('.')}."


def hub_answers() -> bool:
    """Whether the Hub answers within `ANSWER_SECONDS`, without a retry."""
    answered = Event()

    def ask() -> None:
        with suppress(HTTPError, OSError):
            response = get_session().head(constants.ENDPOINT, follow_redirects=False, timeout=ANSWER_SECONDS)
            if response.status_code < 500:
                answered.set()

    thread = Thread(target=ask, daemon=True)  # looking up a name has no timeout, and each address has its own
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answered.is_set()


def from_hub(load: Callable[..., Loaded], source: str | os.PathLike, **options: Any) -> Loaded:
    """Calls a loader of files that may be on the Hub. If the Hub does not answer, only its cache is asked.

    Args:
        load (`Callable`): Function that takes a folder or Hub id and `local_files_only`, such as `from_pretrained`.
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        **options: Further arguments of `load`.

    Raises:
        OSError: If the repository does not exist, or the Hub does not answer and the cache has no complete copy.
    """
    if Path(source).exists() or options.get("local_files_only") or hub_answers():
        return load(source, **options)
    try:
        return load(source, **(options | {"local_files_only": True}))
    except OSError as error:
        raise OSError(f"could not load `{source}`: {UNREACHABLE}") from error


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless the name is `org/name`, as the Hub allows it."""
    if not re.fullmatch(REPO_ID, repo_id):
        raise ValueError(f"`push_to_hub` must be `org/name`, got {repo_id!r}.")
    validate_repo_id(repo_id)


def create_repo(repo_id: str, private: bool | None, repo_type: str = "model") -> None:
    """Creates a repository on the Hub unless it exists.

    Raises:
        OSError: If the Hub denies it or cannot be reached.
    """
    try:
        HfApi().create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    except (HTTPError, OSError) as error:
        raise OSError(f"Could not create `{repo_id}` on the Hub: {hub_reason(error)}") from error


def push_folder(out: Path, repo_id: str, message: str, repo_type: str = "model", create_pr: bool = False) -> str:
    """Uploads a folder to an existing repository.

    Returns:
        `str`: URL of the commit or pull request.

    Raises:
        OSError: If the Hub denies it or cannot be reached.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=out, repo_type=repo_type, commit_message=message, create_pr=create_pr
        )
    except (HTTPError, OSError) as error:
        option = "" if repo_type == "model" else f" --repo-type {repo_type}"
        raise OSError(
            f"`{out}` is complete, but could not be pushed to `{repo_id}`: {hub_reason(error)} Push it with `hf "
            f"upload {repo_id} {out}{option}`."
        ) from error
    return commit.pr_url or commit.commit_url
