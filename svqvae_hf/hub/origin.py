"""Licence, base model and earlier stages that a new model or set inherits from the cards of its sources."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml
from huggingface_hub import RepoCard

from svqvae_files.folders import Folder
from svqvae_files.inputs import is_url
from svqvae_hf.hub.model_cards import TABLE_HEADER
from svqvae_hf.hub.repositories import check_license, download_file, hub_repo, is_hub_id, public_name

CARD = "README.md"
WITHOUT_CONDITIONS = ("cc0-1.0", "pddl", "unlicense")  # licences that ask nothing of what is made from a work
STARTED_FROM = "started from"
ROW = re.compile(r"^\| (.*?) \| (.*) \|$", re.MULTILINE)  # of a table, such as "| started from | `org/name` |"
EARLIER_ROW = re.compile(r"before(?: \((\d+)\))?: (.*)")  # such as "before: steps", of an earlier model


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


@dataclass(frozen=True)
class _Source:
    """A source with the facts on its card.

    Args:
        row (`str`): Name of its row.
        location (`str`): Folder, file, URL or Hub id.
        card (`RepoCard`, *optional*): Its card.
        license (`str`, *optional*): Licence on the card; `None` if none is stated.
    """

    row: str
    location: str
    card: RepoCard | None
    license: str | None


def find_origin(
    models: Mapping[str, str | None], sets: Mapping[str, str | None] = MappingProxyType({}), license: str | None = None
) -> Origin:
    """Reads the cards of all sources. A source that is `None` is left out.

    The card of the result will have a table with a row for each source, such as:

        | started from | `org/model` (licence: apache-2.0) |
        | images       | `org/set` (licence: not known)    |

    Args:
        models (`Mapping[str, str]`): Folders, files or Hub ids of models, by the name of their row, such as
            `{"started from": "org/model"}`. The model in the row `STARTED_FROM` is trained further.
        sets (`Mapping[str, str]`): Folders, URLs or Hub ids of token or image sets, by the name of their row, such as
            `{"images": "org/set"}`.
        license (`str`, *optional*): Licence that the user states. By default, the only one that the sources state.
            Licences without conditions, such as CC0, do not count beside another one.

    Raises:
        ValueError: If the Hub does not know the licence, sources state different ones and none is given, or a card is
            broken.
    """
    check_license(license)
    sources = _read_sources(models, "model") + _read_sources(sets, "dataset")
    if license is None:
        license = _common_license(sources)
    rows = {}
    for source in sources:
        source_license = "not known" if source.license is None else source.license
        rows[source.row] = f"`{public_name(source.location)}` (licence: {source_license})"
    base_model = None
    for source in sources:
        if source.row == STARTED_FROM:
            base_model = _base_model(source)
            rows |= _earlier_rows(source)
    return Origin(license, base_model, rows)


def without_figures(rows: Mapping[str, str]) -> dict[str, str]:
    """Rows of a card without the figures of validations, which hold only for the weights that were measured."""
    kept_rows = {}
    for row, value in rows.items():
        if "validation" not in row:
            kept_rows[row] = value
    return kept_rows


def stated_license(source: str | None, kind: str = "model") -> str | None:
    """Licence on the card of a model or a set, as for [`read_card`]; `None` without a source, card or licence."""
    if source is None:
        return None
    return _license_on(read_card(source, kind))


def _read_sources(locations: Mapping[str, str | None], kind: str) -> list[_Source]:
    """Reads the cards of the sources of a kind, `model` or `dataset`, by the names of their rows."""
    sources = []
    for row, location in locations.items():
        if location is not None:
            card = read_card(location, kind)
            sources.append(_Source(row, location, card, _license_on(card)))
    return sources


def _common_license(sources: Sequence[_Source]) -> str | None:
    """The only licence with conditions that sources state, or the only one at all; `None` if none states one.

    Raises ValueError if there are several.
    """
    licenses = set()
    descriptions = []
    for source in sources:
        if source.license is not None:
            licenses.add(source.license)
            descriptions.append(f"`{public_name(source.location)}` {source.license}")
    with_conditions = licenses.difference(WITHOUT_CONDITIONS)
    if with_conditions:
        licenses = with_conditions
    if len(licenses) > 1:
        listed = ", ".join(descriptions)
        raise ValueError(f"The sources have different licences: {listed}. Pass the result's licence as `--license`.")
    if not licenses:
        return None
    return licenses.pop()


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
    repository = _repository_of(source)
    if repository is not None:
        return _card_on_hub(repository, kind)
    if is_url(source):
        return Folder(source).read(CARD)
    if Path(source).is_dir():
        return _card_in_folder(Path(source), kind)
    return None  # a local file has no card


def _repository_of(source: str) -> str | None:
    """Repository on the Hub in which a source lies, `org/name` for `org/name` and for `org/name:file`; else `None`."""
    if is_hub_id(source):
        return source
    return hub_repo(source)


def _card_in_folder(folder: Path, kind: str) -> bytes | None:
    """Content of the card in a local folder. A part of a model has no card, but the folder above it may have one."""
    content = Folder(folder).read(CARD)
    if content is None and kind == "model":
        return _card_of_parent(folder)
    return content


def _card_on_hub(repository: str, kind: str) -> bytes | None:
    """Content of the card of a repository; `None` if it has none, or the Hub does not answer."""
    try:
        path = download_file(repository, CARD, repository, repo_type=kind)
        return path.read_bytes()
    except OSError:
        return None


def _card_of_parent(folder: Path) -> bytes | None:
    """Content of the card of the pipeline or language model that a folder is a part of, such as `lm/vqvae`.

    `None` if the folder is no part of one.
    """
    parent = folder.absolute().parent
    is_part = (parent / "config.json").is_file() or (parent / "model_index.json").is_file()
    if not is_part:
        return None
    return Folder(parent).read(CARD)


def _earlier_rows(source: _Source) -> dict[str, str]:
    """Rows on the card of the model that was trained further, marked as earlier, such as `before: steps`."""
    if source.card is None:
        return {}
    rows = {}
    for row, value in _origin_rows(source.card).items():
        rows[_earlier_name(row)] = value
    return rows


def _earlier_name(row: str) -> str:
    """Name of a row on the card of the next model, such as `before (2): steps` for `before: steps`."""
    match = EARLIER_ROW.fullmatch(row)
    if match is None:
        return f"before: {row}"
    number, name = match.groups()
    if number is None:
        return f"before (2): {name}"
    return f"before ({int(number) + 1}): {name}"


def _origin_rows(card: RepoCard) -> dict[str, str]:
    """Rows of the last table of a card that this package wrote; none for cards of others."""
    tags = card.data.get("tags")
    if not isinstance(tags, list) or "svqvae" not in tags:
        return {}
    _, _, table = card.text.rpartition(TABLE_HEADER)  # what follows the last header, or the whole text without one
    rows = {}
    for name, value in ROW.findall(table):
        rows[_without_escapes(name)] = _without_escapes(value)
    return rows


def _without_escapes(cell: str) -> str:
    """Text of a cell of a Markdown table."""
    return cell.replace(r"\|", "|")


def _base_model(source: _Source) -> str | None:
    """Hub repository of the model that was trained further, or the base model on its card, the first of several."""
    if is_hub_id(source.location):
        return source.location
    if source.card is None:
        return None
    base_model = source.card.data.get("base_model")
    if isinstance(base_model, list) and base_model:
        base_model = base_model[0]
    if not isinstance(base_model, str):
        return None
    return base_model


def _license_on(card: RepoCard | None) -> str | None:
    """Licence on a card, `other` if it lists several; `None` if it states none."""
    if card is None:
        return None
    license = card.data.get("license")  # one, or a list
    if isinstance(license, list):
        if not license:
            return None
        if len(license) > 1:
            return "other"
        license = license[0]
    if license is None or license == "unknown":
        return None
    if not isinstance(license, str):
        raise ValueError(f"the licence of a card must be a text, got {license!r:.80}.")
    return license
