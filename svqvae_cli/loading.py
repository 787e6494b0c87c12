"""Loads models for the commands. Imports torch, so commands import this file inside their bodies."""

import argparse
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

import svqvae_hf
from svqvae_cli.errors import require_extra
from svqvae_cli.files import check_trained
from svqvae_files.json_files import read_json_object
from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, PIPELINES, SVQVAE
from svqvae_hf.hub.repositories import bundled_name, hub_reason
from svqvae_hf.pipelines.repository_index import read_index
from svqvae_hf.tokens.context_model import ContextModel, find_context_model
from svqvae_hf.tokens.image_tokens import is_out_of_memory

FILE_ERRORS = (
    AttributeError,
    ImportError,
    JSONDecodeError,
    KeyError,
    OSError,
    SafetensorError,
    TypeError,
    UnicodeDecodeError,
)
INDEX_PATTERN = "*model_index.json"  # of a pipeline, also of a modular one
DEVICES = ("cuda", "mps", "xpu")  # besides the CPU; the first that is available is the default


def load_model(source: str | None, device: str | None, dtype: str, **options: Any) -> SVQVAE:
    """Loads a model for inference.

    Args:
        source (`str`, *optional*): Folder or Hub id, by default the small bundled model.
        device (`str`, *optional*): Name of the device, by default a GPU if there is one.
        dtype (`str`): Precision of the weights.
        **options: Further arguments of `from_pretrained`.

    Raises:
        OSError: If the model cannot be loaded.
        ValueError: If `source` or `device` is wrong.
    """
    if source is not None and Path(source, "vqvae").is_dir():
        raise ValueError(f"a model must be a tokenizer, but `{source}` is a generator. Pass `{source}/vqvae`.")
    check_trained(source)
    return load_pretrained(SVQVAE, source or DEFAULT_MODEL, device, dtype, **options).eval()


def load_encoder(args: argparse.Namespace) -> SVQVAE:
    """Loads the model of a command that encodes. Raises if the tiles of the command line do not fit it."""
    model = load_model(args.model, args.device, args.dtype)
    model.tiles_of_call(args.tile_size, args.overlap)
    return model


def load_pretrained(cls: Any, source: str, device: str | None, dtype: str, **options: Any) -> Any:
    """Loads a model or a pipeline of class `cls`, as [`load_model`] does."""
    torch_device = find_device(device)
    with explain_loading(source):
        model = cls.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True, **options)
    if torch_device.type == "cpu":
        return model  # it is loaded to the CPU, and `to` of diffusers would import all its hooks
    return model.to(torch_device)


@functools.lru_cache(maxsize=1)
def require_context_model(model: SVQVAE, source: str | None) -> ContextModel:
    """Context model of an SVQVAE, which compresses its ids. See [`load_model`] for `source`.

    A command calls it for each file with the one model that it has loaded, so the last result is kept.
    """
    context_model = find_context_model(source or DEFAULT_MODEL, model.codebook_fingerprint())
    if context_model is None:
        raise ValueError(
            "the model must have a context model for its codebook, `context_model.safetensors`, but "
            f"`{source or DEFAULT_MODEL}` has none. Train one with training/train_context.py."
        )
    return context_model


def check_not_tokenizer(source: str) -> None:
    """Raises ValueError if a local model is a tokenizer, where a model that draws or describes images is needed."""
    if is_tokenizer(source):
        name = bundled_name(source) or source
        raise ValueError(
            f"`{name}` is a tokenizer, which can neither draw nor describe images. Pass a language model with image "
            "tokens, such as `--model scenes`."
        )


def is_tokenizer(source: str) -> bool:
    """Whether a local model is an image tokenizer. False for models on the Hub."""
    config_file = Path(source, "config.json")
    return config_file.is_file() and read_json_object(config_file).get("_class_name") == "SVQVAE"


@contextmanager
def explain_loading(source: str) -> Iterator[None]:
    """Names the model and the real cause in an error of loading it, whatever its type in the libraries."""
    for name in ("diffusers", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error below says what they would log
    hide_loading_bars()
    try:
        yield
    except Exception as error:
        if not _is_about_files(error):
            raise
        raise OSError(f"could not load the model `{source}`: {_describe_cause(error)}") from error


def _is_about_files(error: Exception) -> bool:
    """Whether libraries raise such an error for files that are absent, damaged or of another model."""
    if isinstance(error, RuntimeError):
        return not is_out_of_memory(error)
    if type(error) is Exception:  # from `tokenizers`, whose Rust code raises no other type
        return True
    return isinstance(error, FILE_ERRORS)


def hide_loading_bars() -> None:
    """Turns off the progress bars of libraries, which show only how they load."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def load_generator(source: str | None, device: str | None, dtype: str, adapter: str | None = None) -> Any:
    """Loads a generator of any kind and merges a LoRA adapter, if given, into its language model.

    Args:
        source (`str`, *optional*): Folder or Hub id, by default the bundled language model.
        device (`str`, *optional*): Name of the device, by default a GPU if there is one.
        dtype (`str`): Precision of the weights.
        adapter (`str`, *optional*): Folder or Hub id of a LoRA adapter.

    Raises:
        OSError: The generator cannot be loaded.
        ValueError: `source` is no generator, or the adapter does not fit it.
    """
    source = source or DEFAULT_GENERATOR
    check_not_tokenizer(source)
    with explain_loading(source):
        cls = _generator_class(source)
    pipeline = load_pretrained(cls, source, device, dtype)
    if adapter is not None:
        _merge_adapter(pipeline, adapter, source)
    return pipeline


def _merge_adapter(pipeline: Any, adapter: str, base: str) -> None:
    """Merges a LoRA adapter into the language model of a generator, which was loaded from `base`."""
    with require_extra("--adapter", "train"):
        import peft  # noqa: F401
    from svqvae_hf.loaders.adapters import load_adapter, merge_adapter

    class_name = type(pipeline).__name__
    has_language_model = hasattr(pipeline, "language_model")
    if not has_language_model:
        raise ValueError(f"--adapter does not apply to --model, whose class is {class_name}. Leave it out.")
    is_pipeline = class_name in PIPELINES
    if is_pipeline:
        subfolder = "language_model"
    else:
        subfolder = ""  # an `ImageLanguageModel`, whose folder is the one of its language model
    try:
        adapted = load_adapter(pipeline.language_model, adapter, base, subfolder)
    except Exception as error:
        is_about_adapter = _is_about_files(error) or isinstance(error, IndexError | ValueError)
        if not is_about_adapter:
            raise
        cause = _describe_cause(error)
        message = f"`{adapter}` must be a LoRA adapter for the language model of --model: {cause:.300}"
        raise ValueError(message) from error
    pipeline.language_model = merge_adapter(adapted)


def _generator_class(source: str) -> Any:
    """Class of a generator. Imports no other generator."""
    from svqvae_hf.language.image_language_model import ImageLanguageModel

    if ImageLanguageModel.is_at(source):
        return ImageLanguageModel
    folder = Path(source)
    is_pipeline = any(folder.glob(INDEX_PATTERN))
    if folder.is_dir() and not is_pipeline:
        raise ValueError(
            f"`{source}` must be a pipeline or a language model with image tokens. {_advice_for_no_generator(folder)}"
        )
    class_name = read_index(source).get("_class_name")
    if class_name not in PIPELINES:
        raise ValueError(f"the pipeline `{source}` must be one of {', '.join(PIPELINES)}, but is a {class_name}.")
    return getattr(svqvae_hf, class_name)


def _advice_for_no_generator(folder: Path) -> str:
    """Sentence about a folder that holds no generator."""
    if (folder / "adapter_config.json").is_file():
        return "Pass its base as --model and it as --adapter."
    holds_config = any(folder.glob("*.json"))
    if not holds_config:
        return "It holds no model. If a training run writes to it, wait until the run has ended."
    return "`svqvae extend-lm` adds image tokens."


def _describe_cause(error: Exception) -> str:
    """Describes the real cause of a loading error; the message of diffusers is only a guess."""
    for cause in _causes(error):
        if isinstance(cause, SafetensorError):
            return f"its weight file is empty, cut short or of another kind ({cause}). Download it again."
        if isinstance(cause, RepositoryNotFoundError | LocalEntryNotFoundError):
            return hub_reason(cause)
    message = f"{error!s:.500}"
    is_of_content = isinstance(error, AttributeError | KeyError | TypeError | ValueError)
    if is_of_content:
        return f"one of its files is damaged or of another model ({type(error).__name__}: {message})."
    return message


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, the error during whose handling it was raised, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__context__


def find_device(name: str | None) -> torch.device:
    """Returns a device by its name, or the default device.

    Raises:
        ValueError: If torch does not find the device on this machine.
    """
    available = []
    for kind in DEVICES:
        count = getattr(torch, kind).device_count()
        if count > 0:
            available.append(kind)
        for index in range(count):
            available.append(f"{kind}:{index}")
    available.append("cpu")
    if name is None:
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"--device must be one that torch finds here, {', '.join(available)}, got `{name}`.")
    return torch.device(name)
