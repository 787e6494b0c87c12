"""Licence, base model and earlier stages that a new model or set inherits from the cards of its sources."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from huggingface_hub import RepoCard

from svqvae_files.folders import Folder
from svqvae_hf.hub.repositories import check_license, download_file, hub_repo, is_hub_id, public_name

CARD = "README.md"
STARTED_FROM = "started from"
NOT_STATED = (None, "unknown")


class Origin(NamedTuple):
    """Where a result comes from, as its card says it.

    Args:
        license (`str`, *optional*): Licence, by the Hub's identifier; `None` if neither a source nor the user states
            one.
        base_model (`str`, *optional*): Hub repository of the model that was trained further.
        rows (`dict[str, str]`): Sources with their licences, and the rows of the model that was trained further.
    """

    license: str | None
    base_model: str | None
    rows: dict[str, str]


def find_origin(
    models: Mapping[str, str | None], sets: Mapping[str, str | None] = MappingProxyType({}), license: str | None = None
) -> Origin:
    """Reads the cards of all sources. A source that is `None` is left out.

    Args:
        models (`Mapping[str, str]`): Folders, files or Hub ids of models, by the name of their row. The one in the row
            `STARTED_FROM` is trained further.
        sets (`Mapping[str, str]`): Folders, URLs or Hub ids of token or image sets, by the name of their row.
        license (`str`, *optional*): Licence that the user states. By default, the only one that the sources state.

    Raises:
        ValueError: If the Hub does not know the licence, sources state different ones and none is given, or a card is
            broken.
    """
    check_license(license)
    given = {row: source for row, source in ({**models, **sets}).items() if source is not None}
    cards = {row: read_card(source, "model" if row in models else "dataset") for row, source in given.items()}
    found = {row: _licence(card) for row, card in cards.items()}
    stated = {row: licence for row, licence in found.items() if licence not in NOT_STATED}
    if license is None and len(set(stated.values())) > 1:
        listed = ", ".join(f"`{public_name(given[row])}` {licence}" for row, licence in stated.items())
        raise ValueError(f"The sources have different licences: {listed}. Pass the result's licence as `--license`.")
    rows = {row: f"`{public_name(source)}` (licence: {stated.get(row, 'not known')})" for row, source in given.items()}
    license, base_model = license or next(iter(stated.values()), None), None
    if (source := given.get(STARTED_FROM)) is not None:
        card = cards[STARTED_FROM]
        rows |= {} if card is None else {f"before: {name}": value for name, value in _origin_rows(card).items()}
        base_model = source if is_hub_id(source) else None if card is None else card.data.get("base_model")
    return Origin(license, base_model, rows)


def read_card(source: str, kind: str = "model") -> RepoCard | None:
    """Card of a model or a set, and for a part of a model such as `vqvae/` the card of the whole.

    Args:
        source (`str`): Folder, URL or Hub id, or `org/repo:file`. Files have no card.
        kind (`str`, defaults to `"model"`): `model` or `dataset`.

    Returns:
        `RepoCard` or `None`: The card, or `None` if the source has no card or the Hub does not answer.

    Raises:
        ValueError: If the metadata of the card cannot be read.
    """
    repo = hub_repo(source) or (source if is_hub_id(source) else None)
    content = None
    if repo is not None:
        with suppress(OSError):
            content = download_file(repo, CARD, repo, repo_type=kind).read_bytes()
    elif "://" in source or Path(source).is_dir():
        content = Folder(source).read(CARD)
        above = Path(source).absolute().parent
        is_part = any((above / name).is_file() for name in ("config.json", "model_index.json"))
        if content is None and kind == "model" and is_part:
            content = Folder(above).read(CARD)
    if content is None:
        return None
    try:
        return RepoCard(content.decode(), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the card of `{source}`, {CARD}, must start with YAML, but has {error!s:.200}") from error


def _origin_rows(card: RepoCard) -> dict[str, str]:
    """Rows of the last table of a card that this package wrote."""
    if "svqvae" not in (card.data.get("tags") or []):
        return {}
    table = card.text.rpartition("| | |\n|---|---|\n")[2]
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE)
    return {name.replace(r"\|", "|"): value.replace(r"\|", "|") for name, value in rows}


def _licence(card: Any) -> str | None:
    """Licence on a card, which may list several."""
    stated = None if card is None else card.data.get("license")
    if isinstance(stated, list):
        return stated[0] if len(stated) == 1 else "other" if stated else None
    return stated
