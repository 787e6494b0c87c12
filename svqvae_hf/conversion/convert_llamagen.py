"""Converts a language model of LlamaGen and its tokenizer to a Hub repository that holds a pipeline."""

import mmap
from pathlib import Path

from svqvae_hf.conversion.convert_next_scale import load_tokenizer
from svqvae_hf.conversion.new_repository import ConversionReport, check_arguments, provenance, write_repository
from svqvae_hf.files.outputs import check_new_folder
from svqvae_hf.hub.model_cards import pipeline_card
from svqvae_hf.hub.repositories import hub_repo, public_name
from svqvae_hf.loaders.checkpoint_files import locate_checkpoint
from svqvae_hf.loaders.llamagen_checkpoints import EMBEDDING, LlamaGenCheckpoint, read_llamagen
from svqvae_hf.models.modeling_llamagen import LlamaGenForCausalLM
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.captions import load_text_encoder
from svqvae_hf.pipelines.generator_pipeline import latents_side
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline

SUMMARY = (
    "Generates images id by id: LlamaGen's language model predicts ids from {condition}, and SVQVAE decodes them."
)
CALLS = {  # settings of LlamaGen's scripts
    "classes": "class_labels=207, guidance_scale=4.0, top_k=2000",
    "captions": 'prompt="A cat on a roof.", guidance_scale=7.5, top_k=1000',
}


def convert_llamagen(
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
) -> ConversionReport:
    """Converts a language model of LlamaGen to a Hub repository that holds a [`SVQVAEAutoregressivePipeline`].

    The pipeline is written under a temporary name, loaded again and compared.

    Args:
        source (`str` or `Path`): Checkpoint of the language model: local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create.
        tokenizer (`str` or `Path`): Tokenizer that it was trained with: checkpoint file, `org/repo:file`, model folder
            or Hub id.
        image_size (`int`, *optional*): Side in pixels of the training images. Required unless the source tells it.
        num_attention_heads (`int`, *optional*): Number of heads. Required for sizes that LlamaGen does not define.
        text_encoder (`str`, *optional*): T5 encoder of the captions: folder or Hub id, such as `google/flan-t5-xl`.
            Required for a model for captions.
        use_ema (`bool`, defaults to `False`): Use the averaged weights of the source, if it has them.
        variant (`str`, *optional*): Also write half-precision weights, `fp16` or `bf16`.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`.
        push_to_hub (`str`, *optional*): Hub repository `org/name` to upload the result to. It is created as soon as
            the source is read.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.

    Returns:
        [`ConversionReport`]: Sources, config and files.

    Raises:
        OSError: If a source cannot be read, `out` cannot be written, or the upload fails.
        ValueError: If the source is not such a checkpoint, the tokenizer or the text encoder does not fit, or an
            argument is wrong or missing.
    """
    check_arguments(variant, push_to_hub, private, create_pr)
    out = check_new_folder(Path(out))
    vqvae = load_tokenizer(tokenizer)
    checkpoint = read_llamagen(
        source,
        grid_size=None if image_size is None else latents_side(vqvae, image_size),
        num_attention_heads=num_attention_heads,
        use_ema=use_ema,
    )
    pipeline = _make_pipeline(checkpoint, vqvae, text_encoder)
    return write_repository(
        pipeline,
        checkpoint,
        out,
        _card(checkpoint, pipeline, tokenizer, text_encoder, push_to_hub or out.name, license),
        format="transformer",
        tokenizer=str(tokenizer),
        variant=variant,
        license=license,
        push_to_hub=push_to_hub,
        private=private,
        create_pr=create_pr,
    )


def is_llamagen(source: str | Path) -> bool:
    """Whether a checkpoint seems to hold a language model of LlamaGen, by a name of a weight in it."""
    path = locate_checkpoint(source)
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(EMBEDDING.encode()) >= 0


def _make_pipeline(
    checkpoint: LlamaGenCheckpoint, vqvae: SVQVAE, text_encoder: str | None
) -> SVQVAEAutoregressivePipeline:
    with_captions = checkpoint.config["caption_dim"] is not None
    if with_captions != (text_encoder is not None):
        raise ValueError(
            f"`{checkpoint.source}` does not tell the encoder of its captions. Pass `text_encoder`, or "
            "`--text-encoder` to `svqvae convert`: LlamaGen's released models need google/flan-t5-xl."
            if with_captions
            else f"`{checkpoint.source}` has classes instead of captions, and no text encoder. Leave `text_encoder` "
            "out."
        )
    encoder, tokenizer = (None, None) if text_encoder is None else load_text_encoder(text_encoder)
    return SVQVAEAutoregressivePipeline.from_llamagen(
        vqvae, LlamaGenForCausalLM.from_checkpoint(checkpoint), text_encoder=encoder, tokenizer=tokenizer
    )


def _card(
    checkpoint: LlamaGenCheckpoint,
    pipeline: SVQVAEAutoregressivePipeline,
    tokenizer: str | Path,
    text_encoder: str | None,
    repo_id: str,
    license: str | None,
) -> str:
    condition = "classes" if text_encoder is None else "captions"
    rows = provenance(checkpoint, "LlamaGen's language model") | {
        "images": f"{pipeline.layout.height} x {pipeline.layout.width} pixels",
        "tokenizer": f"`{public_name(tokenizer)}`, sha256 of its codebook `{pipeline.config['codebook_fingerprint']}`",
    }
    if text_encoder is not None:
        rows["text encoder"] = f"`{public_name(text_encoder)}`"
    return pipeline_card(
        SVQVAEAutoregressivePipeline,
        repo_id=repo_id,
        summary=SUMMARY.format(condition=condition),
        call=CALLS[condition],
        tags=["svqvae", "llamagen", "autoregressive"],
        license=license,
        base_model=hub_repo(checkpoint.source),
        pipeline_tag=pipeline.task,
        provenance=rows,
    )
