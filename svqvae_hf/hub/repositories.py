"""Repositories on the Hub: named, made and filled."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

REPO_ID = r"\w[\w.-]*/\w[\w.-]*"

HUB_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "access is restricted. Accept the terms on its page and log in with `hf auth login`."),
    (RepositoryNotFoundError, "the repository does not exist, or is private. Check its name, or `hf auth login`."),
    (LocalEntryNotFoundError, "the Hub cannot be reached, and the cache has no copy. Check the network and HF_HUB_*."),
    (EntryNotFoundError, "the repository has no such file."),
)


def hub_repo(source: str | Path) -> str | None:
    """The repository of a source on the Hub, `None` for a local file."""
    match = re.fullmatch(rf"({REPO_ID}):(.+)", str(source))
    return match[1] if match and not Path(source).exists() else None


def hub_reason(error: Exception) -> str:
    """Why the Hub did not do what it was asked for, and what to do; ends with a full stop."""
    for kind, reason in HUB_REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return "the Hub does not know you. Log in with `hf auth login`."
    return f"{' '.join(str(error).split()).removesuffix('.')}."


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository to push to."""
    if not re.fullmatch(REPO_ID, repo_id):
        raise ValueError(f"`push_to_hub` must be `org/name`, but is {repo_id!r}.")
    validate_repo_id(repo_id)


def create_repo(repo_id: str, private: bool | None, repo_type: str = "model") -> None:
    """Makes a repository on the Hub, or finds that it is there.

    Raises:
        OSError: The Hub refuses or cannot be reached.
    """
    try:
        HfApi().create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    except (HTTPError, OSError) as error:
        raise OSError(f"{repo_id} cannot be made on the Hub: {hub_reason(error)}") from error


def push_folder(out: Path, repo_id: str, message: str, repo_type: str = "model", create_pr: bool = False) -> str:
    """Uploads a whole folder to a repository that is there.

    Returns:
        `str`: Address of the commit, or of the pull request.

    Raises:
        OSError: The Hub refuses or cannot be reached.
    """
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=out, repo_type=repo_type, commit_message=message, create_pr=create_pr
        )
    except (HTTPError, OSError) as error:
        option = "" if repo_type == "model" else f" --repo-type {repo_type}"
        raise OSError(
            f"`{out}` is complete, but could not be pushed to {repo_id}: {hub_reason(error)} Push it by `hf upload "
            f"{repo_id} {out}{option}`."
        ) from error
    return commit.pr_url or commit.commit_url
