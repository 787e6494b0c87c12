"""Converts original checkpoints of tokenizers and generators to Hub repositories: cards, configs and safetensors."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svqvae_files.outputs import check_new_folder
from svqvae_hf.conversion.new_repository import VARIANTS, write_repository
from svqvae_hf.hub.origin import find_origin
from svqvae_hf.hub.repositories import check_repo_id, hub_repo, public_name
from svqvae_hf.loaders.checkpoint_files import Checkpoint, locate_checkpoint
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.loaders.llamagen_checkpoints import CODES_IN_FILE, read_llamagen
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint
from svqvae_hf.loaders.pretrained_models import SVQVAE, LlamaGenForCausalLM, NextScaleTransformer
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.pipeline_next_scale import SVQVAENextScalePipeline, default_schedule
from svqvae_hf.pipelines.text_encoders import load_text_encoder


def convert(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    *,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    text_encoder: str | None = None,
    use_ema: bool = False,
    variant: str | None = None,
    license: str | None = None,
    standalone: bool = False,
    repo_id: str | None = None,
    **config: Any,
) -> str:
    """Converts an original checkpoint to a Hub repository, which `hf upload` uploads.

    A tokenizer becomes an [`SVQVAE`]. With `tokenizer`, the source is a generator: a language model of LlamaGen
    becomes a [`SVQVAEAutoregressivePipeline`], and a transformer of FlexVAR a [`SVQVAENextScalePipeline`].

    The repository is written to a temporary folder beside `out` and loaded again. It is renamed to `out` once its
    tensors and its config equal the source. A process that is killed before that leaves the temporary folder,
    `.{out}-*`.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create. It may exist if it is empty.
        tokenizer (`str` or `Path`, *optional*): Tokenizer that a generator was trained with: checkpoint file,
            `org/repo:file`, model folder or Hub id.
        image_size (`int`, *optional*): Side in pixels of the training images of a generator, by default `sample_size`
            of the tokenizer. Required for LlamaGen unless the source states it.
        num_attention_heads (`int`, *optional*): Number of heads of LlamaGen's model. Required for sizes that LlamaGen
            does not define.
        text_encoder (`str`, *optional*): T5 encoder of LlamaGen's captions: folder or Hub id, such as
            `google/flan-t5-xl`. Required for a model for captions.
        use_ema (`bool`, defaults to `False`): Use the EMA weights, which LlamaGen's files may have.
        variant (`str`, *optional*): `fp16` or `bf16`, to write the weights in half precision as well. The codebook
            stays in float32, so that ids keep their meaning.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default, as on the cards of
            the source's repository, the tokenizer and the text encoder, if they have one.
        standalone (`bool`, defaults to `False`): Also write the code of the models.
        repo_id (`str`, *optional*): `org/name` that the repository will have on the Hub, which its card and the code
            of a pipeline name. By default they name the folder.
        **config: Config values of a tokenizer that replace the values read from the file, such as `network_range`.

    Returns:
        `str`: Source, config and files, for a terminal.

    Raises:
        OSError: If a source cannot be read, or `out` cannot be written.
        ValueError: If the source is not a whole checkpoint of a known format, the tokenizer or the text encoder does
            not fit, or an argument is wrong or missing.
    """
    folder = check_new_folder(Path(out))
    if variant not in (None, *VARIANTS):
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    license = _find_license(source, tokenizer, text_encoder, license)
    if repo_id is not None:
        check_repo_id(repo_id, "repo_id")
    has_generator_options = bool(image_size or num_attention_heads or text_encoder)
    if tokenizer is None and has_generator_options:
        raise ValueError("`image_size`, `num_attention_heads` and `text_encoder` need `tokenizer`. Omit them.")
    has_llamagen_options = bool(num_attention_heads or text_encoder or use_ema)
    if tokenizer is None:
        converted = _convert_tokenizer(source, variant, use_ema=use_ema, **config)
    elif is_llamagen(source) or has_llamagen_options:
        converted = _convert_llamagen(
            source, tokenizer, image_size, num_attention_heads, text_encoder, use_ema=use_ema, **config
        )
    else:
        converted = _convert_next_scale(source, tokenizer, image_size, **config)
    return write_repository(
        converted.model,
        converted.checkpoint,
        folder,
        variant=variant,
        license=license,
        standalone=standalone,
        repo_id=repo_id,
        **converted.card,
    )


def _find_license(
    source: str | Path, tokenizer: str | Path | None, text_encoder: str | None, license: str | None
) -> str | None:
    """Licence of a converted model: the one that the user states, or the one on the cards of its sources.

    Raises:
        ValueError: The Hub does not know the licence, or the cards state different ones.
    """
    sources = {
        "source": hub_repo(source),  # None for a local file, which has no card
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "text encoder": text_encoder,
    }
    return find_origin(sources, license=license).license


@dataclass(frozen=True)
class Converted:
    """Result of a conversion, before it is saved.

    Args:
        model ([`SVQVAE`] or pipeline): The converted model.
        checkpoint ([`Checkpoint`]): Its source.
        card (`dict[str, Any]`): Arguments of its card, such as `provenance`, the rows about the sources.
    """

    model: Any
    checkpoint: Checkpoint
    card: dict[str, Any]


def _convert_tokenizer(source: str | Path, variant: str | None, *, use_ema: bool, **config: Any) -> Converted:
    """Reads the checkpoint of a tokenizer."""
    checkpoint = read_checkpoint(source, SVQVAE, use_ema=use_ema, **config)
    variants = None
    if variant is not None:
        variants = {variant: VARIANTS[variant]}
    return Converted(checkpoint.model(SVQVAE), checkpoint, {"variants": variants})


def _convert_llamagen(
    source: str | Path,
    tokenizer: str | Path,
    image_size: int | None,
    num_attention_heads: int | None,
    text_encoder: str | None,
    *,
    use_ema: bool,
    **tokenizer_config: Any,
) -> Converted:
    """Reads the checkpoint of a language model of LlamaGen, and makes its pipeline."""
    vqvae = _load_tokenizer(tokenizer, **tokenizer_config)
    grid_size = None  # by default as the checkpoint states it
    if image_size is not None:
        grid_size = _latents_side(vqvae, image_size)
    checkpoint = read_llamagen(source, grid_size, num_attention_heads=num_attention_heads, use_ema=use_ema)
    text_components = _load_text_components(checkpoint, text_encoder)
    language_model = LlamaGenForCausalLM.from_checkpoint(checkpoint)
    language_model.config.codebook_fingerprint = vqvae.codebook_fingerprint()
    pipeline = SVQVAEAutoregressivePipeline(vqvae, language_model, **text_components)
    provenance = _provenance_of_llamagen(pipeline, tokenizer, text_encoder)
    card = {"provenance": provenance, "tags": ["svqvae", "llamagen", "autoregressive"]}
    return Converted(pipeline, checkpoint, card)


def _provenance_of_llamagen(
    pipeline: SVQVAEAutoregressivePipeline, tokenizer: str | Path, text_encoder: str | None
) -> dict[str, str]:
    """Rows of the card about what a model of LlamaGen was trained with."""
    language_model_config = pipeline.language_model.config
    side = language_model_config.grid_size * pipeline.vqvae.f  # in pixels
    fingerprint = language_model_config.codebook_fingerprint
    provenance = {
        "images": f"{side} x {side} pixels",
        "tokenizer": f"`{public_name(tokenizer)}`, sha256 of its codebook `{fingerprint}`",
    }
    if text_encoder is not None:  # only a model for captions has one
        provenance["text encoder"] = f"`{public_name(text_encoder)}`"
    return provenance


def _convert_next_scale(
    source: str | Path, tokenizer: str | Path, image_size: int | None, **tokenizer_config: Any
) -> Converted:
    """Reads the checkpoint of a transformer of FlexVAR, and makes its pipeline."""
    checkpoint = read_next_scale_checkpoint(source, model_class=NextScaleTransformer)
    transformer = checkpoint.model(NextScaleTransformer)
    vqvae = _load_tokenizer(tokenizer, **tokenizer_config)
    if image_size is None:
        image_size = vqvae.config["sample_size"]
    side = _latents_side(vqvae, image_size)
    schedule = [list(size) for size in default_schedule(side)]  # in ids, such as [[1, 1], [2, 2], ...]
    pipeline = SVQVAENextScalePipeline(vqvae, transformer, schedule=schedule, scale_from="latents")
    provenance = {"tokenizer": f"`{public_name(tokenizer)}`"}
    card = {"provenance": provenance, "tags": ["svqvae", "next-scale", "class-conditional"]}
    return Converted(pipeline, checkpoint, card)


def is_llamagen(source: str | Path) -> bool:
    """Whether a checkpoint seems to hold a language model of LlamaGen, judging by the name of one weight."""
    path = locate_checkpoint(source)
    is_empty = path.stat().st_size == 0
    if is_empty:  # `mmap` takes no empty file
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position = content.find(CODES_IN_FILE.encode())  # -1 if absent
    return position >= 0


def _load_text_components(checkpoint: Checkpoint, text_encoder: str | None) -> dict[str, Any]:
    """Components of the pipeline for captions: the text encoder and its tokenizer; none for a model with classes.

    Raises:
        ValueError: A model for captions has no text encoder, or a model with classes has one.
    """
    source = checkpoint.source
    has_captions = checkpoint.config["caption_dim"] is not None
    if has_captions and text_encoder is None:
        raise ValueError(
            f"`{source}` does not name the encoder of its captions. Pass `text_encoder`, or `--text-encoder` to "
            "`svqvae convert`: LlamaGen's released models need google/flan-t5-xl."
        )
    if text_encoder is None:
        return {}
    if not has_captions:
        raise ValueError(f"`{source}` has classes instead of captions, and no text encoder. Leave `text_encoder` out.")
    encoder, tokenizer = load_text_encoder(text_encoder)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def _latents_side(vqvae: SVQVAE, image_size: int) -> int:
    """Number of ids along each side of square images, given their side in pixels.

    Raises:
        ValueError: The side is not a positive multiple of f.
    """
    if image_size < 1 or image_size % vqvae.f:
        raise ValueError(f"`image_size` must be a positive multiple of f = {vqvae.f}, got {image_size}.")
    return image_size // vqvae.f


def _load_tokenizer(source: str | Path, **config: Any) -> SVQVAE:
    """Loads a tokenizer from an original checkpoint, a folder or the Hub, in float32 and evaluation mode."""
    if Path(source).is_file() or hub_repo(source) is not None:
        return SVQVAE.from_single_file(source, **config)
    vqvae = SVQVAE.from_pretrained(source, **config).eval()
    vqvae.register_to_config(_name_or_path=public_name(source))
    return vqvae
