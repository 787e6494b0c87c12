"""Checks of what callers pass to the model. Errors say what must hold, what came and what to do."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch

POSITIVE_INTEGERS = (
    *("in_channels", "out_channels", "base_channels", "num_res_blocks", "norm_num_groups", "z_channels"),
    *("codebook_size", "codebook_embed_dim", "sample_size"),
)
INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
INTEGER_LIMIT = 2**31  # sizes, sides and ids fit in 32 bits
RANGE_TOLERANCE = 0.25  # share of `pixel_range` by which resized images may overshoot it
SCALE_SOURCES = ("latents", "image")  # values of `scale_from`
MOST = {"levels": 16, "residual blocks per level": 64, "layers": 256}  # far above every real model
CHANNEL_MULTIPLIERS = ("encoder_ch_mult", "decoder_ch_mult")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises if config values are wrong or do not fit each other."""
    check_integers({key: config[key] for key in POSITIVE_INTEGERS})
    for key in CHANNEL_MULTIPLIERS:
        mults = config[key]
        if not isinstance(mults, list | tuple) or not all(type(mult) is int and mult > 0 for mult in mults):
            raise ValueError(f"`{key}` must be a list of integers above 0, got {mults!r}.")
    encoder_levels, decoder_levels = (len(config[key]) for key in CHANNEL_MULTIPLIERS)
    if encoder_levels != decoder_levels:
        raise ValueError(
            "`encoder_ch_mult` and `decoder_ch_mult` must have equally many levels, so that both have the same f, "
            f"got {encoder_levels} and {decoder_levels}."
        )
    check_depth("The config", {"levels": encoder_levels, "residual blocks per level": config["num_res_blocks"]})
    groups, base = config["norm_num_groups"], config["base_channels"]
    if base % groups:
        raise ValueError(f"`norm_num_groups` must divide `base_channels`, but {groups} does not divide {base}.")
    if not isinstance(config["codebook_l2_norm"], bool):
        raise ValueError(f"`codebook_l2_norm` must be True or False, got {config['codebook_l2_norm']!r}.")
    for key in ("pixel_range", "network_range"):
        check_range(key, config[key])


def check_depth(name: str, counts: Mapping[str, int]) -> None:
    """Raises for thousands of levels, blocks or layers, because building such a network would never end.

    Args:
        name (`str`): Name of the file or config, for the error.
        counts (`Mapping[str, int]`): Numbers by the keys of `MOST`.

    Raises:
        ValueError: A number is too large.
    """
    for what, count in counts.items():
        if count > MOST[what]:
            raise ValueError(f"{name} must have at most {MOST[what]} {what}, got {count}.")


def check_integers(numbers: Mapping[str, Any], least: int = 1) -> None:
    """Raises unless all values are integers from `least` to 2**31 - 1."""
    for key, value in numbers.items():
        if type(value) is not int or not least <= value < INTEGER_LIMIT:
            raise ValueError(f"`{key}` must be an integer of at least {least} and under 2**31, got {value!r:.80}.")


def check_range(key: str, bounds: Any) -> None:
    """Raises unless a range is two finite numbers, the lower one first."""
    are_numbers = isinstance(bounds, list | tuple) and all(isinstance(bound, int | float) for bound in bounds)
    if not are_numbers or len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"`{key}` must be two finite numbers (low, high) with low < high, got {bounds!r}.")


def check_sample(sample: torch.Tensor, config: Mapping[str, Any], dtype: torch.dtype, training: bool) -> None:
    """Raises if a sample is not `(batch, in_channels, height, width)` of the model's type.

    Warns about values far outside `pixel_range`. In training it does not, because each step would wait for the GPU.
    """
    if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
        kind = sample.dtype if isinstance(sample, torch.Tensor) else type(sample).__name__
        raise TypeError(
            f"`sample` must be a floating-point tensor with values in {tuple(config['pixel_range'])} (`pixel_range`), "
            f"got {kind}. Prepare images with SVQVAEImageProcessor."
        )
    if sample.dtype != dtype and not torch.is_autocast_enabled(sample.device.type):
        raise TypeError(f"`sample` must be {dtype} like the model, got {sample.dtype}. Pass `sample.to(model.dtype)`.")
    advice = " Prepare images with SVQVAEImageProcessor." if config["in_channels"] == 3 else ""
    if sample.ndim != 4 or sample.shape[1] != config["in_channels"] or 0 in sample.shape:
        raise ValueError(
            f"`sample` must have shape (batch, {config['in_channels']}, height, width) with no side of 0, got "
            f"{tuple(sample.shape)}.{advice}"
        )
    if not training and not sample.is_meta and not torch.compiler.is_compiling():
        _warn_outside_range(sample, config["pixel_range"])


def _warn_outside_range(sample: torch.Tensor, pixel_range: Sequence[float]) -> None:
    (low, high), (lowest, highest) = pixel_range, sample.aminmax()
    tolerance = RANGE_TOLERANCE * (high - low)
    fault = ""
    if not (low - tolerance <= lowest and highest <= high + tolerance):  # also when they are NaN
        fault = f"has values far outside {tuple(pixel_range)} (`pixel_range`), so its ids will be wrong"
    elif low < 0 <= lowest < highest <= 1:
        fault = f"has no value below 0, where `pixel_range` is {tuple(pixel_range)}. Images in [0, 1] get wrong ids"
    if fault:
        warnings.warn(
            f"`sample` {fault}. Prepare images with `SVQVAEImageProcessor.from_model(vqvae)`, or load the model with "
            "the range of your images, as in `from_pretrained(..., pixel_range=(0, 1))`.",
            stacklevel=2,
        )


def check_latents(latents: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Raises if latents are not `(batch, codebook_embed_dim, h, w)`."""
    dim = config["codebook_embed_dim"]
    if latents.ndim != 4 or latents.shape[1] != dim or 0 in latents.shape:
        raise ValueError(
            f"`latents` must have {dim} channels (`codebook_embed_dim`) and no side of 0, got shape "
            f"{tuple(latents.shape)}. Pass the output of `encode`, not an image."
        )


def check_finite(latents: torch.Tensor) -> None:
    """Raises if latents are NaN or infinite. Compiled graphs do not check, because that would break the graph."""
    if not torch.compiler.is_compiling() and not latents.isfinite().all():
        raise ValueError(
            "`latents` must be finite, but some are NaN or infinite. Pass images without such values. If the model is "
            "in float16, load it in float32 or bfloat16, because float16 may overflow."
        )


def check_ids(ids: torch.Tensor, config: Mapping[str, Any], shape: Sequence[int] | None = None) -> None:
    """Raises if ids cannot be looked up.

    Args:
        ids (`torch.Tensor`): Integers, `(batch, h, w)`, or of any shape if `shape` is given.
        config (`Mapping[str, Any]`): Config of the model.
        shape (`tuple[int, int, int, int]`, *optional*): `(batch, h, w, codebook_embed_dim)`.
    """
    kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
    if kind not in INTEGERS:
        advice = "Pass its `.latents`." if hasattr(ids, "latents") else "Only `decode` takes latents."
        raise TypeError(f"Ids must be a tensor of an integer type, got {kind}. {advice}")
    dim, size = config["codebook_embed_dim"], config["codebook_size"]
    if shape is None:
        if ids.ndim != 3 or not ids.numel():
            raise ValueError(
                f"Ids must have shape (batch, h, w), not empty, got {tuple(ids.shape)}. Reshape them, or pass `shape`."
            )
        shape = (*ids.shape, dim)
    if not ids.numel() or len(shape) != 4 or math.prod(shape[:-1]) != ids.numel() or shape[-1] != dim:
        raise ValueError(
            f"`shape` must be (batch, h, w, {dim}) for as many ids as there are, at least one, got {tuple(shape)} for "
            f"{ids.numel()}. Reshape them to the grid."
        )
    # Skipped when compiling: a data-dependent check would break the graph.
    if not torch.compiler.is_compiling():
        low, high = ids.long().aminmax()
        if not 0 <= low <= high < size:
            raise ValueError(
                f"Ids must lie in [0, {size}) (`codebook_size`), but lie in [{low}, {high}]. Pass ids of this "
                "codebook, without special tokens."
            )


def check_scales(scales: float | Iterable[float], name: str = "`scales`") -> list[float]:
    """Raises if scales are not finite numbers above 0. Returns them as a list."""
    is_list = isinstance(scales, Iterable) and getattr(scales, "ndim", None) != 0
    checked: list[Any] = list(cast(Iterable[float], scales)) if is_list else [scales]
    if not all(isinstance(scale, Real) and not isinstance(scale, bool) for scale in checked):
        raise TypeError(f"{name} must be a number or a list of numbers, got {scales!r}.")
    if not checked:
        raise ValueError(f"{name} must have at least one scale, got none. Pass `[1]`, or leave them out.")
    for scale in checked:
        if not 0 < scale < float("inf"):
            raise ValueError(f"{name} must be finite and above 0, got {scale}.")
    return [scale if isinstance(scale, int) else float(scale) for scale in checked]


def check_scale_from(scale_from: str) -> None:
    """Raises if `scale_from` is not one of `SCALE_SOURCES`."""
    if scale_from not in SCALE_SOURCES:
        raise ValueError(f"`scale_from` must be one of {', '.join(SCALE_SOURCES)}, got {scale_from!r:.80}.")


def check_tiles(f: int, tile_size: int, overlap: int | None) -> None:
    """Raises if a tile or its overlap, both in pixels, does not fit latents of `f` pixels."""
    for name, value in {"tile_size": tile_size, "overlap": 0 if overlap is None else overlap}.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"`{name}` must be an integer number of pixels, got {value!r}.")
    if tile_size % f or tile_size < f:
        nearest = max(1, round(tile_size / f)) * f
        raise ValueError(
            f"`tile_size` must be a positive multiple of f = {f}, got {tile_size}. The nearest is {nearest}."
        )
    largest = (tile_size // f - 1) // 2 * f
    if overlap is not None and (overlap % f or not 0 <= overlap <= largest):
        nearest = min(max(0, round(overlap / f) * f), largest)
        raise ValueError(
            f"`overlap` must be a multiple of f = {f} and less than half of `tile_size` = {tile_size}, got {overlap}. "
            f"The nearest is {nearest}."
        )


def check_same_codebook(model: Any, tokens: Any) -> None:
    """Raises if the model cannot decode ids, because they belong to another codebook.

    Args:
        model ([`SVQVAE`]): Model to decode with.
        tokens ([`ImageTokens`] or [`TokenSettings`]): Ids, or the settings of a token set.

    Raises:
        ValueError: The codebook's fingerprint or size differs, or the model's f.
    """
    for fact, expected, found in (
        ("of the model's codebook, with fingerprint", model.codebook_fingerprint(), tokens.codebook_fingerprint),
        ("of a model with f =", model.f, tokens.f),
        ("of a codebook with this number of codes:", model.config["codebook_size"], tokens.codebook_size),
    ):
        if found != expected:
            raise ValueError(f"the ids must be {fact} {expected}, got {found}. Use the model that encoded them.")
