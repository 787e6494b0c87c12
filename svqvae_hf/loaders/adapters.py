"""LoRA adapters of language models, and the base model that they were made for."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from svqvae_files.identity import model_file_digest, value_digest, weights_digest
from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import write_file
from svqvae_hf.loaders.folder_checks import check_files
from svqvae_hf.loaders.saved_parts import find_part

BASE_FILE = "adapter_base.json"  # peft warns of keys in its own config that it does not know
DIGEST_KEY = "base_digest"  # in that file
WEIGHTS_KEY = "weights_digest"  # in that file
WEIGHTS = "adapter_model.safetensors"
BASE_PATTERNS = ("config.json", "model*.safetensors")


def record_base(folder: Path, base: str, subfolder: str = "") -> None:
    """Records the digests of the base model and of the adapter's weights in the folder of the adapter.

    Args:
        folder (`Path`): Folder of the adapter, with its weights.
        base (`str`): Folder or Hub id of the base.
        subfolder (`str`, defaults to `""`): Folder of the language model in the base.
    """
    content = {DIGEST_KEY: base_digest(base, subfolder), WEIGHTS_KEY: weights_digest(folder / WEIGHTS)}
    write_file(folder / BASE_FILE, json.dumps(content, indent=2).encode())


def base_digest(base: str | os.PathLike, subfolder: str = "") -> str:
    """Digest of the config and the weights of a language model in a folder or on the Hub."""
    root = Path(base)
    if not root.is_dir():
        patterns = [os.path.join(subfolder, pattern) for pattern in BASE_PATTERNS]
        root = Path(snapshot_download(os.fspath(base), allow_patterns=patterns))
    folder = root / subfolder
    digests = {}  # by the names of the files
    for pattern in BASE_PATTERNS:
        for path in sorted(folder.glob(pattern)):
            digests[path.name] = model_file_digest(path)
    return value_digest(digests)


def load_adapter(language_model: Any, adapter: str | os.PathLike, base: str | os.PathLike, subfolder: str = "") -> Any:
    """Adds an adapter to a language model, strictly.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Language model, which is changed.
        adapter (`str` or `os.PathLike`): Folder or Hub id of the adapter.
        base (`str` or `os.PathLike`): Folder or Hub id that the language model was loaded from.
        subfolder (`str`, defaults to `""`): Folder of the language model in the base.

    Returns:
        [`~peft.PeftModel`]: The model with its adapter.

    Raises:
        OSError: The adapter does not exist or cannot be read.
        ValueError: A file is damaged, the adapter lacks tensors, its weights differ from the recorded ones, or it was
            made for another base.
    """
    from peft import PeftModel, get_peft_model_state_dict  # installed only with an extra

    check_files(adapter)
    weights_path = find_part(adapter, subfolder="", name=WEIGHTS, options={})
    if weights_path is None:
        raise ValueError(f"`{adapter}` must hold `{WEIGHTS}`, but does not. Restore the file.")
    base_file = find_part(adapter, subfolder="", name=BASE_FILE, options={})
    if base_file is not None:
        record = read_json_object(base_file)
        _check_base(record, adapter, base, subfolder)
        _check_weights(record, weights_path)
    model_with_adapter = PeftModel.from_pretrained(language_model, adapter)
    expected_names = get_peft_model_state_dict(model_with_adapter, save_embedding_layers=False).keys()
    with safe_open(weights_path, "pt") as weights:
        missing_names = sorted(expected_names - set(weights.keys()))
    if missing_names:
        raise ValueError(
            f"`{weights_path}` must hold all tensors of the adapter, but lacks {len(missing_names)} of "
            f"{len(expected_names)}: {missing_names[0]}, ... Restore the file."
        )
    return model_with_adapter


def merge_adapter(model_with_adapter: Any) -> Any:
    """Merges an adapter into its language model, which then has the logits of both.

    Args:
        model_with_adapter ([`~peft.PeftModel`]): From [`load_adapter`] or `PeftModel.from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`]: The language model. If an adapter of the embedding or the head has changed
        a weight that both shared, each has its own weight now.
    """
    _untie_adapted_head(model_with_adapter.get_base_model())
    return model_with_adapter.merge_and_unload()


def _untie_adapted_head(language_model: Any) -> None:
    """Copies the weight that the head shares with the embedding, if an adapter changes one of the two.

    The adapter of the embedding does not change the head, and the one of the head does not change the embedding. Both
    would be merged into a shared weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # installed only with an extra

    embedding = language_model.get_input_embeddings()
    head = language_model.get_output_embeddings()
    is_adapted = isinstance(embedding, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    is_tied = language_model.config.tie_word_embeddings
    if not is_adapted or not is_tied:
        return
    weights_of_embedding = list(embedding.parameters())
    for module in head.modules():  # the layer of the adapter, and the layer inside it
        parameters = dict(module.named_parameters(recurse=False))
        if "weight" not in parameters:
            continue
        weight = parameters["weight"]
        if any(weight is weight_of_embedding for weight_of_embedding in weights_of_embedding):
            module.weight = nn.Parameter(weight.detach().clone())
    language_model.config.tie_word_embeddings = False


def _check_base(record: dict[str, Any], adapter: str | os.PathLike, base: str | os.PathLike, subfolder: str) -> None:
    """Raises ValueError unless the record of an adapter has the digest of this base."""
    if record.get(DIGEST_KEY) != base_digest(base, subfolder):
        raise ValueError(
            f"`{adapter}` must be an adapter of `{base}`, but was made for another model or other weights of it. "
            "Pass the model that it was trained on."
        )


def _check_weights(record: dict[str, Any], weights_path: Path) -> None:
    """Raises ValueError unless the record of an adapter has the digest of these weights."""
    if record.get(WEIGHTS_KEY) != weights_digest(weights_path):
        raise ValueError(
            f"`{weights_path}` must hold the weights that {BASE_FILE} records, but holds others. Restore the "
            f"file, or delete {BASE_FILE} if you replaced the weights yourself."
        )
