"""Checks of what callers pass to the model. Errors say what must hold, what came and what to do."""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

POSITIVE_INTEGERS = (
    "in_channels",
    "out_channels",
    "base_channels",
    "num_res_blocks",
    "norm_num_groups",
    "z_channels",
    "codebook_size",
    "codebook_embed_dim",
    "sample_size",
)
INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
INTEGER_LIMIT = 2**31  # sizes, sides and ids fit in 32 bits
RANGE_TOLERANCE = 0.25  # share of `pixel_range` by which resized images may overshoot it
USUAL_RANGES = ((0, 1), (-1, 1), (0, 255))  # of samples, the narrowest first
SCALE_SOURCES = ("latents", "image")  # values of `scale_from`
MOST = {"levels": 16, "residual blocks per level": 64, "layers": 256}  # far above every real model
PREPARE_IMAGES = "Prepare images with `SVQVAEImageProcessor.from_model(vqvae)`"  # advice in warnings
CHANNEL_MULTIPLIERS = ("encoder_ch_mult", "decoder_ch_mult")


# Numbers and choices


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    """Raises unless a value is a finite number in a range.

    Args:
        name (`str`): Name of the argument, for the error.
        value: Number of Python or NumPy.
        least (`float`, *optional*): Lowest value.
        above (`float`, *optional*): Bound that the value must exceed, in place of `least`.
        most (`float`, *optional*): Highest value.

    Raises:
        ValueError: The value is not a number, out of the range, infinite or NaN.
    """
    if _is_number(value):
        number = float(value)
        is_in_range = least <= number <= most and number > above
        if is_in_range and math.isfinite(number):
            return
    raise ValueError(f"`{name}` must be {_describe_range(least, above, most)}, got {value!r:.80}.")


def _is_number(value: Any) -> bool:
    """Whether a value is a number of Python or NumPy. In Python a bool is one, here it is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _describe_range(least: float, above: float, most: float) -> str:
    """Words for a range, such as `in [0, 1]`, `at least 1` or `above 0`.

    The range includes `least` and `most`, and excludes `above`. A bound that the range does not have is infinite. A
    range has at most one of the lower bounds `least` and `above`.
    """
    if least > -math.inf and most < math.inf:
        return f"in [{least:g}, {most:g}]"
    if least > -math.inf:
        return f"at least {least:g}"
    if above > -math.inf and most < math.inf:
        return f"above {above:g} and at most {most:g}"
    if above > -math.inf:
        return f"above {above:g}"
    if most < math.inf:
        return f"at most {most:g}"
    return "a finite number"


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raises unless a value is an integer from `least` to 2**31 - 1.

    Args:
        name (`str`): Name of the argument or config value, for the error.
        value: Integer of Python or NumPy.
        least (`int`, defaults to 1): Lowest value.

    Raises:
        ValueError: The value is not such an integer.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not least <= value < INTEGER_LIMIT:
        raise ValueError(f"`{name}` must be an integer of at least {least} and under 2**31, got {value!r:.80}.")


def check_integers(numbers: Mapping[str, Any], least: int = 1) -> None:
    """Raises ValueError unless all values are an `int` in range, see [`check_json_integer`]."""
    for name, value in numbers.items():
        check_json_integer(name, value, least)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError unless a value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r:.80}.")


def check_range(name: str, bounds: Any) -> None:
    """Raises ValueError unless a range is two finite numbers, the lower one first."""
    is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2
    are_numbers = is_pair and all(isinstance(bound, int | float) for bound in bounds)
    if are_numbers:
        low, high = bounds
        is_finite_range = -math.inf < low < high < math.inf
        if is_finite_range:
            return
    raise ValueError(f"`{name}` must be two finite numbers (low, high) with low < high, got {bounds!r}.")


# Configs


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError if config values are wrong or do not fit each other."""
    for key in POSITIVE_INTEGERS:
        check_json_integer(key, config[key])
    for key in CHANNEL_MULTIPLIERS:
        check_multipliers(key, config[key])
    encoder_levels = len(config["encoder_ch_mult"])
    decoder_levels = len(config["decoder_ch_mult"])
    if encoder_levels != decoder_levels:
        raise ValueError(
            "`encoder_ch_mult` and `decoder_ch_mult` must have equally many levels, so that both have the same f, "
            f"got {encoder_levels} and {decoder_levels}."
        )
    check_depth("The config", {"levels": encoder_levels, "residual blocks per level": config["num_res_blocks"]})
    groups = config["norm_num_groups"]
    channels = config["base_channels"]
    if channels % groups:
        raise ValueError(f"`norm_num_groups` must divide `base_channels`, but {groups} does not divide {channels}.")
    for key in ("codebook_l2_norm", "force_upcast"):
        if not isinstance(config[key], bool):
            raise ValueError(f"`{key}` must be True or False, got {config[key]!r}.")
    check_number("dropout_p", config["dropout_p"], least=0, most=1)
    for key in ("commit_loss_beta", "entropy_loss_ratio", "scaling_factor"):
        check_number(key, config[key])
    check_range("pixel_range", config["pixel_range"])
    check_range("network_range", config["network_range"])


def check_json_integer(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless a value is an `int` in range, because JSON holds no integers of NumPy."""
    if type(value) is not int:
        raise ValueError(f"`{name}` must be an integer of at least {least} and under 2**31, got {value!r:.80}.")
    check_integer(name, value, least)


def check_multipliers(name: str, multipliers: Any) -> None:
    """Raises ValueError unless a config value is a list of integers above 0."""
    is_list = isinstance(multipliers, list | tuple)
    are_positive = is_list and all(type(multiplier) is int and multiplier > 0 for multiplier in multipliers)
    if not are_positive:
        raise ValueError(f"`{name}` must be a list of integers above 0, got {multipliers!r}.")


def check_depth(name: str, counts: Mapping[str, int]) -> None:
    """Raises for thousands of levels, blocks or layers, because building such a network would never end.

    Args:
        name (`str`): Name of the file or config, for the error.
        counts (`Mapping[str, int]`): Numbers by the keys of `MOST`.

    Raises:
        ValueError: A number is too large.
    """
    for part, count in counts.items():
        if count > MOST[part]:
            raise ValueError(f"{name} must have at most {MOST[part]} {part}, got {count}.")


# Samples, latents and ids


def check_sample(sample: torch.Tensor, config: Mapping[str, Any], dtype: torch.dtype, training: bool) -> None:
    """Raises if a sample is not `(batch, in_channels, height, width)` of the model's type.

    Warns about values far outside `pixel_range`. In training it does not, because each step would wait for the GPU.
    """
    if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
        raise TypeError(
            f"`sample` must be a floating-point tensor with values in {tuple(config['pixel_range'])} (`pixel_range`), "
            f"got {type_name(sample)}. Prepare images with SVQVAEImageProcessor."
        )
    has_other_dtype = sample.dtype != dtype
    if has_other_dtype and not torch.is_autocast_enabled(sample.device.type):
        raise TypeError(f"`sample` must be {dtype} like the model, got {sample.dtype}. Pass `sample.to(model.dtype)`.")
    channels = config["in_channels"]
    has_layout = sample.ndim == 4 and sample.shape[1] == channels
    is_empty = 0 in sample.shape
    if is_empty or not has_layout:
        advice = ""
        if channels == 3:
            advice = " Prepare images with SVQVAEImageProcessor."
        raise ValueError(
            f"`sample` must have shape (batch, {channels}, height, width) with no side of 0, got "
            f"{tuple(sample.shape)}.{advice}"
        )
    if not training and not sample.is_meta and not torch.compiler.is_compiling():
        _warn_outside_range(sample, config["pixel_range"])


def type_name(value: Any) -> str:
    """Name of the type of a value, or of its elements if it is a tensor."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    return type(value).__name__


def _warn_outside_range(sample: torch.Tensor, pixel_range: Sequence[float]) -> None:
    """Warns if values are far outside `pixel_range`, or if they look like images in [0, 1] and it reaches below 0."""
    black, _ = pixel_range
    lowest, highest = sample.aminmax()
    is_far_outside = not _lies_in_or_near(lowest, highest, pixel_range)
    if is_far_outside:
        advice = _advise_range(lowest, highest, pixel_range)
        warnings.warn(
            f"`sample` has values far outside {tuple(pixel_range)} (`pixel_range`), so its ids will be wrong. "
            f"{PREPARE_IMAGES}, or {advice}.",
            stacklevel=2,
        )
        return
    looks_like_unit_image = 0 <= lowest < highest <= 1
    if looks_like_unit_image and black < 0:
        warnings.warn(
            f"`sample` has no value below 0, where `pixel_range` is {tuple(pixel_range)}. Images in [0, 1] get wrong "
            f"ids. {PREPARE_IMAGES}, or load the model with the range of your images: "
            "`from_pretrained(..., pixel_range=(0, 1))`.",
            stacklevel=2,
        )


def _lies_in_or_near(lowest: torch.Tensor, highest: torch.Tensor, bounds: Sequence[float]) -> bool:
    """Whether values from `lowest` to `highest` lie in a range, or overshoot it a little. NaN never does."""
    low, high = bounds
    tolerance = RANGE_TOLERANCE * (high - low)
    is_high_enough = lowest >= low - tolerance
    is_low_enough = highest <= high + tolerance
    return bool(is_high_enough and is_low_enough)


def _advise_range(lowest: torch.Tensor, highest: torch.Tensor, pixel_range: Sequence[float]) -> str:
    """Advice for samples outside `pixel_range`: to use a usual range that their values lie in and fill, if any."""
    for usual_range in USUAL_RANGES:
        _, high = usual_range
        fills_range = highest > high / 2
        if fills_range and _lies_in_or_near(lowest, highest, usual_range):
            return f"load the model with the range of your images: `from_pretrained(..., pixel_range={usual_range})`"
    return f"scale them to {tuple(pixel_range)}"


def check_latents(latents: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Raises ValueError if latents are not `(batch, codebook_embed_dim, h, w)`."""
    dim = config["codebook_embed_dim"]
    has_layout = latents.ndim == 4 and latents.shape[1] == dim  # (batch, dim, h, w)
    is_empty = 0 in latents.shape
    if is_empty or not has_layout:
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
        shape (`tuple[int, int, int, int]`, *optional*): Shape of the codes that the ids stand for,
            `(batch, h, w, codebook_embed_dim)`. There must be `batch * h * w` ids.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype not in INTEGERS:
        is_encoder_output = hasattr(ids, "latents")  # passed to `decode`, which takes ids or latents
        advice = "Pass its `.latents`." if is_encoder_output else "Only `decode` takes latents."
        raise TypeError(f"Ids must be a tensor of an integer type, got {type_name(ids)}. {advice}")
    if shape is None:
        _check_grid_of_ids(ids)
    else:
        _check_shape_of_codes(ids, shape, config["codebook_embed_dim"])
    # Skipped when compiling: a data-dependent check would break the graph.
    if not torch.compiler.is_compiling():
        _check_ids_in_codebook(ids, config["codebook_size"])


def _check_grid_of_ids(ids: torch.Tensor) -> None:
    """Raises unless ids have shape `(batch, h, w)` and are not empty."""
    if ids.ndim != 3 or ids.numel() == 0:
        raise ValueError(
            f"Ids must have shape (batch, h, w), not empty, got {tuple(ids.shape)}. Reshape them, or pass `shape`."
        )


def _check_shape_of_codes(ids: torch.Tensor, shape: Sequence[int], dim: int) -> None:
    """Raises unless a shape is `(batch, h, w, dim)` with as many positions as there are ids, at least one."""
    has_layout = len(shape) == 4 and shape[-1] == dim  # (batch, h, w, dim)
    num_positions = math.prod(shape[:-1])
    fits_ids = num_positions == ids.numel() and num_positions > 0
    if not has_layout or not fits_ids:
        raise ValueError(
            f"`shape` must be (batch, h, w, {dim}) for as many ids as there are, at least one, got {tuple(shape)} for "
            f"{ids.numel()}. Reshape them to the grid."
        )


def _check_ids_in_codebook(ids: torch.Tensor, codebook_size: int) -> None:
    """Raises unless ids lie in `[0, codebook_size)`."""
    lowest, highest = ids.long().aminmax()
    if lowest < 0 or highest >= codebook_size:
        raise ValueError(
            f"Ids must lie in [0, {codebook_size}) (`codebook_size`), but lie in [{lowest}, {highest}]. Pass ids of "
            "this codebook, without special tokens."
        )


# Scales and tiles


def is_list_of_scales(scales: Any) -> bool:
    """Whether scales are a list, even of a single scale, and not a number or an array that holds one number."""
    return isinstance(scales, Iterable) and not _is_array_of_one_number(scales)


def _is_array_of_one_number(value: Any) -> bool:
    """Whether a value is an array or a tensor without dimensions."""
    return getattr(value, "ndim", None) == 0


def check_scales(scales: Any, name: str = "`scales`") -> list[float]:
    """Checks scales, and returns them as a list.

    Args:
        scales (`float` or `Sequence[float]`): One scale or several.
        name (`str`): Name of the argument, for errors.

    Raises:
        TypeError: A scale is not a number.
        ValueError: There is no scale, or one is not finite and above 0.
    """
    scales_to_check: list[Any] = list(scales) if is_list_of_scales(scales) else [scales]
    if not scales_to_check:
        raise ValueError(f"{name} must have at least one scale, got none. Pass `[1]`, or leave them out.")
    numbers: list[float] = []
    for scale in scales_to_check:
        number = scale.item() if _is_array_of_one_number(scale) else scale
        if not _is_number(number):
            raise TypeError(f"{name} must be a number or a list of numbers, got {scales!r}.")
        is_finite_and_positive = 0 < float(number) < math.inf
        if not is_finite_and_positive:
            raise ValueError(f"{name} must be finite and above 0, got {number}.")
        numbers.append(number if isinstance(number, int) else float(number))
    return numbers


def check_scales_differ(scales: Sequence[float]) -> None:
    """Raises ValueError if scales are equal within six digits, by which the images of token files are named."""
    names = [f"{scale:g}" for scale in scales]
    if len(set(names)) < len(names):
        raise ValueError(f"scales must differ within six digits, got {', '.join(names)}. Leave one out.")


def check_scale_from(scale_from: str) -> None:
    """Raises ValueError if `scale_from` is not one of `SCALE_SOURCES`."""
    check_choice("scale_from", scale_from, SCALE_SOURCES)


def check_tiles(downsampling: int, tile_size: int, overlap: int | None) -> None:
    """Raises ValueError if a tile or its overlap does not fit the latents of a model.

    Args:
        downsampling (`int`): Pixels per latent along each side: `f` of the model.
        tile_size (`int`): Side of a tile in pixels.
        overlap (`int`, *optional*): Overlap of a tile in pixels. Not checked by default.
    """
    _check_pixels("tile_size", tile_size)
    if tile_size % downsampling != 0 or tile_size < downsampling:
        nearest_latents = max(1, round(tile_size / downsampling))
        raise ValueError(
            f"`tile_size` must be a positive multiple of f = {downsampling}, got {tile_size}. The nearest is "
            f"{nearest_latents * downsampling}."
        )
    if overlap is None:
        return
    _check_pixels("overlap", overlap)
    tile_latents = tile_size // downsampling
    most_latents = (tile_latents - 1) // 2  # of an overlap, which must be less than half of a tile
    is_in_range = 0 <= overlap <= most_latents * downsampling
    if overlap % downsampling != 0 or not is_in_range:
        rounded_latents = max(0, round(overlap / downsampling))
        nearest_latents = min(rounded_latents, most_latents)
        raise ValueError(
            f"`overlap` must be a multiple of f = {downsampling} and less than half of `tile_size` = {tile_size}, got "
            f"{overlap}. The nearest is {nearest_latents * downsampling}."
        )


def _check_pixels(name: str, value: Any) -> None:
    """Raises ValueError unless a number of pixels is an integer of Python or NumPy."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be an integer number of pixels, got {value!r}.")


# Codebooks


def check_same_codebook(model: Any, tokens: Any, option: str | None = None) -> None:
    """Raises if the model cannot decode ids, because they belong to another codebook.

    Args:
        model ([`SVQVAE`]): Model to decode with.
        tokens ([`ImageTokens`] or [`TokenSettings`]): Ids, or the settings of a token set.
        option (`str`, *optional*): Option of the command that names the model, for the error.

    Raises:
        ValueError: The codebook's fingerprint or size differs, or `f`, the pixels per latent side.
    """
    advice = _advice_on_model(tokens, option)
    fingerprint = model.codebook_fingerprint()
    if tokens.codebook_fingerprint != fingerprint:
        raise ValueError(
            f"the ids must be of the model's codebook, with fingerprint {fingerprint}, got "
            f"{tokens.codebook_fingerprint}. {advice}"
        )
    pixels_per_latent_side = model.f
    if tokens.f != pixels_per_latent_side:
        raise ValueError(f"the ids must be of a model with f = {pixels_per_latent_side}, got {tokens.f}. {advice}")
    codebook_size = model.config["codebook_size"]
    if tokens.codebook_size != codebook_size:
        raise ValueError(
            f"the ids must be of a codebook with this number of codes: {codebook_size}, got {tokens.codebook_size}. "
            f"{advice}"
        )


def _advice_on_model(tokens: Any, option: str | None) -> str:
    """Sentence that says which model decodes ids. The settings of a token set record its name."""
    encoder = "the model that encoded them"
    name = getattr(tokens, "model", None)
    if name is not None:
        encoder += f", `{name}`"
    if option is None:
        return f"Use {encoder}."
    return f"Pass `{option}` with {encoder}."
