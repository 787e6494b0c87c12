"""Licence, base model and earlier stages that a new model or set inherits from the cards of its sources."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from huggingface_hub import RepoCard

from svqvae_files.folders import Folder
from svqvae_hf.hub.repositories import check_license, download_file, hub_repo, is_hub_id, public_name

CARD = "README.md"
STARTED_FROM = "started from"


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
    sources: dict[str, str] = {}
    cards: dict[str, RepoCard | None] = {}
    for kind, sources_of_kind in {"model": models, "dataset": sets}.items():
        for row, source in sources_of_kind.items():
            if source is not None:
                sources[row] = source
                cards[row] = read_card(source, kind)
    licences = {}
    for row, card in cards.items():
        licence = _licence(card)
        if licence is not None:
            licences[row] = licence
    if license is None:
        license = _common_licence(licences, sources)
    rows = {}
    for row, source in sources.items():
        licence = licences.get(row, "not known")
        rows[row] = f"`{public_name(source)}` (licence: {licence})"
    base_model = None
    start = cards.get(STARTED_FROM)
    if start is not None:
        base_model = _base_model(start)
        for row, value in _origin_rows(start).items():
            rows[f"before: {row}"] = value
    if STARTED_FROM in sources and is_hub_id(sources[STARTED_FROM]):
        base_model = sources[STARTED_FROM]
    return Origin(license, base_model, rows)


def _common_licence(licences: Mapping[str, str], sources: Mapping[str, str]) -> str | None:
    """The only licence that sources state, by the name of their row. Raises ValueError if they state several."""
    stated = set(licences.values())
    if len(stated) > 1:
        listed = ", ".join(f"`{public_name(sources[row])}` {licence}" for row, licence in licences.items())
        raise ValueError(f"The sources have different licences: {listed}. Pass the result's licence as `--license`.")
    return stated.pop() if stated else None


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
    content = _card_content(source, kind)
    if content is None:
        return None
    try:
        card = RepoCard(content.decode(), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the card of `{source}`, {CARD}, must start with YAML, but has {error!s:.200}") from error
    return card


def _card_content(source: str, kind: str) -> bytes | None:
    """Content of the card of a source; `None` if it has none, or the Hub does not answer."""
    repo = source if is_hub_id(source) else hub_repo(source)
    if repo is not None:
        try:
            return download_file(repo, CARD, repo, repo_type=kind).read_bytes()
        except OSError:
            return None
    if "://" in source:
        return Folder(source).read(CARD)
    folder = Path(source)
    if not folder.is_dir():
        return None
    content = Folder(source).read(CARD)
    if content is not None or kind != "model":
        return content
    above = folder.absolute().parent
    if (above / "config.json").is_file() or (above / "model_index.json").is_file():
        return Folder(above).read(CARD)  # of the pipeline or language model that the model is a part of
    return None


def _origin_rows(card: RepoCard) -> dict[str, str]:
    """Rows of the last table of a card that this package wrote."""
    tags = card.data.get("tags")
    if not isinstance(tags, list) or "svqvae" not in tags:
        return {}
    _, _, table = card.text.rpartition("| | |\n|---|---|\n")
    rows = {}
    for name, value in re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE):
        rows[_without_escapes(name)] = _without_escapes(value)
    return rows


def _without_escapes(cell: str) -> str:
    return cell.replace(r"\|", "|")


def _base_model(card: RepoCard) -> str | None:
    """Base model on a card, the first if it lists several."""
    base_model = card.data.get("base_model")
    if isinstance(base_model, list) and base_model:
        base_model = base_model[0]
    return base_model if isinstance(base_model, str) else None


def _licence(card: Any) -> str | None:
    """Licence on a card, `other` if it lists several; `None` if it states none."""
    if card is None:
        return None
    stated = card.data.get("license")
    if isinstance(stated, list) and len(stated) > 1:
        return "other"
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    if stated is None or stated == "unknown":
        return None
    if not isinstance(stated, str):
        raise ValueError(f"the licence of a card must be a text, got {stated!r:.80}.")
    return stated
