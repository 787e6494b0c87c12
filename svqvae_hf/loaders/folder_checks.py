"""Checks of the files in the folder of a language model or an SVQVAE, before transformers or diffusers reads them."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from svqvae_files.json_files import read_json_object
from svqvae_files.safetensors_header import read_header

JSON_FILES = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WEIGHT_FILES = ("adapter_model.safetensors", "diffusion_pytorch_model*.safetensors", "model*.safetensors")


def check_files(folder: str | os.PathLike) -> None:
    """Raises unless the configs in a folder are JSON objects, and its weights are whole.

    Files need not exist. Nothing is checked of a Hub id, because the Hub's client checks what it downloads.

    Args:
        folder (`str` or `os.PathLike`): Folder of a language model, a processor, an adapter or an SVQVAE.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged.
    """
    for name in JSON_FILES:
        path = Path(folder, name)
        if path.is_file():
            read_json_object(path)
    for pattern in WEIGHT_FILES:
        for path in sorted(Path(folder).glob(pattern)):
            with path.open("rb") as file:
                read_header(file, path)


def check_vocabulary_file(source: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless a folder has a file of its tokenizer's words, without which transformers loads an empty tokenizer.

    Args:
        source (`str` or `os.PathLike`): Folder of the tokenizer. A Hub id is not checked.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that was loaded from it.

    Raises:
        ValueError: The file is missing.
    """
    names = list(tokenizer.vocab_files_names.values())  # empty for tokenizers of bytes
    is_folder = Path(source).is_dir()
    has_file = any(Path(source, name).is_file() for name in names)
    if is_folder and names and not has_file:
        listed = ", ".join(names)
        raise ValueError(f"`{source}` must hold the words of its tokenizer, but has no {listed}. Restore the file.")
