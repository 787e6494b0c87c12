"""Writes the cards of token sets."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from svqvae_hf.data.repositories import is_hub_set
from svqvae_hf.hub.model_cards import one_line, quote, table_rows
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.token_sets.settings import TokenSettings

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["svqvae", "image-tokens"]
NO_LICENCE = "Not stated: ask the authors of the images before you use or share it."
COLUMNS = {
    "tokens": "ids of all scales, compressed, as the content of a token file",
    "height": "height of the crop in pixels",
    "width": "width of the crop in pixels",
    "key": "key of the image in its set: path of its file, or part and row",
    "crop": "name of the crop",
}


def public_names(data: Sequence[str], model: str) -> dict[str, Any]:
    """Names of a model and an image set for the settings and the card, without paths of this machine.

    Args:
        data (`Sequence[str]`): Image set, as for [`~svqvae_hf.data.image_sets.open_images`].
        model (`str`): Folder or Hub id of the model.

    Returns:
        `dict[str, Any]`: `model_name`, a Hub id or the name of the folder; and `source_set`, a Hub
        id, or `None` if the images are not a set on the Hub.
    """
    source_set = None
    if len(data) == 1 and is_hub_set(data[0]):
        source_set = data[0]
    return {"model_name": public_name(model), "source_set": source_set}


def token_set_card(
    *,
    repo_id: str,
    settings: TokenSettings,
    columns: Iterable[str],
    totals: Mapping[str, int],
    license: str | None = None,
    model_license: str | None = None,
    source_set: str | None = None,
) -> str:
    """Writes the card of a token set.

    Args:
        repo_id (`str`): Argument of `load_dataset` in the example: `org/name`, or a folder.
        settings ([`TokenSettings`]): Settings of the set.
        columns (`Iterable[str]`): Names of the columns.
        totals (`Mapping[str, int]`): Numbers of `images` and `rows`.
        license (`str`, *optional*): Licence of the images, by the Hub's identifier; by default `unknown`.
        model_license (`str`, *optional*): Licence of the tokenizer, which its card states.
        source_set (`str`, *optional*): Name of the image set on the Hub.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    card_data = DatasetCardData(license=license or "unknown", tags=TAGS)
    if source_set is not None:
        card_data.source_datasets = [source_set]
    _, _, name = repo_id.rpartition("/")
    decode_command = shlex.join(["svqvae", "decode", repo_id, "--model", settings.model, "--output", "DIR"])
    facts = _facts(settings, source_set, totals)
    if model_license is not None:
        facts["model"] = f"{settings.model} (licence: {model_license})"
    descriptions = _descriptions_of_columns(settings, columns)
    card = DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        # Values that the template inserts
        name=one_line(name),
        repo_id=quote(repo_id),
        decode_command=one_line(decode_command),
        is_compressed=settings.context_model is not None,
        facts=table_rows(facts.items()),
        columns=table_rows(descriptions.items()),
        licence_text=one_line(license or NO_LICENCE),
    )
    return f"{card}\n"


def _descriptions_of_columns(settings: TokenSettings, columns: Iterable[str]) -> dict[str, str]:
    """What each column holds, by its name in Markdown."""
    descriptions_by_name = dict(COLUMNS)
    for index, scale in enumerate(settings.scales):
        descriptions_by_name[f"ids_{index}"] = f"ids at scale {scale:g}, row by row"
    descriptions = {}
    for column in columns:
        descriptions[f"`{column}`"] = descriptions_by_name.get(column, "as in the image set")
    return descriptions


def _facts(settings: TokenSettings, source_set: str | None, totals: Mapping[str, int]) -> dict[str, Any]:
    """Rows of the table of a card."""
    scales = [f"{scale:g}" for scale in settings.scales]
    crops = settings.crops
    if settings.resolution is not None:
        crops += f", {settings.resolution} pixels"
    tiles = "none"
    if settings.tile_size is not None:
        tiles = f"{settings.tile_size} pixels, overlap {settings.overlap}"
    return {
        "images, rows": f"{totals['images']}, {totals['rows']}",
        "image set": source_set or "not on the Hub",
        "model": settings.model,
        "codebook": f"{settings.codebook_size} codes, sha256 `{settings.codebook_fingerprint}`",
        "f, pixels per side of an id": settings.f,
        "scales, output side over input side": ", ".join(scales),
        "scales made from": f"the {settings.scale_from}",
        "crops": crops,
        "tiles": tiles,
    }
