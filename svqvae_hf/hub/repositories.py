"""Creates repositories on the Hub, uploads folders to them, and explains the Hub's errors."""

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
    """Returns the repository in `org/repo:file`, or None for a local file."""
    match = re.fullmatch(rf"({REPO_ID}):(.+)", str(source))
    return match[1] if match and not Path(source).exists() else None


def hub_reason(error: Exception) -> str:
    """Explains an error of the Hub and what to do about it, in text that ends with a full stop."""
    for kind, reason in HUB_REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return "you are not logged in. Log in with `hf auth login`."
    return f"{' '.join(str(error).split()).removesuffix('.')}."


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
