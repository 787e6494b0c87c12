"""Parts of sampling that all pipelines share: labels, guidance, draws and checks."""

import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.pipelines.sequences import to_int64

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NUM_CANDIDATES = 1024  # tokens that hold `top_p` of the probability unless the logits are nearly equal
MAX_FACTOR = 1e6  # largest factor of the logits that keeps them finite in float32

Generators = torch.Generator | list[torch.Generator] | None
Labels = int | str | Sequence[int | str]


@contextmanager
def evaluation_mode(*models: torch.nn.Module) -> Iterator[None]:
    """Puts models in evaluation mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def fetch_pipeline(cls: type[DiffusionPipeline], name: str | os.PathLike, **kwargs: Any) -> str:
    """Returns the folder of a pipeline, downloading it if it is on the Hub.

    Args:
        cls (`type[DiffusionPipeline]`): Class that the pipeline must have.
        name (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        **kwargs: Arguments of [`~diffusers.DiffusionPipeline.download`].

    Raises:
        OSError: The pipeline does not exist or cannot be downloaded.
        ValueError: It has another class.
    """
    folder = os.fspath(name) if os.path.isdir(name) else from_hub(cls.download, name, **kwargs)
    found = cls.load_config(folder)["_class_name"]
    if found != cls.__name__:
        raise ValueError(
            f"the pipeline of `{name}` must be a {cls.__name__}, but is a {found}. Load it with `DiffusionPipeline`."
        )
    return folder


def check_sampling(
    guidance_scale: float, temperature: float, top_k: int, top_p: float, num_images: int, output_type: str
) -> None:
    """Raises if an argument of sampling is out of its range."""
    least, most = 1 / MAX_FACTOR, MAX_FACTOR
    temperature_holds = temperature == 0 or least <= temperature <= most
    rules = {
        "guidance_scale": (guidance_scale, -most <= guidance_scale <= most, f"in [-{most:g}, {most:g}]"),
        "temperature": (temperature, temperature_holds, f"0 or in [{least:g}, {most:g}]"),
        "top_k": (top_k, top_k >= 0, "at least 0"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        "num_images_per_prompt": (num_images, num_images >= 1, "at least 1"),
        "output_type": (output_type, output_type in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def check_generators(generator: Generators, count: int) -> None:
    """Raises unless there is one generator for all images or one per image."""
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` must have one generator per image, {count}, got {len(generator)}.")


def check_tensor_inputs(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises for a name of a tensor that callbacks cannot ask for."""
    if not set(names) <= set(known):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {list(known)}, got {list(names)}.")


def check_returned_ids(returned: torch.Tensor, sampled: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Returns the ids of a callback in int64, on the device of the sampled ids. Raises if they cannot replace them."""
    ids = to_int64("ids", returned).to(sampled.device)
    if ids.shape != sampled.shape or not 0 <= ids.min() <= ids.max() < codebook_size:
        raise ValueError(
            f"`ids` that `callback_on_step_end` returns must have shape {tuple(sampled.shape)} and lie in [0, "
            f"{codebook_size}), got shape {tuple(ids.shape)} in [{ids.min()}, {ids.max()}]."
        )
    return ids


def check_finite(highest: torch.Tensor, network: torch.nn.Module, title: str) -> None:
    """Raises for logits with NaN or infinity, which make the highest score of a draw NaN or infinite."""
    if not highest.isfinite().all():
        raise ValueError(
            f"the logits of the {title} must be finite, but {type(network).__name__} in {network.dtype} returned NaN "
            "or infinity. Load it in another `dtype`, such as torch.float32, or use a model with finite weights."
        )


def number_labels(class_labels: Labels, class_names: Sequence[str], num_classes: int) -> torch.Tensor:
    """Converts labels, by number or by name, to their numbers in int64, `(labels,)`.

    Raises:
        TypeError: A label is neither an integer nor a name.
        ValueError: A class is unknown, or there is none.
    """
    given = [class_labels] if isinstance(class_labels, str) else class_labels
    if isinstance(given, list | tuple):
        unknown = [label for label in given if isinstance(label, str) and label not in class_names]
        if unknown:
            raise ValueError(
                f"`class_labels` must be numbers in [0, {num_classes}) or names of classes, "
                f"{reprlib.repr(list(class_names))}, got {unknown[0]!r}."
            )
        given = [class_names.index(label) if isinstance(label, str) else label for label in given]
    numbers = torch.as_tensor(given).reshape(-1)
    labels = to_int64("class_labels", numbers) if numbers.numel() else numbers
    if not labels.numel() or not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"`class_labels` must be in [0, {num_classes}), got {class_labels!r}.")
    return labels


def make_warpers(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    """Logits processors as in transformers; a temperature of 0 needs none."""
    warpers: list[LogitsProcessor] = []
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_p < 1:
        warpers.append(TopPWarper(top_p, top_k))
    elif top_k:
        warpers.append(TopKLogitsWarper(top_k))
    return warpers


class TopPWarper(LogitsProcessor):
    """Keeps the most likely tokens with total probability `top_p`, and tokens as likely as the last of them.

    It sorts the largest logits only, where transformers' `TopPLogitsWarper` sorts all.

    Args:
        top_p (`float`): Total probability.
        top_k (`int`, defaults to 0): Number of most likely tokens to keep first; 0 means all.
    """

    def __init__(self, top_p: float, top_k: int = 0):
        self.top_p = top_p
        self.top_k = top_k

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Sets the logits `(batch, tokens)` of all other tokens to minus infinity."""
        size = scores.shape[-1]
        for count in (min(self.top_k or NUM_CANDIDATES, size), size):
            best = scores.topk(count).values
            total = (best if self.top_k else scores).logsumexp(-1, keepdim=True)
            probabilities = (best - total).exp()
            sums = probabilities.cumsum(-1)
            if self.top_k or (sums[..., -1] >= self.top_p).all():
                break
        kept = (sums - probabilities < self.top_p).sum(-1, keepdim=True).clamp(min=1)
        return scores.masked_fill(scores < best.gather(-1, kept - 1), -torch.inf)


def guide(logits: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Joins logits of a batch and of the same batch without its classes, `(2 * batch, ...)` -> `(batch, ...)`."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def draw(scores: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Draws one token per row of scores, by the Gumbel-max trick in its exponential form, as `torch.multinomial` does.

    Args:
        scores (`torch.Tensor` of shape `(batch, ..., tokens)`): Logits.
        generator (`torch.Generator` or a list of them, *optional*): One for all images or one per image, on any
            device.

    Returns:
        `torch.Tensor`: Tokens `(batch, ...)` in int64.
    """
    return (scores.softmax(-1) / _exponential(scores.shape, generator, scores.device)).argmax(-1)


def _exponential(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
    if isinstance(generator, list):
        return torch.cat([_exponential(torch.Size((1, *shape[1:])), source, device) for source in generator])
    drawn_on = device if generator is None else generator.device
    return torch.empty(shape, device=drawn_on).exponential_(generator=generator).to(device)
