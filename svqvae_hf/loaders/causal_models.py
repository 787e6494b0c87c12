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
    with misfit_explained(source):
        model, info = from_hub(AutoModelForCausalLM.from_pretrained, source, **options)
    check_weights(os.fspath(source), info)
    return model


@contextmanager
def misfit_explained(source: str | os.PathLike) -> Iterator[None]:
    """Makes one line of the errors that transformers raises if weights do not fit a config at all."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(
            f"`{os.fspath(source)}` cannot be loaded, because its files are damaged: {reason:.300}."
        ) from error
