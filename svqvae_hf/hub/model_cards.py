"""Writes the cards of repositories with an SVQVAE or a pipeline that holds one."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from svqvae_files.version import __version__

TEMPLATE = Path(__file__).with_name("card.md")
LANGUAGE_TEMPLATE = Path(__file__).with_name("language_card.md")
LIBRARY_NAME = "svqvae-hf"  # for "diffusers" the Hub prints `DiffusionPipeline`, which loads no such model
TABLE_HEADER = "| | |\n|---|---|\n"  # of a Markdown table with two columns without titles
TAGS = ["svqvae", "image-tokenizer", "vq-vae", "vector-quantization", "multi-scale"]

NO_LICENCE = "Not stated: ask the authors of the weights before you use or share them."


def model_card(
    config: Mapping[str, Any], *, repo_id: str, variants: Mapping[str, Any] | None = None, **common: Any
) -> str:
    """Writes the card of a repository that holds an SVQVAE.

    Args:
        config (`Mapping[str, Any]`): Config of the model.
        repo_id (`str`): Repository or folder that the card's example loads.
        variants (`Mapping[str, torch.dtype]`, *optional*): Names and dtypes of additional half-precision weights,
            such as `{"fp16": torch.float16}`.
        **common: Further arguments of [`write_card`], such as `license`.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    num_levels = len(config["encoder_ch_mult"])
    downsampling = 2 ** (num_levels - 1)  # each level but the last halves the sides
    codebook = f"{config['codebook_size']} x {config['codebook_embed_dim']}"
    if config["codebook_l2_norm"]:
        codebook += ", L2-normalised"
    encoder_levels = tuple(config["encoder_ch_mult"])
    decoder_levels = tuple(config["decoder_ch_mult"])
    facts = {  # rows of a table of the card
        "f (pixels per id, along each side)": downsampling,
        "codebook": codebook,
        "values of pixels, in and out (`pixel_range`)": list(config["pixel_range"]),
        "values inside the model, which converts them (`network_range`)": list(config["network_range"]),
        "encoder, decoder": f"{config['base_channels']} channels times {encoder_levels}, {decoder_levels}",
    }
    calls_of_variants = []
    if variants is not None:
        for variant, dtype in variants.items():
            arguments = f'{quote(repo_id)}, variant="{variant}", torch_dtype={dtype}'
            calls_of_variants.append(f"`SVQVAE.from_pretrained({arguments})`")
    # The template of the cards, `card.md`, has placeholders of these names, such as `{{ facts }}`.
    texts = {
        "facts": table_rows(facts.items()),
        "f": downsampling,
        "variants": " or ".join(calls_of_variants),
    }
    common.setdefault("tags", TAGS)
    common.setdefault("pipeline_tag", "image-to-image")
    return write_card(repo_id, texts, **common)


def pipeline_card(pipeline: type, *, repo_id: str, summary: str, call: str, **common: Any) -> str:
    """Writes the card of a repository that holds a pipeline with an SVQVAE.

    Args:
        pipeline (`type`): Class of the pipeline.
        repo_id (`str`): Repository or folder that the card's example loads.
        summary (`str`): A sentence about the pipeline.
        call (`str`): Arguments of the pipeline's call in the example.
        **common: Further arguments of [`write_card`], such as `tags`.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    package = pipeline.__module__.partition(".")[0]
    texts = {"pipeline": pipeline.__name__, "module": package, "summary": summary, "call": call}
    return write_card(repo_id, texts, **common)


def language_card(
    repo_id: str,
    *,
    summary: str,
    standalone: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    provenance: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Writes the card of a language model with image tokens.

    Args:
        repo_id (`str`): Repository or folder that the card's examples load.
        summary (`str`): Sentences about the model.
        standalone (`bool`, defaults to `False`): Whether the repository holds its code.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`.
        base_model (`str`, *optional*): Hub repository that the weights come from.
        provenance (`Mapping[str, str]`): Origin of the weights, as rows of a table.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    return write_card(
        repo_id,
        {"summary": summary},
        template=LANGUAGE_TEMPLATE,
        library_name="transformers",
        standalone=standalone,
        tags=["svqvae"],
        pipeline_tag=None,
        license=license,
        base_model=base_model,
        provenance=provenance,
    )


def write_card(
    repo_id: str,
    texts: Mapping[str, Any],
    *,
    template: Path = TEMPLATE,
    library_name: str = LIBRARY_NAME,
    standalone: bool = False,
    tags: Sequence[str] = TAGS,
    pipeline_tag: str | None = "unconditional-image-generation",
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    provenance: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Writes a card from a template.

    Args:
        repo_id (`str`): Repository or folder that the card's example loads.
        texts (`Mapping[str, Any]`): Texts for the placeholders of the template that only this kind of card has, by the
            names of the placeholders.
        template (`Path`): File of the template, by default the one of tokenizers and pipelines.
        library_name (`str`, defaults to `"svqvae-hf"`): Library of the Hub.
        standalone (`bool`, defaults to `False`): Whether the repository holds its code.
        tags (`Sequence[str]`): Tags of the Hub.
        pipeline_tag (`str`, *optional*, defaults to `"unconditional-image-generation"`): Task of the Hub.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier, such as `apache-2.0`; by default
            `unknown`.
        base_model (`str`, *optional*): Hub repository that the weights come from.
        datasets (`Sequence[str]`): Hub data sets that the model was trained on.
        provenance (`Mapping[str, str]`): Origin of the weights, as rows of a table.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    metadata = ModelCardData(
        license=license or "unknown",
        library_name=library_name,
        pipeline_tag=pipeline_tag,
        tags=list(tags),
        base_model=base_model,
        datasets=list(datasets) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(template),
        name=one_line(repo_id.rpartition("/")[2]),
        repo_id=quote(repo_id),
        standalone=standalone,
        version=__version__,
        provenance=table_rows(provenance.items()),
        licence=one_line(license or NO_LICENCE),
        **texts,
    )
    return f"{card}\n"


def one_line(text: object) -> str:
    """Replaces each run of white space, line breaks included, by one space."""
    return " ".join(str(text).split())


def quote(text: str) -> str:
    """Quotes a string as both Python and JSON do."""
    return json.dumps(text, ensure_ascii=False)


def table_rows(rows: Iterable[tuple[object, object]]) -> str:
    """Formats rows of a Markdown table with two columns."""
    lines = []
    for name, value in rows:
        lines.append(f"| {_table_cell(name)} | {_table_cell(value)} |")
    return "\n".join(lines)


def _table_cell(value: object) -> str:
    """A value on one line, without characters that would end the cell."""
    return one_line(value).replace("|", r"\|")
