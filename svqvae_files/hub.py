"""Models on the Hugging Face Hub: the files of a repository, and the errors of the Hub in the words of a user."""

import os
import re
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from svqvae_files.identity import MODEL_FILES

NAME_ON_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # `org/name`, or `name` of some early models
CHECK_NETWORK = "Check the network, HF_HUB_OFFLINE and HF_ENDPOINT."
HUB_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (errors.GatedRepoError, "access is restricted. Accept the terms on its page and log in with `hf auth login`."),
    (errors.RepositoryNotFoundError, "the repository does not exist or is private. Correct it, or `hf auth login`."),
    (errors.LocalEntryNotFoundError, f"the Hub cannot be reached, and no complete copy is cached. {CHECK_NETWORK}"),
    (errors.EntryNotFoundError, "the repository has no such file."),
)


def hub_reason(error: BaseException) -> str:
    """Explains an error of the Hub and what to do about it, in text that ends with a full stop.

    Libraries wrap the errors of the Hub's client, so the causes of the error are looked at as well. An error without
    an explanation is repeated in its own words.
    """
    for cause in _chain(error):
        reason = _known_reason(cause)
        if reason is not None:
            return reason
        hub_has_answered = isinstance(cause, errors.HfHubHTTPError)
        if hub_has_answered:
            break  # an error of the server has no explanation, and its causes do not explain it either
    return _one_sentence(error)


def _known_reason(error: BaseException) -> str | None:
    """Explains a single error of the Hub, without its causes. None if there is no explanation for it."""
    for kind, reason in HUB_REASONS:
        if isinstance(error, kind):
            return reason
    hub_has_answered = isinstance(error, errors.HfHubHTTPError)
    if hub_has_answered and _is_unauthorized(error):
        return "you are not logged in. Log in with `hf auth login`."
    if hub_has_answered:
        return None
    if isinstance(error, errors.HTTPError):
        return f"the Hub cannot be reached. {CHECK_NETWORK}"
    return None


def _is_unauthorized(error: BaseException) -> bool:
    """Whether an answer of the Hub asks for a login."""
    response = getattr(error, "response", None)
    return response is not None and response.status_code == 401


def _one_sentence(error: BaseException) -> str:
    """Message of an error on one line, with a full stop."""
    message = " ".join(str(error).split())
    return f"{message.removesuffix('.')}."


def _chain(error: BaseException) -> list[BaseException]:
    """An error, its cause, the cause of the cause, and so on."""
    errors_in_order: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        is_circle = any(cause is earlier for earlier in errors_in_order)
        if is_circle:
            break
        errors_in_order.append(cause)
        cause = cause.__cause__ or cause.__context__
    return errors_in_order


def check_may_be_on_hub(source: str | os.PathLike) -> None:
    """Raises OSError for a path that does not exist and is no name on the Hub, before the Hub is asked for it."""
    may_be_on_hub = NAME_ON_HUB.fullmatch(str(source)) is not None
    if not may_be_on_hub and not Path(source).exists():
        raise OSError(f"could not load `{source}`: there is no such folder. On the Hub a model is `org/name`.")


def model_folder(source: str | os.PathLike) -> Path:
    """Folder with the files of a model that [`~svqvae_files.identity.model_digest`] reads.

    Args:
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub. The files of a repository are downloaded,
            or found in the cache if the Hub does not answer.

    Raises:
        OSError: The repository does not exist, or the Hub does not answer and the cache has no complete copy.
    """
    path = Path(source)
    if path.exists():
        return path
    check_may_be_on_hub(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(MODEL_FILES)))
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise OSError(
            f"could not load the model `{source}`: there is no such folder, and {hub_reason(error)}"
        ) from error
