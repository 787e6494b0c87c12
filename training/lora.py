"""LoRA adapters of language models with image tokens."""

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from svqvae_files.json_files import read_json_object
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.loaders.adapters import record_base
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, ImageVocabulary


def add_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freezes a model, and adds LoRA to its linear layers. The rows of image tokens, if any, are trained in full."""
    # For example {"model.embed_tokens": [1000, 1001], "lm_head": [1000, 1001]}. With None, no rows are trained.
    trained_rows: dict[str, list[int]] | None = None
    has_image_tokens = CONFIG_KEY in model.config.to_dict()
    if has_image_tokens:
        vocabulary = ImageVocabulary.from_config(model.config)
        image_tokens = list(range(vocabulary.first_token, vocabulary.stop))
        trained_rows = {}
        for name in token_tables(model):
            trained_rows[name] = image_tokens
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", trainable_token_indices=trained_rows)
    return get_peft_model(model, lora)


def token_tables(model: PreTrainedModel) -> list[str]:
    """Names of the modules with a row per token: the embedding and, unless both share their weights, the head."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tables = [embedding]
    if head.weight is not embedding.weight:
        tables.append(head)
    names = []
    for name, module in model.named_modules():
        if any(module is table for table in tables):
            names.append(name)
    return names


def save_adapter(folder: Path, base: str, subfolder: str = "") -> Path:
    """Names the base model of a saved adapter without directories of this machine, and records its digest.

    Args:
        folder (`Path`): Folder of the adapter, as peft saved it.
        base (`str`): Folder or Hub id of the base model.
        subfolder (`str`, defaults to `""`): Folder of the language model in the base.

    Returns:
        `Path`: The folder.
    """
    path = folder / "adapter_config.json"
    config = read_json_object(path)
    config["base_model_name_or_path"] = public_name(base)
    path.write_text(json.dumps(config, indent=2))
    record_base(folder, base, subfolder)
    return folder
