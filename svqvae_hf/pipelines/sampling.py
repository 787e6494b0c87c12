"""Sampling of ids from logits: guidance, temperature, top-k, top-p, draws, and checks of their arguments."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_FACTOR = 1e6  # largest factor of the logits that keeps them finite in float32

Generators = torch.Generator | list[torch.Generator] | None


def check_sampling(guidance_scale: float, temperature: float, top_k: int, top_p: float) -> None:
    """Raises if an argument of sampling is out of its range.

    Raises:
        TypeError: An argument is not a number, or `top_k` is not an integer.
        ValueError: An argument is out of its range.
    """
    check_type("guidance_scale", guidance_scale, Real, "a number")
    check_type("temperature", temperature, Real, "a number")
    check_type("top_k", top_k, Integral, "an integer")
    check_type("top_p", top_p, Real, "a number")
    lowest_temperature = 1 / MAX_FACTOR
    if not -MAX_FACTOR <= guidance_scale <= MAX_FACTOR:
        raise_range("guidance_scale", guidance_scale, f"in [-{MAX_FACTOR:g}, {MAX_FACTOR:g}]")
    if temperature != 0 and not lowest_temperature <= temperature <= MAX_FACTOR:
        raise_range("temperature", temperature, f"0 or in [{lowest_temperature:g}, {MAX_FACTOR:g}]")
    if top_k < 0:
        raise_range("top_k", top_k, "at least 0")
    if not 0 < top_p <= 1:
        raise_range("top_p", top_p, "above 0 and at most 1")


def check_outputs(num_images_per_prompt: int, output_type: str, tensor_inputs: Sequence[str]) -> None:
    """Raises if an argument of a pipeline's outputs is out of its range."""
    check_type("num_images_per_prompt", num_images_per_prompt, Integral, "an integer")
    if num_images_per_prompt < 1:
        raise_range("num_images_per_prompt", num_images_per_prompt, "at least 1")
    if output_type not in OUTPUT_TYPES:
        raise_range("output_type", output_type, f"one of {', '.join(OUTPUT_TYPES)}")
    unknown_tensors = set(tensor_inputs) - {"ids"}
    if unknown_tensors:
        raise_range("callback_on_step_end_tensor_inputs", list(tensor_inputs), "among ['ids']")


def check_type(name: str, value: Any, kind: type, rule: str) -> None:
    """Raises TypeError unless an argument is of a type of numbers, of Python or NumPy."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be {rule}, got {value!r:.80}.")


def raise_range(name: str, value: Any, rule: str) -> NoReturn:
    """Raises ValueError for an argument out of its range."""
    raise ValueError(f"`{name}` must be {rule}, got {value!r:.80}.")


def check_generators(generator: Generators, count: int) -> None:
    """Raises unless there is one generator for all images or one per image."""
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` must have one generator per image, {count}, got {len(generator)}.")


def check_finite(highest: torch.Tensor, network: torch.nn.Module, title: str) -> None:
    """Raises ValueError for logits that are not finite.

    Args:
        highest (`torch.Tensor`): Highest logit of each draw. It is NaN or infinite if one of the logits is NaN or
            positive infinity.
        network (`torch.nn.Module`): Network that computed the logits, for the error.
        title (`str`): Name of the network, for the error.
    """
    if not highest.isfinite().all():
        raise ValueError(
            f"the logits of the {title} must be finite, but {type(network).__name__} in {network.dtype} returned NaN "
            "or infinity. Load it in another `dtype`, such as torch.float32, or use a model with finite weights."
        )


def guide(logits: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Joins logits of a batch and of the same batch without its condition, `(2 * batch, ...)` -> `(batch, ...)`."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def sample(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: Generators = None
) -> torch.Tensor:
    """Samples ids `(batch, ...)` from logits `(batch, ..., codes)`.

    Args:
        logits (`torch.Tensor`): Logits.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most likely id.
        top_k (`int`, defaults to 0): Number of most likely ids to sample from; 0 means all.
        top_p (`float`, defaults to 1.0): Total probability of the most likely ids to sample from.
        generator (`torch.Generator` or a list of them, *optional*): One for all images or one per image, on any
            device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.flatten(0, -2)  # (rows, codes)
    # transformers' warpers take a sequence of tokens first, but do not read it.
    scores = TemperatureLogitsWarper(float(temperature))(None, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(int(top_k))(None, scores)  # `int`, because it takes no integers of NumPy
    if top_p < 1:
        scores = TopPLogitsWarper(float(top_p))(None, scores)
    return draw(scores.view_as(logits), generator)


def draw(scores: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Draws one id per row of scores, by the Gumbel-max trick in its exponential form, as `torch.multinomial` does.

    Args:
        scores (`torch.Tensor` of shape `(batch, ..., codes)`): Logits.
        generator (`torch.Generator` or a list of them, *optional*): One for all images or one per image, on any
            device.

    Returns:
        `torch.Tensor`: Ids `(batch, ...)` in int64.
    """
    noise = _exponential(scores.shape, generator, scores.device)
    return (scores.softmax(-1) / noise).argmax(-1)


def _exponential(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
    """Draws `(batch, ...)` from the exponential distribution, with one generator for the batch or one per image."""
    if isinstance(generator, list):
        batch, *shape_of_image = shape
        check_generators(generator, batch)
        draws = []
        for generator_of_image in generator:
            draws.append(_exponential_of_one(torch.Size([1, *shape_of_image]), generator_of_image, device))
        return torch.cat(draws)
    return _exponential_of_one(shape, generator, device)


def _exponential_of_one(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Draws from the exponential distribution with one generator, which may be on another device than the result."""
    device_of_generator = device if generator is None else generator.device
    values = torch.empty(shape, device=device_of_generator)
    values.exponential_(generator=generator)
    return values.to(device)
