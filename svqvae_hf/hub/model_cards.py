"""Writes the cards of repositories with an SVQVAE or a pipeline that holds one."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from svqvae_hf.hub.standalone import VERSION, code_hash, pipeline_files

TAGS = ["svqvae", "image-tokenizer", "vq-vae", "vector-quantization", "multi-scale"]

TEMPLATE = """---
{metadata}
---

# {name}

{summary}

## Use

{use}

## Origin

{provenance}
## Licence

{licence}
"""

SUMMARY = """SVQVAE is an image tokenizer. It encodes images of any size as ids of one codebook, at one or more scales,
and decodes them to images.

{table}"""

USE = """With the package `svqvae-hf`:

```python
import torch

from svqvae_hf import SVQVAE, SVQVAEImageProcessor

vqvae = SVQVAE.from_pretrained({repo_id})
processor = SVQVAEImageProcessor.from_pretrained({repo_id})

batch = processor("photo.jpg")
with torch.inference_mode():
    ids = vqvae.encode_tokens(batch["pixel_values"])  # (1, h, w), one id per {f} x {f} pixels
    decoded = vqvae.decode_tokens(ids)
images = processor.postprocess(decoded, batch["image_sizes"])
images[0].save("reconstruction.png")
```"""

USE_PIPELINE = """The pipeline needs the package `svqvae-hf`. diffusers loads a pipeline that holds an SVQVAE only
after `import svqvae_hf`.

```python
import svqvae_hf
from {module} import {pipeline}

pipeline = {pipeline}.from_pretrained({repo_id})
image = pipeline({call}).images[0]
```"""

STANDALONE = """

Without that package:

```python
{example}
```

`trust_remote_code=True` runs the code in this repository on your machine. It was made from the source of svqvae-hf
{version}. With that version installed, `python -m svqvae_hf.hub.standalone FILE | sha256sum` prints these hashes.
Compare them with `sha256sum FILE` in this repository:

| file | SHA-256 |
|---|---|
{hashes}"""

STANDALONE_MODEL = """from diffusers import AutoModel
from transformers import AutoImageProcessor

vqvae = AutoModel.from_pretrained({repo_id}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({repo_id}, trust_remote_code=True)"""

STANDALONE_PIPELINE = """from diffusers import ModularPipeline

pipeline = ModularPipeline.from_pretrained({repo_id}, trust_remote_code=True)
pipeline.load_components(trust_remote_code=True)
print(pipeline.doc)  # its arguments"""

MODEL_FILES = ("modeling_svqvae.py", "image_processing_svqvae.py")

NO_LICENCE = "Not stated: ask the authors of the weights before you use or share them."

HALF_PRECISION = """

Half-precision weights: {calls}. The codebook stays in float32, so that ids keep their meaning."""


def model_card(
    config: Mapping[str, Any],
    *,
    repo_id: str,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    variants: Mapping[str, Any] | None = None,
    eval_results: Sequence[EvalResult] = (),
    standalone: bool = False,
) -> str:
    """Writes the card of a repository that holds an SVQVAE.

    Args:
        config (`Mapping[str, Any]`): Config of the model.
        repo_id (`str`): Repository or folder that the card's example loads.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier, such as `apache-2.0`; by default
            `unknown`.
        base_model (`str`, *optional*): Hub repository that the weights come from.
        datasets (`Sequence[str]`, *optional*): Hub data sets that the model was trained on.
        provenance (`Mapping[str, str]`, *optional*): Origin of the weights, as rows of a table.
        variants (`Mapping[str, torch.dtype]`, *optional*): Names and dtypes of additional half-precision weights,
            such as `{"fp16": torch.float16}`.
        eval_results (`Sequence[EvalResult]`, *optional*): Metrics for the card's metadata, such as the results of
            [`~svqvae_hf.evaluation.report.eval_results`].
        standalone (`bool`, defaults to `False`): Whether the repository holds its code.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    quoted, f = quote(repo_id), 2 ** (len(config["encoder_ch_mult"]) - 1)
    levels = ", ".join(str(tuple(config[f"{network}_ch_mult"])) for network in ("encoder", "decoder"))
    normalised = ", L2-normalised" if config["codebook_l2_norm"] else ""
    rows = {
        "f (pixels per id, along each side)": f,
        "codebook": f"{config['codebook_size']} x {config['codebook_embed_dim']}{normalised}",
        "pixel range of inputs and outputs": list(config["pixel_range"]),
        "pixel range of the training images": list(config["network_range"]),
        "encoder, decoder": f"{config['base_channels']} channels times {levels}",
    }
    calls = " or ".join(
        f'`SVQVAE.from_pretrained({quoted}, variant="{variant}", torch_dtype={dtype})`'
        for variant, dtype in (variants or {}).items()
    )
    return _card(
        repo_id,
        license,
        provenance or {},
        summary=SUMMARY.format(table=f"| | |\n|---|---|\n{table_rows(rows.items())}".rstrip()),
        use=USE.format(repo_id=quoted, f=f)
        + (HALF_PRECISION.format(calls=calls) if calls else "")
        + (standalone_text(STANDALONE_MODEL.format(repo_id=quoted), *MODEL_FILES) if standalone else ""),
        pipeline_tag="image-to-image",
        tags=TAGS,
        base_model=base_model,
        datasets=list(datasets) or None,
        model_name=one_line(repo_id.rpartition("/")[2]) if eval_results else None,
        eval_results=list(eval_results) or None,
    )


def pipeline_card(
    pipeline: type,
    *,
    repo_id: str,
    summary: str,
    call: str,
    tags: Sequence[str],
    provenance: Mapping[str, str],
    license: str | None = None,
    base_model: str | None = None,
    pipeline_tag: str = "unconditional-image-generation",
    standalone: bool = False,
) -> str:
    """Writes the card of a repository that holds a pipeline with an SVQVAE.

    Args:
        pipeline (`type`): Class of the pipeline.
        repo_id (`str`): Repository or folder that the card's example loads.
        summary (`str`): A sentence about the pipeline.
        call (`str`): Arguments of the pipeline's call in the example.
        tags (`Sequence[str]`): Tags of the Hub.
        provenance (`Mapping[str, str]`): Origin of the weights, as rows of a table.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`.
        base_model (`str`, *optional*): Hub repository that the weights come from.
        pipeline_tag (`str`, defaults to `"unconditional-image-generation"`): Task of the Hub.
        standalone (`bool`, defaults to `False`): Whether the repository holds its code.

    Returns:
        `str`: Text of `README.md`, metadata first.
    """
    files = (*pipeline_files(pipeline.__name__), "modeling_svqvae.py", "component.py")
    return _card(
        repo_id,
        license,
        provenance,
        summary=summary,
        use=USE_PIPELINE.format(
            repo_id=quote(repo_id),
            module=pipeline.__module__.partition(".")[0],
            pipeline=pipeline.__name__,
            call=call,
        )
        + (standalone_text(STANDALONE_PIPELINE.format(repo_id=quote(repo_id)), *files) if standalone else ""),
        pipeline_tag=pipeline_tag,
        tags=list(tags),
        base_model=base_model,
    )


def _card(
    repo_id: str, license: str | None, provenance: Mapping[str, str], *, summary: str, use: str, **metadata: Any
) -> str:
    rows = f"| | |\n|---|---|\n{table_rows(provenance.items())}" if provenance else "Not stated.\n"
    return TEMPLATE.format(
        metadata=ModelCardData(license=license or "unknown", library_name="diffusers", **metadata).to_yaml(),
        name=one_line(repo_id.rpartition("/")[2]),
        summary=summary,
        use=use,
        provenance=rows,
        licence=one_line(license or NO_LICENCE),
    )


def standalone_text(example: str, *files: str) -> str:
    """Text about the code in a repository: how to load with it, and how to check it."""
    hashes = table_rows((f"`{file}`", f"`{code_hash(file)}`") for file in files)
    return STANDALONE.format(example=example, version=VERSION, hashes=hashes.rstrip())


def one_line(text: object) -> str:
    """Replaces each run of white space, line breaks included, by one space."""
    return " ".join(str(text).split())


def quote(text: str) -> str:
    """Quotes a string as both Python and JSON do."""
    return json.dumps(text, ensure_ascii=False)


def table_rows(rows: Iterable[tuple[object, object]]) -> str:
    """Formats rows of a Markdown table with two columns."""
    lines = ((one_line(cell).replace("|", r"\|") for cell in row) for row in rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
