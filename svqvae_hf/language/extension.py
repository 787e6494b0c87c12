"""Adds image tokens to a causal language model of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from svqvae_files.outputs import check_new_folder, new_folder
from svqvae_hf.hub.model_cards import table_rows
from svqvae_hf.hub.origin import STARTED_FROM, find_origin
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.pretrained_models import SVQVAE, SVQVAEProcessor
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, PLACEHOLDER, ImageVocabulary
from svqvae_hf.models.loading import check_weights

# Before a chat template: joins the parts of a message to one text, with a placeholder for each image.
JOIN_PARTS = Path(__file__).with_name("join_parts.jinja").read_text().replace("PLACEHOLDER", PLACEHOLDER)
PLAIN_TEMPLATE = Path(__file__).with_name("plain_template.jinja").read_text()


def extend_language_model(
    source: str | Path,
    out: str | Path,
    vqvae: str | Path,
    grids: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    license: str | None = None,
) -> ImageVocabulary:
    """Adds the codes of an image tokenizer to a causal language model, and saves both in one folder.

    Every row of the embedding and of the head that belongs to a token of the text stays bit-equal.

    Args:
        source (`str` or `Path`): Causal language model of transformers with its tokenizer: folder or Hub id.
        out (`str` or `Path`): Folder to create.
        vqvae (`str` or `Path`): SVQVAE: folder or Hub id.
        grids (`Sequence[tuple[int, int]]`, *optional*): Rows and columns of codes of the images, by default of a
            square image of the size that the SVQVAE was trained on.
        seed (`int`, defaults to 0): Seed of the linear map from codes to new rows.
        license (`str`, *optional*): Licence for the card, by the Hub's identifier; by default, the only one that the
            cards of both sources state.

    Returns:
        [`ImageVocabulary`]: The image tokens.

    Raises:
        OSError: If a source cannot be read or `out` cannot be written.
        ValueError: If `out` is not empty, the model already has image tokens, an image does not fit its context, or
            the sources have different licences and `license` is missing.
    """
    out = check_new_folder(Path(out))
    origin = find_origin({STARTED_FROM: str(source), "SVQVAE": str(vqvae)}, license=license)
    image_tokenizer = SVQVAE.from_pretrained(vqvae)
    try:
        model, info = from_hub(AutoModelForCausalLM.from_pretrained, source, dtype="auto", output_loading_info=True)
        tokenizer = from_hub(AutoTokenizer.from_pretrained, source)
    except ValueError as error:
        raise ValueError(
            f"`{source}` must be a causal language model of transformers with its tokenizer, but does not load: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_weights(str(source), info)
    side = image_tokenizer.config["sample_size"] // image_tokenizer.f
    vocabulary = add_image_tokens(model, tokenizer, image_tokenizer, grids or [(side, side)], seed)
    processor = SVQVAEProcessor(tokenizer, image_tokenizer, vocabulary)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        metadata = ModelCardData(license=origin.license or "unknown", base_model=origin.base_model, tags=["svqvae"])
        text = f"---\n{metadata}\n---\n\n# {out.name}\n\nIts image tokens are untrained.\n\n| | |\n|---|---|\n"
        (folder / "README.md").write_text(f"{text}{table_rows(origin.rows.items())}\n", encoding="utf-8")
    return vocabulary


def add_image_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vqvae: SVQVAE,
    grids: Sequence[tuple[int, int]],
    seed: int = 0,
) -> ImageVocabulary:
    """Adds image tokens to a language model and its tokenizer, in place; see [`extend_language_model`]."""
    vocabulary = ImageVocabulary(
        first_token=len(tokenizer),
        codebook_size=vqvae.config["codebook_size"],
        codebook_fingerprint=vqvae.codebook_fingerprint(),
        f=vqvae.f,
        grids=grids,
    )
    rows = model.get_input_embeddings().weight.shape[0]
    longest = max(rows * columns for rows, columns in vocabulary.grids) + 3
    context = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    if getattr(model.config, CONFIG_KEY, None) is not None:
        raise ValueError("the language model must not have image tokens yet, but has some. Extend the original one.")
    if len(tokenizer) > rows:
        raise ValueError(
            f"the language model must have a row for each token of its tokenizer, but has {rows} rows for "
            f"{len(tokenizer)} tokens. Use the tokenizer that it was trained with."
        )
    if longest > context:
        raise ValueError(
            f"`grids` must fit the context, {context} tokens, but the largest takes {longest}. Pass smaller `--grids`."
        )
    tokens = [AddedToken(name, special=True, normalized=False) for name in vocabulary.names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokenizer.convert_tokens_to_ids(vocabulary.names) != [*range(vocabulary.first_token, vocabulary.stop)]:
        raise ValueError(
            "the tokenizer must take the image tokens as its last ones, but has some of them, or ids that are not "
            "contiguous. Use another language model."
        )
    tokenizer.chat_template = _with_images(tokenizer.chat_template)
    if vocabulary.stop > rows:
        model.resize_token_embeddings(vocabulary.stop, mean_resizing=False)
    _start_rows(model, vocabulary, vqvae.quantize.embedding.lookup(torch.arange(vocabulary.codebook_size)), seed)
    setattr(model.config, CONFIG_KEY, vocabulary.to_config())
    return vocabulary


def _with_images(template: str | dict[str, str] | None) -> str | dict[str, str]:
    if isinstance(template, dict):
        return {name: JOIN_PARTS + each for name, each in template.items()}
    return JOIN_PARTS + (template or PLAIN_TEMPLATE)


@torch.no_grad()
def _start_rows(model: PreTrainedModel, vocabulary: ImageVocabulary, codebook: torch.Tensor, seed: int) -> None:
    """Sets the new rows to a linear map of the codes, with the mean and the standard deviation of the old rows."""
    generator = torch.Generator().manual_seed(seed)
    codes = codebook.detach().float().cpu()
    others = torch.randn(vocabulary.stop - vocabulary.begin, codes.shape[1], generator=generator)
    codes = torch.cat([(codes - codes.mean(0)) / codes.std(), others])
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in {id(each.weight): each for each in layers}.values():  # once if they share their weights
        old = layer.weight[: vocabulary.first_token].float()
        generator = torch.Generator().manual_seed(seed + 1)  # the same map for both layers
        mapped = codes @ torch.randn(codes.shape[1], old.shape[1], generator=generator)
        new = old.mean(0).cpu() + mapped * (old.std(0).mean().cpu() / mapped.std())
        layer.weight[vocabulary.first_token : vocabulary.stop] = new.to(layer.weight)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias[vocabulary.first_token : vocabulary.stop] = bias[: vocabulary.first_token].mean()
