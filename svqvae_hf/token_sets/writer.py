"""Makes a token set from an image set: ids in sharded Parquet, which `datasets` reads."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from svqvae_hf.atomic_io import check_new_folder
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.hub.repositories import check_repo_id, prepare_repo
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.paths import check_local, scale_endings
from svqvae_hf.token_sets.crops import CROPS, is_whole
from svqvae_hf.token_sets.encoder import ShardEncoder, assigned_images, read_crops
from svqvae_hf.token_sets.partial import PartialTokenSet, TokenizeReport
from svqvae_hf.token_sets.settings import TokenSettings


def tokenize_set(
    model: SVQVAE,
    images: ImageSet,
    out: str | os.PathLike,
    *,
    model_name: str,
    source_set: str | None = None,
    scales: Sequence[float] = (1.0,),
    scale_from: str = "latents",
    crops: str = "whole",
    resolution: int | None = None,
    min_side: int | None = None,
    batch_size: int = 1,
    shard_size: int = 1000,
    num_workers: int = 0,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> TokenizeReport:
    """Makes a token set from an image set.

    Until the set is complete, it is in `{out}.partial`, with a record of its options in `{out}.partial.json`. An
    interrupted run resumes after its finished shards when it is started again. It writes the same files as an unbroken
    run, with any number of processes.

    Under `accelerate launch` each process writes its own shards, and all return the report. On several machines `out`
    must be on a file system that all of them share.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, on its device, with its tiling configured.
        images ([`ImageSet`]): Images from [`~svqvae_hf.data.image_sets.open_images`]. Unreadable ones are skipped and
            listed.
        out (`str` or `os.PathLike`): Folder to create. It must be absent or empty.
        model_name (`str`): Hub id of the model, or the name of its folder, for the settings and the card.
        source_set (`str`, *optional*): Name of the image set on the Hub, for the card.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Output side over input side, one column of ids each.
        scale_from (`str`, defaults to `"latents"`): What is resized to a scale, see [`SVQVAE.forward`].
        crops (`str`, defaults to `"whole"`): Crops of an image that become rows, a key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.
        min_side (`int`, *optional*): Side in pixels below which an image is skipped like an unreadable one.
        batch_size (`int`, defaults to 1): Crops of equal size that are encoded together. With 1, the ids equal
            [`SVQVAE.encode_tokens`] of one image. With more, a few may differ, because sums are rounded differently.
        shard_size (`int`, defaults to 1000): Images per Parquet file.
        num_workers (`int`, defaults to 0): Processes that read and crop images; with 0, this process does.
        license (`str`, *optional*): Licence of the images, by the Hub's identifier, for the card.
        push_to_hub (`str`, *optional*): `org/name` on the Hub to upload the set to.
        private (`bool`, *optional*): Whether a new repository is private.

    Returns:
        [`TokenizeReport`]: Numbers of images, rows and shards, and the skipped images.

    Raises:
        OSError: `out` cannot be written, an image cannot be fetched, or the set cannot be pushed.
        ValueError: An option is out of range or differs from the interrupted run, no image can be read, or an image
            needs more memory than is available.
    """
    check_local(os.fspath(out))
    _check_options(crops, resolution, min_side, batch_size, shard_size, num_workers)
    if push_to_hub is not None:
        check_repo_id(push_to_hub)
    elif private is not None:
        raise ValueError("`private` needs `push_to_hub`, got None. Pass `org/name`.")
    scale_endings(scales)  # `detokenize_set` names files by them
    settings = TokenSettings(
        model=model_name,
        scales=tuple(map(float, scales)),
        f=model.f,
        codebook_size=model.config["codebook_size"],
        codebook_fingerprint=model.codebook_fingerprint(),
        tile_size=model.tile_size if model.use_tiling else None,
        overlap=model.overlap if model.use_tiling else None,
        crops=crops,
        resolution=resolution,
        scale_from=scale_from,
    )
    options = {
        "image_set": images.fingerprint,
        "min_side": min_side,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "dtype": str(model.dtype),
        "device": model.device.type,
    }
    state = PartialState(cpu=model.device.type == "cpu")
    token_set = PartialTokenSet(check_new_folder(Path(out)), settings, images.features)
    if state.is_main_process:
        if push_to_hub is not None:
            prepare_repo(push_to_hub, private=private, license=license, repo_type="dataset")
        token_set.create(options)
    state.wait_for_everyone()
    token_set.check_options(options)

    finished = {path.name for path in token_set.finished_shards()}
    assigned = assigned_images(images.parts, shard_size, finished, state.process_index, state.num_processes)
    encoder = ShardEncoder(model, settings, images.features, batch_size)
    with _progress_bar(images, token_set, state) as bar:
        read = read_crops(assigned, settings, num_workers, min_side)
        for shard, shard_images in itertools.groupby(read, key=lambda image: image.shard):
            token_set.write_shard(shard, encoder.encode(shard_images, bar.update))
    state.wait_for_everyone()
    report: list[Any] = [token_set.commit(license, source_set, push_to_hub) if state.is_main_process else None]
    return broadcast_object_list(report)[0]


def _progress_bar(images: ImageSet, token_set: PartialTokenSet, state: PartialState) -> tqdm:
    """Progress bar of the main process, over an equal share of the images, because shards have about one size."""
    if not state.is_main_process:
        return tqdm(disable=True)
    total = images.length and -(-images.length // state.num_processes)
    finished = token_set.finished_images() // state.num_processes
    return tqdm(total=total, initial=finished, unit="image", disable=None)


def _check_options(
    crops: str, resolution: int | None, min_side: int | None, batch_size: int, shard_size: int, num_workers: int
) -> None:
    if crops not in CROPS:
        raise ValueError(f"`crops` must be one of {', '.join(CROPS)}, got {crops!r}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("num_workers", num_workers, 0),
        ("resolution", resolution, 1),
        ("min_side", min_side, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if is_whole(crops) != (resolution is None):
        raise ValueError(
            f"`resolution` must be the side of the crops in pixels, got {resolution} for `crops` {crops!r}. "
            f"{'Pass it' if resolution is None else 'Leave it out'}, or choose other crops."
        )
