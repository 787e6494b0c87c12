"""Adds image tokens to a causal language model of transformers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from svqvae_files.outputs import check_new_folder, new_folder
from svqvae_hf.hub.model_cards import language_card
from svqvae_hf.hub.origin import STARTED_FROM, Origin, find_origin
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.causal_models import load_causal_model
from svqvae_hf.loaders.folder_checks import check_files, check_vocabulary_file
from svqvae_hf.loaders.pretrained_models import SVQVAE, SVQVAEProcessor
from svqvae_hf.loaders.saved_parts import record_parts
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, PLACEHOLDER, ImageVocabulary
from svqvae_hf.models.processing_svqvae import tokenizer_digest

# Before a chat template: joins the parts of a message to one text, with a placeholder for each image.
JOIN_PARTS = Path(__file__).with_name("join_parts.jinja").read_text().replace("PLACEHOLDER", PLACEHOLDER)
NAMED_TOKENS = 5  # in an error
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
        ValueError: If a source is damaged, `out` is not empty, the model already has image tokens, an image does not
            fit its context, or the sources have different licences and `license` is missing.
    """
    out = check_new_folder(Path(out))
    origin = find_origin({STARTED_FROM: str(source), "SVQVAE": str(vqvae)}, license=license)
    check_files(vqvae)
    image_tokenizer = SVQVAE.from_pretrained(vqvae)
    model, tokenizer = _load_language_model(source)
    if grids is None:
        side = image_tokenizer.config["sample_size"] // image_tokenizer.f
        grids = [(side, side)]
    vocabulary = add_image_tokens(model, tokenizer, image_tokenizer, grids, seed)
    processor = SVQVAEProcessor(tokenizer, image_tokenizer, vocabulary)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        record_parts(folder)
        (folder / "README.md").write_text(_card(out.name, origin), encoding="utf-8")
    return vocabulary


def _card(name: str, origin: Origin) -> str:
    """Text of the card of an extended model."""
    return language_card(
        name,
        summary="A language model with image tokens. These are untrained: `training/train_language_model.py` of\n"
        "svqvae-hf trains them. Until then, its images and captions mean nothing.",
        license=origin.license,
        base_model=origin.base_model,
        provenance=origin.rows,
    )


def _load_language_model(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model of transformers with its tokenizer, strictly."""
    check_files(source)
    try:
        model = load_causal_model(source, dtype="auto")
        tokenizer = from_hub(AutoTokenizer.from_pretrained, source)
    except ValueError as error:
        raise ValueError(
            f"`{source}` must be a causal language model of transformers with its tokenizer, but does not load: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_vocabulary_file(source, tokenizer)
    return model, tokenizer


def add_image_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vqvae: SVQVAE,
    grids: Sequence[tuple[int, int]],
    seed: int = 0,
) -> ImageVocabulary:
    """Adds image tokens to a language model and its tokenizer, in place; see [`extend_language_model`]."""
    check_extensible(model, tokenizer)
    vocabulary = ImageVocabulary(
        first_token=len(tokenizer),
        codebook_size=vqvae.config["codebook_size"],
        codebook_fingerprint=vqvae.codebook_fingerprint(),
        f=vqvae.f,
        grids=grids,
    )
    check_context(model, vocabulary)
    tokens = [AddedToken(name, special=True, normalized=False) for name in vocabulary.names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    image_tokens = list(range(vocabulary.first_token, vocabulary.stop))
    if tokenizer.convert_tokens_to_ids(vocabulary.names) != image_tokens:
        raise ValueError(
            "the tokenizer must take the image tokens as its last ones, but has some of them, or ids that are not "
            "contiguous. Use another language model."
        )
    vocabulary = replace(vocabulary, tokenizer_digest=tokenizer_digest(tokenizer))
    tokenizer.chat_template = _with_images(tokenizer.chat_template)
    if vocabulary.stop > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocabulary.stop, mean_resizing=False)
    codebook = vqvae.quantize.embedding.lookup(torch.arange(vocabulary.codebook_size))  # (codes, channels)
    _start_rows(model, vocabulary, codebook, seed)
    setattr(model.config, CONFIG_KEY, vocabulary.to_config())
    return vocabulary


def check_extensible(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises if a model already has image tokens, or fewer rows than its tokenizer has tokens."""
    if getattr(model.config, CONFIG_KEY, None) is not None:
        raise ValueError("the language model must not have image tokens yet, but has some. Extend the original one.")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        first_ids_without_row = list(range(rows, len(tokenizer)))[:NAMED_TOKENS]
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(first_ids_without_row))
        raise ValueError(
            f"the language model must have a row for each token of its tokenizer, but has {rows} rows for "
            f"{len(tokenizer)} tokens. The first without a row: {tokens}. The class of the tokenizer may have added "
            f"it. Call `resize_token_embeddings({len(tokenizer)})` of the model and save it, or use another tokenizer."
        )


def check_context(model: PreTrainedModel, vocabulary: ImageVocabulary) -> None:
    """Raises if the largest image does not fit the context of a model."""
    most_codes = max(rows * columns for rows, columns in vocabulary.grids)
    most_tokens = most_codes + 3  # begin, size and end
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and most_tokens > context:
        raise ValueError(
            f"`grids` must fit the context, {context} tokens, but the largest takes {most_tokens}. Pass smaller "
            "`--grids`."
        )


def _with_images(template: str | dict[str, str] | None) -> str | dict[str, str]:
    """A chat template, or several by their names, that takes messages with images."""
    if template is None:
        return JOIN_PARTS + PLAIN_TEMPLATE
    if isinstance(template, str):
        return JOIN_PARTS + template
    return {name: JOIN_PARTS + text for name, text in template.items()}


@torch.no_grad()
def _start_rows(model: PreTrainedModel, vocabulary: ImageVocabulary, codebook: torch.Tensor, seed: int) -> None:
    """Sets the new rows to a linear map of the codes, with the mean and the standard deviation of the old rows."""
    features = _features_of_tokens(vocabulary, codebook, seed)  # (image tokens, channels)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    have_one_weight = embedding.weight is head.weight
    if not have_one_weight:
        _start_rows_of_layer(embedding, vocabulary, features, seed)
    # The head is always set, because it may have a bias, which an embedding has not.
    _start_rows_of_layer(head, vocabulary, features, seed)


def _start_rows_of_layer(
    layer: torch.nn.Embedding | torch.nn.Linear, vocabulary: ImageVocabulary, features: torch.Tensor, seed: int
) -> None:
    """Sets the new rows of the embedding or of the head, whose weight is `(tokens, hidden)`.

    Args:
        layer (`torch.nn.Module`): The embedding or the head.
        vocabulary ([`ImageVocabulary`]): The image tokens.
        features (`torch.Tensor` of shape `(image tokens, channels)`): Vector of each image token.
        seed (`int`): Seed. Equal seeds give the embedding and the head the same linear map.
    """
    first_token = vocabulary.first_token
    old_rows = layer.weight[:first_token].float()  # (tokens of the text, hidden)
    generator = torch.Generator().manual_seed(seed + 1)
    linear_map = torch.randn(features.shape[1], old_rows.shape[1], generator=generator)  # (channels, hidden)
    mapped = features @ linear_map  # (image tokens, hidden)
    mean_of_old_rows = old_rows.mean(0).cpu()  # (hidden,)
    std_of_old_rows = old_rows.std(0).mean().cpu()  # one number, the mean over the channels
    gain = std_of_old_rows / mapped.std()
    new_rows = mean_of_old_rows + mapped * gain  # (image tokens, hidden)
    layer.weight[first_token : vocabulary.stop] = new_rows.to(layer.weight)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias[first_token : vocabulary.stop] = bias[:first_token].mean()


def _features_of_tokens(vocabulary: ImageVocabulary, codebook: torch.Tensor, seed: int) -> torch.Tensor:
    """Vectors `(image tokens, channels)` with a standard deviation of 1: codes, and random ones for other tokens."""
    codes = codebook.detach().float().cpu()  # (codes, channels)
    codes = (codes - codes.mean(0)) / codes.std()
    num_other_tokens = vocabulary.stop - vocabulary.begin  # begin, end, no condition, sizes
    generator = torch.Generator().manual_seed(seed)
    other_tokens = torch.randn(num_other_tokens, codes.shape[1], generator=generator)
    return torch.cat([codes, other_tokens])
