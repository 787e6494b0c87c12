"""Causal language models of transformers, loaded strictly."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.folder_checks import check_files
from svqvae_hf.models.loading import check_weights

MAX_REASON = 300  # characters of an original message
# Errors that transformers raises for damaged files, or if the weights do not fit the config at all
DAMAGE_ERRORS = (AttributeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError, TypeError)


def load_causal_model(source: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """Loads a causal language model, whose weights must be exactly what its config asks for.

    Args:
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        **options: Options of transformers' method.

    Raises:
        OSError: If the files do not exist, or the Hub does not answer and the cache has no complete copy.
        ValueError: If a file is damaged, or weights are missing, unexpected or of another shape.
    """
    check_files(source)
    # Wrong shapes are ignored here, because `check_weights` reports all faults in one line.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with damage_explained(source):
        model, info = from_hub(AutoModelForCausalLM.from_pretrained, source, **options)
    check_weights(os.fspath(source), info)
    return model


@contextmanager
def damage_explained(source: str | os.PathLike) -> Iterator[None]:
    """Turns the errors that transformers raises for damaged files into a ValueError that names the source.

    Raises:
        ValueError: One line, with the start of the original message.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # one of the `DAMAGE_ERRORS`, because it is a RuntimeError; the files are intact
        raise
    except DAMAGE_ERRORS as error:
        message = " ".join(str(error).split())  # the message of transformers has several lines
        reason = message[:MAX_REASON]
        raise ValueError(
            f"`{os.fspath(source)}` cannot be loaded, because its files are damaged: {reason}."
        ) from error
