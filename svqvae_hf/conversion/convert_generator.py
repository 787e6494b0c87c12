"""Converts a generator of LlamaGen or FlexVAR and its tokenizer to a Hub repository that holds a pipeline."""

import mmap
from pathlib import Path

from svqvae_hf.conversion.new_repository import ConversionReport, NewRepository
from svqvae_hf.hub.repositories import hub_repo, public_name
from svqvae_hf.loaders.checkpoint_files import locate_checkpoint
from svqvae_hf.loaders.llamagen_checkpoints import EMBEDDING, read_llamagen
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint
from svqvae_hf.models.modeling_llamagen import LlamaGenForCausalLM
from svqvae_hf.models.modeling_next_scale import NextScaleTransformer
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.captions import load_text_encoder
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.pipeline_next_scale import SVQVAENextScalePipeline, default_schedule

SUMMARY = (
    "Generates images id by id: LlamaGen's language model predicts ids from {condition}, and SVQVAE decodes them."
)
CALLS = {  # settings of LlamaGen's scripts
    "classes": "class_labels=207, guidance_scale=4.0, top_k=2000",
    "captions": 'prompt="A cat on a roof.", guidance_scale=7.5, top_k=1000',
}


def convert_generator(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path,
    *,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    text_encoder: str | None = None,
    use_ema: bool = False,
    variant: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    standalone: bool = False,
) -> ConversionReport:
    """Converts a generator to a Hub repository that holds a pipeline.

    A language model of LlamaGen becomes a [`SVQVAEAutoregressivePipeline`], a transformer of FlexVAR a
    [`SVQVAENextScalePipeline`]. The pipeline is written under a temporary name, loaded again and compared.

    Args:
        source (`str` or `Path`): Checkpoint of the generator: local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create.
        tokenizer (`str` or `Path`): Tokenizer that it was trained with: checkpoint file, `org/repo:file`, model folder
            or Hub id.
        image_size (`int`, *optional*): Side in pixels of the training images, by default `sample_size` of the
            tokenizer. LlamaGen needs it unless the source tells it.
        num_attention_heads (`int`, *optional*): Number of heads. Required for sizes that LlamaGen does not define.
        text_encoder (`str`, *optional*): T5 encoder of LlamaGen's captions: folder or Hub id, such as
            `google/flan-t5-xl`. Required for a model for captions.
        use_ema (`bool`, defaults to `False`): Use the EMA weights of LlamaGen's file, if present.
        variant (`str`, *optional*): Also write half-precision weights, `fp16` or `bf16`.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`.
        push_to_hub (`str`, *optional*): Hub repository `org/name` to upload the result to. It is created as soon as
            the source is read.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        standalone (`bool`, defaults to `False`): Also write the code of the models, see [`CardMixin.push_to_hub`].

    Returns:
        [`ConversionReport`]: Sources, config and files.

    Raises:
        OSError: If a source cannot be read, `out` cannot be written, or the upload fails.
        ValueError: If the source is not such a checkpoint, the tokenizer or the text encoder does not fit, or an
            argument is wrong or missing.
    """
    repository = NewRepository(out, variant, license, push_to_hub, private, create_pr, standalone)
    if is_llamagen(source) or num_attention_heads or text_encoder or use_ema:
        return _convert_llamagen(
            repository, source, tokenizer, image_size, text_encoder, num_attention_heads, use_ema=use_ema
        )
    return _convert_flexvar(repository, source, tokenizer, image_size)


def is_llamagen(source: str | Path) -> bool:
    """Whether a checkpoint seems to hold a language model of LlamaGen, by a name of a weight in it."""
    path = locate_checkpoint(source)
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(EMBEDDING.encode()) >= 0


def _convert_flexvar(
    repository: NewRepository, source: str | Path, tokenizer: str | Path, image_size: int | None
) -> ConversionReport:
    checkpoint = read_next_scale_checkpoint(source, NextScaleTransformer)
    vqvae = _load_tokenizer(tokenizer)
    side = _latents_side(vqvae, vqvae.config["sample_size"] if image_size is None else image_size)
    schedule = [list(size) for size in default_schedule(side)]
    pipeline = SVQVAENextScalePipeline(
        vqvae, checkpoint.model(NextScaleTransformer), schedule=schedule, scale_from="latents"
    )
    return repository.write(
        pipeline,
        checkpoint,
        tokenizer,
        {"tokenizer": f"`{public_name(tokenizer)}`"},
        tags=["svqvae", "next-scale", "class-conditional"],
    )


def _convert_llamagen(
    repository: NewRepository,
    source: str | Path,
    tokenizer: str | Path,
    image_size: int | None,
    text_encoder: str | None,
    num_attention_heads: int | None,
    *,
    use_ema: bool,
) -> ConversionReport:
    vqvae = _load_tokenizer(tokenizer)
    grid_size = None if image_size is None else _latents_side(vqvae, image_size)
    checkpoint = read_llamagen(source, grid_size=grid_size, num_attention_heads=num_attention_heads, use_ema=use_ema)
    with_captions = checkpoint.config["caption_dim"] is not None
    if with_captions and text_encoder is None:
        raise ValueError(
            f"`{source}` does not tell the encoder of its captions. Pass `text_encoder`, or `--text-encoder` to "
            "`svqvae convert`: LlamaGen's released models need google/flan-t5-xl."
        )
    if text_encoder is not None and not with_captions:
        raise ValueError(f"`{source}` has classes instead of captions, and no text encoder. Leave `text_encoder` out.")
    encoder, text_tokenizer = (None, None) if text_encoder is None else load_text_encoder(text_encoder)
    pipeline = SVQVAEAutoregressivePipeline.from_llamagen(
        vqvae, LlamaGenForCausalLM.from_checkpoint(checkpoint), text_encoder=encoder, tokenizer=text_tokenizer
    )
    condition = "captions" if with_captions else "classes"
    fingerprint = pipeline.config["codebook_fingerprint"]
    rows = {
        "images": f"{pipeline.layout.height} x {pipeline.layout.width} pixels",
        "tokenizer": f"`{public_name(tokenizer)}`, sha256 of its codebook `{fingerprint}`",
        **({} if text_encoder is None else {"text encoder": f"`{public_name(text_encoder)}`"}),
    }
    return repository.write(
        pipeline,
        checkpoint,
        tokenizer,
        rows,
        summary=SUMMARY.format(condition=condition),
        call=CALLS[condition],
        tags=["svqvae", "llamagen", "autoregressive"],
    )


def _latents_side(vqvae: SVQVAE, image_size: int) -> int:
    """Rows and columns of ids of square images, by their side in pixels.

    Raises:
        ValueError: The side is not a positive multiple of f.
    """
    if image_size < 1 or image_size % vqvae.f:
        raise ValueError(
            f"`image_size` must be a positive multiple of f = {vqvae.f} of the tokenizer, got {image_size}."
        )
    return image_size // vqvae.f


def _load_tokenizer(source: str | Path) -> SVQVAE:
    """Loads a tokenizer from an original checkpoint, a folder or the Hub, in float32 and evaluation mode."""
    if Path(source).is_file() or hub_repo(source) is not None:
        return SVQVAE.from_single_file(source)
    vqvae = SVQVAE.from_pretrained(source).eval()
    vqvae.register_to_config(_name_or_path=public_name(source))
    return vqvae
