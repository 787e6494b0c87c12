"""The parts that were saved together with a processor: its tokenizer, chat template, generation config and vqvae.

The config of the processor holds a digest of the file of each part. Without one of them, or with another one, a
language model still draws, but from other prompts, without its guidance, or with another decoder.
"""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import errors, hf_hub_download

from svqvae_files.identity import model_file_digest
from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import write_file
from svqvae_hf.hub.repositories import lacks_file
from svqvae_hf.models.processing_svqvae import VQVAE_FOLDER

CONFIG = "processor_config.json"
PARTS_KEY = "parts"  # in the config
PARTS = (
    "chat_template.jinja",
    "generation_config.json",
    "known_objects.json",
    "tokenizer.json",
    "tokenizer_config.json",
    f"{VQVAE_FOLDER}/config.json",
    f"{VQVAE_FOLDER}/diffusion_pytorch_model.safetensors",
)


def record_parts(folder: str | os.PathLike) -> None:
    """Records the digests of the parts in a folder, after a language model and its processor were saved in it.

    Args:
        folder (`str` or `os.PathLike`): Folder of the language model and the processor.
    """
    digests = {}
    for name in PARTS:
        path = Path(folder, name)
        if path.is_file():
            digests[name] = model_file_digest(path)
    config = read_json_object(Path(folder, CONFIG))
    config[PARTS_KEY] = digests
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_file(Path(folder, CONFIG), text.encode())


def check_parts(source: str | os.PathLike, subfolder: str = "", **options: Any) -> None:
    """Raises unless the parts beside a processor are the recorded ones. Folders without a record are not checked.

    Args:
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        subfolder (`str`, defaults to `""`): Folder of the processor in it.
        **options: Options of the Hub, such as `revision`.

    Raises:
        OSError: The config does not exist or cannot be read.
        ValueError: A part is missing, damaged or of another model.
    """
    config_path = find_part(source, subfolder, CONFIG, options)
    if config_path is None:
        return  # transformers raises an error for the missing config when it loads the processor
    digests = read_json_object(config_path).get(PARTS_KEY)
    if digests is None:
        return
    for name, digest in digests.items():
        path = find_part(source, subfolder, name, options)
        if path is None:
            raise ValueError(f"`{source}` must hold `{name}`, which was saved with its processor. Restore the file.")
        if model_file_digest(path) != digest:
            raise ValueError(
                f"`{path}` must be as it was saved with the processor beside it, but differs. Restore the file, or "
                "load the parts in Python and save them together with `ImageLanguageModel.save_pretrained`."
            )


def find_part(source: str | os.PathLike, subfolder: str, name: str, options: dict[str, Any]) -> Path | None:
    """Path of a file in a folder or in the cache of the Hub; None if it does not exist."""
    if os.path.isdir(source):
        path = Path(source, subfolder, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(source), name, subfolder=subfolder or None, **options))
    except errors.EntryNotFoundError as error:
        # It is also raised for a file that is not in the cache while the Hub does not answer.
        if not lacks_file(error):
            raise
        return None
