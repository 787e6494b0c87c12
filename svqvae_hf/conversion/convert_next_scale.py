"""Converts an original next-scale transformer and its tokenizer to a Hub repository that holds a pipeline."""

from pathlib import Path

from svqvae_hf.conversion.new_repository import ConversionReport, check_arguments, provenance, write_repository
from svqvae_hf.files.outputs import check_new_folder
from svqvae_hf.hub.model_cards import pipeline_card
from svqvae_hf.hub.repositories import hub_repo, public_name
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint
from svqvae_hf.models.modeling_next_scale import NextScaleTransformer
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.pipeline_next_scale import SVQVAENextScalePipeline, square_schedule


def convert_next_scale(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path,
    *,
    image_size: int | None = None,
    variant: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> ConversionReport:
    """Converts a transformer of FlexVAR to a Hub repository that holds a [`SVQVAENextScalePipeline`].

    The pipeline is written under a temporary name, loaded again and compared.

    Args:
        source (`str` or `Path`): Checkpoint of the transformer: local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create.
        tokenizer (`str` or `Path`): Tokenizer that it was trained with: checkpoint file, `org/repo:file`, model folder
            or Hub id.
        image_size (`int`, *optional*): Side in pixels of the training images, by default `sample_size` of the
            tokenizer.
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
        ValueError: If the source is not a checkpoint of such a transformer, the tokenizer has another codebook size,
            or an argument is wrong.
    """
    check_arguments(variant, push_to_hub, private, create_pr)
    out = check_new_folder(Path(out))
    checkpoint = read_next_scale_checkpoint(source, NextScaleTransformer)
    vqvae = load_tokenizer(tokenizer)
    schedule = [list(size) for size in square_schedule(vqvae, image_size)]
    pipeline = SVQVAENextScalePipeline(vqvae, checkpoint.model(), schedule=schedule, scale_from="latents")
    summary, call = pipeline.describe()
    card = pipeline_card(
        SVQVAENextScalePipeline,
        repo_id=push_to_hub or out.name,
        summary=summary,
        call=call,
        tags=["svqvae", "next-scale", "class-conditional"],
        license=license,
        base_model=hub_repo(checkpoint.source),
        provenance=provenance(checkpoint, checkpoint.format.title) | {"tokenizer": f"`{public_name(tokenizer)}`"},
    )
    return write_repository(
        pipeline,
        checkpoint,
        out,
        card,
        format="transformer",
        tokenizer=str(tokenizer),
        variant=variant,
        license=license,
        push_to_hub=push_to_hub,
        private=private,
        create_pr=create_pr,
    )


def load_tokenizer(source: str | Path) -> SVQVAE:
    """Loads a tokenizer from an original checkpoint, a folder or the Hub, in float32 and evaluation mode."""
    if Path(source).is_file() or hub_repo(source) is not None:
        return SVQVAE.from_single_file(source)
    vqvae = SVQVAE.from_pretrained(source).eval()
    vqvae.register_to_config(_name_or_path=public_name(source))
    return vqvae
