"""Original checkpoints of five families: read, checked, and made a model or a whole Hub repository."""

import argparse
import hashlib
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from svqvae_hf.model_cards import model_card
from svqvae_hf.modeling_svqvae import SVQVAE

REPO_ID = r"[\w.-]+/[\w.-]+"
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
NORM_NUM_GROUPS = 32  # in all families
CHECK_CELLS = 8  # side, in latents, of the random image that a written model is compared on

# Config values that are sizes of weights, with their axes.
CONFIG_AXES = {
    "in_channels": ("encoder.conv_in.weight", 1),
    "out_channels": ("decoder.conv_out.weight", 0),
    "base_channels": ("encoder.conv_in.weight", 0),
    "z_channels": ("encoder.conv_out.weight", 0),
    "codebook_size": ("quantize.embedding.weight", 0),
    "codebook_embed_dim": ("quantize.embedding.weight", 1),
}

HUB_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "access is restricted. Accept the terms on its page and log in with `hf auth login`."),
    (RepositoryNotFoundError, "the repository does not exist, or is private. Check its name, or `hf auth login`."),
    (LocalEntryNotFoundError, "the Hub cannot be reached, and the cache has no copy. Check the network and HF_HUB_*."),
    (EntryNotFoundError, "the repository has no such file."),
)


@dataclass(frozen=True)
class Family:
    """Layout of the checkpoints of one code base, and what their shapes do not tell.

    Args:
        name (`str`): Short name.
        title (`str`): Name and origin, for people.
        container (`str`, *optional*): Key of the pickled dict that holds the weights. `None`: a safetensors file,
            which holds nothing else.
        levels (`str`): Prefix, up to the number, of the keys of an encoder level; tells the family, and f.
        beside (`frozenset[str]`): Keys of the pickled dict, one of which must be there as well.
        prefix (`str`): What stands before each key.
        names (`tuple[tuple[str, str], ...]`): Beginnings of keys, ours and the family's. `{level}` stands for each
            level, `{flipped}` for the same counted from the other end.
        training_keys (`tuple[str, ...]`): Beginnings of keys that only training needs; they are dropped.
        network_range (`tuple[float, float]`): Range of the images that the family trains on.
        codebook_l2_norm (`bool`): Whether latents and codes are on the unit sphere.
        license (`str`, *optional*): Licence of the released weights, where there is one release.
    """

    name: str
    title: str
    container: str | None
    levels: str
    beside: frozenset[str] = frozenset()
    prefix: str = ""
    names: tuple[tuple[str, str], ...] = ()
    training_keys: tuple[str, ...] = ("quantize.codebook_used",)  # a log of used ids, 65,536 floats
    network_range: tuple[float, float] = (0.0, 1.0)
    codebook_l2_norm: bool = True
    license: str | None = None

    def holds(self, content: Mapping[str | None, Any]) -> bool:
        """Whether a file of this content is of this family."""
        weights = content.get(self.container)
        return (
            isinstance(weights, dict)
            and _count(weights, self.levels) > 0
            and (not self.beside or bool(self.beside & content.keys()))
        )

    def original_name(self, key: str, num_levels: int) -> str:
        """What the family calls a parameter of ours."""
        return self.prefix + _rename(key, self.name_pairs(num_levels))

    def name_pairs(self, num_levels: int) -> list[tuple[str, str]]:
        """`names`, one pair for each level."""
        return [
            (ours.format(level=level), theirs.format(level=level, flipped=num_levels - 1 - level))
            for ours, theirs in self.names
            for level in range(num_levels)
        ]


FAMILIES = (
    Family(
        name="svqvae",
        title="SVQVAE of the Open Model Initiative",
        container=None,
        levels="encoder.conv_blocks.",
        license="apache-2.0",
    ),
    Family(
        name="llamagen",
        title="LlamaGen",
        container="model",
        levels="encoder.conv_blocks.",
        beside=frozenset({"args", "ema", "optimizer"}),
        network_range=(-1.0, 1.0),
    ),
    Family(
        name="flexvar",
        title="FlexVAR, whose layout is also that of LlamaGen's files without training state",
        container="model",
        levels="encoder.conv_blocks.",
        network_range=(-1.0, 1.0),
    ),
    Family(
        name="lightning",
        title="multi-scale VQVAE trained with Lightning",
        container="state_dict",
        levels="vqvae.encoder.conv_blocks.",
        prefix="vqvae.",
        training_keys=("vqvae.quantize.codebook_used", "lpips_fn."),
    ),
    Family(
        name="taming",
        title="VQGAN of taming-transformers",
        container="state_dict",
        levels="encoder.down.",
        names=(
            ("encoder.conv_blocks.{level}.res.", "encoder.down.{level}.block."),
            ("encoder.conv_blocks.{level}.", "encoder.down.{level}."),
            ("encoder.mid.0.", "encoder.mid.block_1."),
            ("encoder.mid.1.", "encoder.mid.attn_1."),
            ("encoder.mid.2.", "encoder.mid.block_2."),
            ("decoder.mid.0.", "decoder.mid.block_1."),
            ("decoder.mid.1.", "decoder.mid.attn_1."),
            ("decoder.mid.2.", "decoder.mid.block_2."),
            ("decoder.conv_blocks.{level}.res.", "decoder.up.{flipped}.block."),
            ("decoder.conv_blocks.{level}.", "decoder.up.{flipped}."),
        ),
        training_keys=("loss.",),
        network_range=(-1.0, 1.0),
        codebook_l2_norm=False,
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """An original checkpoint, as a model of ours takes it.

    Args:
        path (`Path`): The file, after a download if it is on the Hub.
        family ([`Family`]): Code base that it comes from.
        config (`dict[str, Any]`): Config of the [`SVQVAE`].
        state_dict (`dict[str, torch.Tensor]`): Weights by our names, in float32.
    """

    path: Path
    family: Family
    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    def model(self) -> SVQVAE:
        """The model, in evaluation mode."""
        model = SVQVAE(**self.config)
        model.load_state_dict(self.state_dict)
        return model.eval()


@dataclass(frozen=True)
class ConversionReport:
    """What [`convert`] did; `str` gives it in lines.

    Args:
        source (`str`): As given.
        sha256 (`str`): SHA-256 of the source file, in hexadecimal.
        family (`str`): Name of the [`Family`].
        config (`dict[str, Any]`): Config of the model.
        tensors (`int`): Number of tensors, each found bit-equal after loading the result again.
        out (`Path`): The repository's folder.
        files (`tuple[str, ...]`): What is in it.
        url (`str`, *optional*): Address of the commit or pull request, if the result was pushed.
    """

    source: str
    sha256: str
    family: str
    config: dict[str, Any]
    tensors: int
    out: Path
    files: tuple[str, ...]
    url: str | None

    def __str__(self) -> str:
        config = ", ".join(f"{key}={value}" for key, value in self.config.items())
        lines = [
            f"read     {self.source} ({self.family}, sha256 {self.sha256})",
            f"config   {config}",
            f"checked  {self.tensors} tensors bit-equal after loading again, and the reconstruction of a random image",
            f"written  {self.out}: {', '.join(self.files)}",
        ]
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


def load_single_file(source: str | Path, *, use_ema: bool = False, **config: Any) -> SVQVAE:
    """Loads a model from an original checkpoint; see [`read_checkpoint`].

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        use_ema (`bool`, defaults to `False`): Take the averaged weights, which LlamaGen's files may have.
        **config: Config values that replace those read from the file, such as `network_range`.

    Returns:
        [`SVQVAE`]: The model in float32 and in evaluation mode.
    """
    return read_checkpoint(source, use_ema=use_ema, **config).model()


def read_checkpoint(source: str | Path, *, use_ema: bool = False, **config: Any) -> Checkpoint:
    """Reads an original checkpoint, strictly; family and config come from its keys and shapes.

    The container and the keys tell the family: a safetensors file is `svqvae`; a pickle with `model` is `llamagen` if
    `args`, `ema` or `optimizer` stand beside it, else `flexvar` (whose config would be the same); one with
    `state_dict` is `lightning` or `taming`. Pickles are read as weights only: one with code in it is refused.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        use_ema (`bool`, defaults to `False`): Take the averaged weights, which LlamaGen's files may have.
        **config: Config values that replace those read from the file. What shapes cannot tell, the range of the
            images and whether the codebook is normalised, comes from the family.

    Returns:
        [`Checkpoint`]: Family, config and weights.

    Raises:
        OSError: If the file is not there, or not to be had from the Hub.
        ValueError: If it is broken, of no known family, or its weights are not exactly those that its config asks for.
    """
    path = _fetch(source)
    content = _read(path, source)
    family = _find_family(content, source)
    weights = content[family.container]
    if use_ema:
        weights = content.get("ema")
        if not isinstance(weights, dict):
            raise ValueError(
                f"`{source}` must hold averaged weights (`ema`) for `use_ema`, but has none. Leave it out."
            )
    weights = {str(key): value for key, value in weights.items() if not str(key).startswith(family.training_keys)}
    _refuse(source, {"not tensors": {key for key, value in weights.items() if not isinstance(value, torch.Tensor)}})
    num_levels = _count(weights, family.levels)
    _check_attention(family, weights, num_levels, source)
    config = {**_infer_config(family, weights, num_levels, source), **config}
    try:
        with torch.device("meta"):
            expected = SVQVAE(**config).state_dict()
    except ValueError as error:
        sizes = ", ".join(f"{key} {config[key]} from {weight}" for key, (weight, _) in CONFIG_AXES.items())
        raise ValueError(f"`{source}` must have the shapes of an SVQVAE, but gives {sizes}: {error}") from error
    original_names = {key: family.original_name(key, num_levels) for key in expected}
    _check_weights(weights, {name: expected[key].shape for key, name in original_names.items()}, source)
    state_dict = {key: weights[name].detach().float() for key, name in original_names.items()}
    return Checkpoint(path, family, config, state_dict)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    use_ema: bool = False,
    variant: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    **config: Any,
) -> ConversionReport:
    """Makes a whole Hub repository of an original checkpoint: card, config and safetensors.

    The result is written beside `out`, loaded again, compared with the source tensor by tensor and by one forward
    pass, and only then named `out`.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to make; an empty one may be there.
        use_ema (`bool`, defaults to `False`): Take the averaged weights, which LlamaGen's files may have.
        variant (`str`, *optional*): `fp16` or `bf16`: the weights in half precision, too. The codebook stays in
            float32, so that ids keep their meaning.
        license (`str`, *optional*): Licence of the source, as the Hub names it. Not needed for `svqvae`, which was
            released under Apache-2.0.
        push_to_hub (`str`, *optional*): `org/name` on the Hub to upload the result to.
        private (`bool`, *optional*): Visibility of the repository, if it is a new one.
        create_pr (`bool`, defaults to `False`): Open a pull request there instead of a commit.
        **config: Config values that replace those read from the file, such as `network_range`.

    Returns:
        [`ConversionReport`]: What was done.

    Raises:
        OSError: If the source cannot be read, `out` cannot be written, or the Hub refuses.
        ValueError: If the source is not a whole checkpoint of a known family, or an argument does not fit.
    """
    out = Path(out).resolve()
    _check_arguments(out, variant, push_to_hub, private, create_pr)
    checkpoint = read_checkpoint(source, use_ema=use_ema, **config)
    with checkpoint.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    model = checkpoint.model()
    base_model = _hub_repo(source)
    card = model_card(
        model.config,
        repo_id=push_to_hub or out.name,
        license=license or checkpoint.family.license,
        base_model=base_model,
        provenance={
            "family": checkpoint.family.title,
            "source": f"`{source if base_model else checkpoint.path.name}`{', `ema`' if use_ema else ''}",
            "sha256 of the source": f"`{sha256}`",
        },
        variant=variant,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside, out.name)
        _save(model, folder)
        if variant is not None:
            _save(_halve(model, variant), folder, variant)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.replace(out)
    return ConversionReport(
        source=str(source),
        sha256=sha256,
        family=checkpoint.family.name,
        config=checkpoint.config,
        tensors=len(checkpoint.state_dict),
        out=out,
        files=tuple(sorted(file.name for file in out.iterdir())),
        url=_push(out, push_to_hub, private, create_pr) if push_to_hub else None,
    )


def _hub_repo(source: str | Path) -> str | None:
    """The repository of a source on the Hub, `None` for a local file."""
    match = re.fullmatch(rf"({REPO_ID}):(.+)", str(source))
    return match[1] if match and not Path(source).exists() else None


def _fetch(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    if Path(source).is_dir():
        raise IsADirectoryError(
            f"`{source}` must be a checkpoint file, but is a folder. Name the file in it; a folder with config.json "
            "is for `SVQVAE.from_pretrained`."
        )
    repo_id = _hub_repo(source)
    if repo_id is None:
        raise FileNotFoundError(f"There is no file `{source}`. Pass an existing one, or `org/repo:file` on the Hub.")
    try:
        return Path(hf_hub_download(repo_id, str(source).removeprefix(f"{repo_id}:")))
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise OSError(f"`{source}` cannot be had from the Hub: {_hub_reason(error)}") from error


def _hub_reason(error: Exception) -> str:
    for kind, reason in HUB_REASONS:
        if isinstance(error, kind):
            return reason
    return " ".join(str(error).split())


def _read(path: Path, source: str | Path) -> dict[str | None, Any]:
    """Content of a file: a pickled dict, or `{None: weights}` of a safetensors file."""
    if path.suffix == ".safetensors":
        try:
            return {None: load_file(path)}
        except SafetensorError as error:
            raise ValueError(
                f"`{source}` must be a whole safetensors file, as its name says, but is not: {error}. Download it "
                "again."
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they announce makes the read fail
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle makes the reader raise almost anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is not None:
            raise ValueError(
                f"`{source}` must hold weights only, but is a pickle that calls for `{code[1]}`, which could run any "
                'code. Ask for a safetensors file, or, where it was made, save the weights alone: `torch.save({"'
                'state_dict": ...}, file)`.'
            ) from None
        raise ValueError(
            f"`{source}` must be a whole PyTorch checkpoint that holds weights only, but cannot be read as one; it "
            "may be empty, cut short, or of another format. Download it again."
        ) from error
    return content if isinstance(content, dict) else {}


def _find_family(content: Mapping[str | None, Any], source: str | Path) -> Family:
    for family in FAMILIES:
        if family.holds(content):
            return family
    looked_for = "; ".join(
        f"{family.name}: `{family.levels}0.*` "
        + ("in a .safetensors file" if family.container is None else f"in `{family.container}`")
        + (f" beside {' or '.join(sorted(family.beside))}" if family.beside else "")
        for family in FAMILIES
    )
    keys = sorted(str(key) for key in content.get(None, content))
    raise ValueError(
        f"`{source}` is a checkpoint of no known family. Looked for {looked_for}. Found {', '.join(keys[:5])}"
        f"{' and others' if keys[5:] else '' if keys else 'no keys'}."
    )


def _rename(key: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _count(weights: Mapping[Any, Any], prefix: str) -> int:
    """How many numbers follow `prefix` in the keys."""
    return len({match[1] for key in weights if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", str(key)))})


def _check_attention(family: Family, weights: Mapping[str, Any], num_levels: int, source: str | Path) -> None:
    allowed = {"encoder": num_levels - 1, "decoder": 0}
    elsewhere = sorted(
        prefix
        for network, lowest in allowed.items()
        for level in range(num_levels)
        if level != lowest
        and _count(weights, prefix := family.original_name(f"{network}.conv_blocks.{level}.attn.", num_levels))
    )
    if elsewhere:
        raise ValueError(
            f"`{source}` must have attention at the lowest resolution only, as every SVQVAE, but also has "
            f"{', '.join(f'{prefix}*' for prefix in elsewhere)}. It cannot be converted."
        )


def _infer_config(family: Family, weights: Mapping[str, Any], num_levels: int, source: str | Path) -> dict[str, Any]:
    level_keys = {
        network: [f"{network}.conv_blocks.{level}.res.0.conv1.weight" for level in range(num_levels)]
        for network in ("encoder", "decoder")
    }
    level_keys["decoder"].reverse()  # the decoder's first level is the lowest resolution
    keys = [*(key for key, _ in CONFIG_AXES.values()), *level_keys["encoder"], *level_keys["decoder"]]
    names = {key: family.original_name(key, num_levels) for key in keys}
    _refuse(
        source,
        {
            "missing": {name for name in names.values() if name not in weights},
            "misshapen": {
                f"{name} {tuple(weights[name].shape)}"
                for name in names.values()
                if name in weights and (weights[name].ndim < 2 or 0 in weights[name].shape)
            },
        },
    )
    sizes = {key: weights[names[weight]].shape[axis] for key, (weight, axis) in CONFIG_AXES.items()}
    channels = {network: [weights[names[key]].shape[0] for key in keys] for network, keys in level_keys.items()}
    base_channels = sizes["base_channels"]
    _refuse(
        source,
        {
            f"misshapen ({base_channels} channels, as {names['encoder.conv_in.weight']}, or a multiple)": {
                f"{names[key]} {tuple(weights[names[key]].shape)}"
                for network, keys in level_keys.items()
                for key, number in zip(keys, channels[network], strict=True)
                if number % base_channels
            }
        },
    )
    return {
        **sizes,
        "encoder_ch_mult": tuple(number // base_channels for number in channels["encoder"]),
        "decoder_ch_mult": tuple(number // base_channels for number in channels["decoder"]),
        "num_res_blocks": _count(weights, family.original_name("encoder.conv_blocks.0.res.", num_levels)),
        "norm_num_groups": NORM_NUM_GROUPS,
        "codebook_l2_norm": family.codebook_l2_norm,
        "network_range": family.network_range,
    }


def _check_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str | Path) -> None:
    known = {name: weights[name] for name in shapes if name in weights}
    misshapen = {name for name, tensor in known.items() if tensor.shape != shapes[name]}
    odd = {
        name
        for name, tensor in known.items()
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided or tensor.is_meta
    }
    _refuse(
        source,
        {
            "missing": shapes.keys() - weights.keys(),
            "unexpected": weights.keys() - shapes.keys(),
            "misshapen": {f"{name} {tuple(known[name].shape)} instead of {tuple(shapes[name])}" for name in misshapen},
            "not dense float32, float16 or bfloat16": {f"{name} {known[name].dtype}" for name in odd},
            "not finite": {name for name in known.keys() - misshapen - odd if not known[name].isfinite().all()},
        },
    )


def _refuse(source: str | Path, faults: Mapping[str, Set[str]]) -> None:
    """Raises if there are faults: all of them, by kind, sorted."""
    found = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names)
    if found:
        raise ValueError(
            f"`{source}` must hold exactly the weights that its config asks for, but there are {found}. Restore the "
            "file; config values that replace those read from it must fit it, too."
        )


def _check_arguments(
    out: Path, variant: str | None, push_to_hub: str | None, private: bool | None, create_pr: bool
) -> None:
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, but is {variant!r}.")
    if push_to_hub is None and (private is not None or create_pr):
        raise ValueError("`private` and `create_pr` need `push_to_hub`, but it was not given. Pass `org/name`.")
    if push_to_hub is not None and not re.fullmatch(REPO_ID, push_to_hub):
        raise ValueError(f"`push_to_hub` must be `org/name`, but is {push_to_hub!r}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"`{out}` must be a new or an empty folder, but is not. Choose another or remove it.")


def _save(model: SVQVAE, folder: Path, variant: str | None = None) -> None:
    """Writes a model, loads it again, and compares the two."""
    model.save_pretrained(folder, variant=variant)
    copy = SVQVAE.from_pretrained(folder, variant=variant, torch_dtype=model.dtype)
    found = copy.state_dict()
    differing = sorted(
        key
        for key, tensor in model.state_dict().items()
        if tensor.dtype != found[key].dtype or not torch.equal(tensor, found[key])
    )
    side = CHECK_CELLS * model.f
    sample = torch.rand((1, model.config["in_channels"], side, side), generator=torch.Generator().manual_seed(0))
    low, high = model.config["pixel_range"]
    sample = (low + (high - low) * sample).to(model.dtype)
    with torch.no_grad():
        same = torch.equal(model(sample).sample, copy(sample).sample)
    if differing or not same:
        raise OSError(
            "The written model must equal the source, but differs in "
            f"{', '.join(differing) or 'its reconstruction'}. Check the disk, and convert again."
        )


def _halve(model: SVQVAE, variant: str) -> SVQVAE:
    """Casts a model in place, all but the codebook."""
    for name, module in model.named_children():
        if name not in model._keep_in_fp32_modules:
            module.to(VARIANTS[variant])
    overflown = sorted(key for key, tensor in model.state_dict().items() if not tensor.isfinite().all())
    if overflown:
        raise ValueError(
            f"Weights must lie in the range of {variant}, but {', '.join(overflown)} do not. Choose bf16."
        )
    return model


def _push(out: Path, repo_id: str, private: bool | None, create_pr: bool) -> str:
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=out, commit_message="Upload converted SVQVAE", create_pr=create_pr
        )
    except (HTTPError, OSError) as error:
        raise OSError(
            f"`{out}` is complete, but could not be pushed to {repo_id}: {_hub_reason(error)} Push it by `hf upload "
            f"{repo_id} {out}`."
        ) from error
    return commit.pr_url or commit.commit_url
