"""An image set made a token set: ids in sharded Parquet, which `datasets` reads."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from svqvae_hf.atomic_io import check_new_folder, write_file
from svqvae_hf.data.image_sets import ImageRow, ImageRows, read_image
from svqvae_hf.data.token_set_cards import token_set_card
from svqvae_hf.data.token_sets import CROPS, SETTINGS_FILE, TokenSettings, is_whole, make_crops
from svqvae_hf.hub.repositories import check_repo_id, create_repo, push_folder
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.paths import scale_endings
from svqvae_hf.tokens.image_tokens import check_memory
from svqvae_hf.tokens.token_files import METADATA_KEY

SKIPPED_FILE = "skipped.json"
SHARD_KEY = b"svqvae_shard"  # of a shard's metadata: how many images it read, and those that it could not
LABEL_COLUMNS = ("label", "caption", "text")  # kept where they are there
PARTS_PER_PROCESS = 4  # files of the image set from which on each is read by one process alone


@dataclass(frozen=True)
class TokenizeReport:
    """What [`tokenize_set`] did; `str` gives it in lines.

    Args:
        out (`Path`): The set's folder.
        images (`int`): Images of the image set, the skipped ones too.
        rows (`int`): Rows of the token set.
        shards (`int`): Its Parquet files.
        skipped (`list[dict[str, str]]`): `key` and `reason` of each image that could not be read.
        url (`str`, *optional*): Address of the commit, if the set was pushed.
    """

    out: Path
    images: int
    rows: int
    shards: int
    skipped: list[dict[str, str]]
    url: str | None

    def __str__(self) -> str:
        lines = [f"written  {self.out}: {self.rows} rows of {self.images} images in {self.shards} shards"]
        if self.skipped:
            lines.append(f"skipped  {len(self.skipped)} images that cannot be read: {self.out / SKIPPED_FILE}")
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


def tokenize_set(
    model: SVQVAE,
    images: ImageRows,
    out: str | os.PathLike,
    *,
    model_name: str,
    source_set: str | None = None,
    scales: Sequence[float] = (1.0,),
    crops: str = "whole",
    resolution: int | None = None,
    batch_size: int = 1,
    shard_size: int = 1000,
    num_workers: int = 0,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> TokenizeReport:
    """Makes a token set of an image set.

    Until it is whole it stands beside `out`, as `{out}.partial`, with a record of its options in
    `{out}.partial.json`. A run that was killed goes on from its finished shards when it is started again, and gives
    the same files, with any number of processes. In a run of several processes (`accelerate launch`) each writes
    shards of its own, and all get the report; on several machines `out` must be on a file system that all of them see.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, on the device to work on, with its tiles set.
        images ([`ImageRows`]): From [`~svqvae_hf.data.image_sets.open_rows`];
            what cannot be read is skipped and listed.
        out (`str` or `os.PathLike`): Folder to make; an empty one may be there.
        model_name (`str`): Hub id of the model, or the name of its folder, for the settings and the card.
        source_set (`str`, *optional*): Name of the image set on the Hub, for the card.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Output side over input side, one column of ids each.
        crops (`str`, defaults to `"whole"`): What of an image becomes a row, a key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; required unless `crops` are whole images.
        batch_size (`int`, defaults to 1): Crops of equal size that are encoded together. With 1, ids equal those of
            [`SVQVAE.encode_tokens`] of one image; with more, a few may differ, since sums round apart.
        shard_size (`int`, defaults to 1000): Images of a Parquet file.
        num_workers (`int`, defaults to 0): Processes that read and cut images; 0: this one.
        license (`str`, *optional*): Licence of the images, as the Hub names it, for the card.
        push_to_hub (`str`, *optional*): `org/name` on the Hub to upload the set to.
        private (`bool`, *optional*): Visibility of that repository, if it is a new one.

    Raises:
        OSError: `out` cannot be written, or the Hub refuses.
        ValueError: An option does not fit, or is not that of the run to go on with; no image can be read, or one would
            take more memory than is free.
    """
    _check_options(crops, resolution, batch_size, shard_size, num_workers)
    if push_to_hub is not None:
        check_repo_id(push_to_hub)
    elif private is not None:
        raise ValueError("`private` needs `push_to_hub`, but it was not given. Pass `org/name`.")
    scale_endings(scales)  # by which `detokenize_set` names files
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
    )
    options = {
        "image_set": images.fingerprint,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "dtype": str(model.dtype),
        "device": model.device.type,
    }
    state = PartialState(cpu=model.device.type == "cpu")
    shards = _Shards(check_new_folder(Path(out)), settings, images.features)
    if state.is_main_process:
        if push_to_hub is not None:
            create_repo(push_to_hub, private, "dataset")  # a missing login is found before the work is done
        shards.begin(options)
    state.wait_for_everyone()
    shards.check(options)
    _write_shards(model, images, shards, batch_size, shard_size, num_workers)
    state.wait_for_everyone()
    report: list[Any] = [shards.finish(license, source_set, push_to_hub) if state.is_main_process else None]
    return broadcast_object_list(report)[0]


class _Shard(NamedTuple):
    """A shard's place: the part of the image set, and which of its pieces."""

    part: int
    piece: int

    @property
    def file(self) -> str:
        return f"train-{self.part:05}-{self.piece:05}.parquet"  # `datasets` tells the split by the name


class _Job(NamedTuple):
    shard: _Shard
    row: ImageRow


class _Read(NamedTuple):
    """What became of an image: its crops `(crops, 3, height, width)` in uint8, or why it cannot be read.

    `lost` says that the way to it is at fault, not the image.
    """

    shard: _Shard
    key: str
    values: dict[str, Any]
    crops: torch.Tensor | None
    fault: str | None = None
    lost: bool = False


class _Reader(TorchDataset):
    """Reads and cuts the image of a job, in whatever process."""

    def __init__(self, settings: TokenSettings):
        self.settings = settings

    def __getitem__(self, job: _Job) -> _Read:
        key, source, values = job.row
        try:
            image = read_image(source)
        except (OSError, ValueError) as error:
            named = isinstance(error, OSError) and error.strerror  # without the path, which is of this machine
            remote = isinstance(source, Mapping) and "://" in (source["path"] or "")
            return _Read(job.shard, key, values, None, named or str(error), remote and isinstance(error, OSError))
        crops = make_crops(image, self.settings.crops, self.settings.resolution)
        pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).movedim(-1, 1).contiguous()
        return _Read(job.shard, key, values, pixels)


class _Crop(NamedTuple):
    pixels: torch.Tensor
    row: dict[str, Any]  # without ids


@dataclass
class _Content:
    """Of a shard: rows, the number of images they are of, and `key` and `reason` of those that cannot be read."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)


class _Encoder:
    """Rows of the images of a shard."""

    def __init__(self, model: SVQVAE, settings: TokenSettings, features: datasets.Features, batch_size: int):
        self.model = model
        self.settings = settings
        self.features = features  # of the columns that are kept
        self.batch_size = batch_size
        self.processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])

    def encode(self, images: Iterable[_Read], on_image: Callable[[], object]) -> _Content:
        """Encodes the crops of images one after the other, neighbours of equal size together."""
        content = _Content()
        batch: list[_Crop] = []
        for image in images:
            content.images += 1
            if image.lost:
                raise OSError(f"`{image.key}` cannot be reached: {image.fault} Go on later by the same command.")
            if image.fault is not None:
                content.skipped.append({"key": image.key, "reason": image.fault})
            for crop in self._crops(image):
                if batch and (len(batch) == self.batch_size or crop.pixels.shape != batch[0].pixels.shape):
                    content.rows.extend(self._encode(batch))
                    batch.clear()
                batch.append(crop)
            on_image()
        content.rows.extend(self._encode(batch) if batch else [])
        return content

    def _crops(self, image: _Read) -> Iterator[_Crop]:
        if image.crops is None:
            return
        names = CROPS[self.settings.crops]
        height, width = image.crops.shape[-2:]
        row = {"height": height, "width": width, "key": image.key, **self.features.encode_example(image.values)}
        for name, pixels in zip(names, image.crops, strict=True):
            yield _Crop(pixels, row if len(names) == 1 else {**row, "crop": name})

    @torch.inference_mode()
    def _encode(self, crops: Sequence[_Crop]) -> Iterator[dict[str, Any]]:
        model, scales = self.model, self.settings.scales
        height, width = crops[0].pixels.shape[-2:]
        try:
            check_memory(model, len(crops) * height, width, scales, decodes=False)
        except ValueError as error:
            raise ValueError(f"`{crops[0].row['key']}`: {error}") from error
        sample = self.processor([crop.pixels.to(model.device) for crop in crops])["pixel_values"].to(model.dtype)
        grids = [grid.cpu().numpy().astype(self.settings.id_dtype) for grid in model.encode_tokens(sample, scales)]
        for number, crop in enumerate(crops):
            yield {**{f"ids_{index}": grid[number].ravel() for index, grid in enumerate(grids)}, **crop.row}


class _Shards:
    """The token set in the making: its folder beside its place, and what is in it.

    Args:
        out (`Path`): The set's place.
        settings ([`TokenSettings`]): Those of the set.
        kept (`datasets.Features`): Columns of the image set that are kept.
    """

    def __init__(self, out: Path, settings: TokenSettings, kept: datasets.Features):
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.record = out.with_name(f"{out.name}.partial.json")
        self.settings = settings
        ids = {
            f"ids_{index}": datasets.List(datasets.Value(settings.id_dtype)) for index in range(len(settings.scales))
        }
        own = {
            **ids,
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            "key": datasets.Value("string"),
        }
        if len(CROPS[settings.crops]) > 1:
            own["crop"] = datasets.Value("string")
        taken = sorted(set(own) & set(kept))
        if taken:
            raise ValueError(
                f"columns of the image set must not be named as those of ids, but {', '.join(taken)} are."
            )
        self.features = datasets.Features({**own, **kept})

    def begin(self, options: Mapping[str, Any]) -> None:
        """Makes the folder, or takes that of a run that was interrupted."""
        if self.folder.exists() and not self.record.exists():
            raise ValueError(f"`{self.folder}` must have its record `{self.record}`, but has none. Delete it first.")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.record.exists():
            write_file(self.record, self._record(options))
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.rglob(".*.tmp"):
            left_over.unlink()

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses to go on with other options than the run began with."""
        began, now = (json.loads(each) for each in (self.record.read_bytes(), self._record(options)))
        for name, value in now.items():
            if began.get(name) != value:
                raise ValueError(
                    f"a run must go on with the options that it began with, but in `{self.folder}` `{name}` was "
                    f"{began.get(name)!r:.80} and is now {value!r:.80}. Give the same, or delete it and its record."
                )

    def finished(self) -> set[str]:
        """Names of the shards that are there."""
        return {path.name for path in (self.folder / "data").glob("*.parquet")}

    def write(self, shard: _Shard, content: _Content) -> None:
        """Writes a shard: it is whole or not there."""
        schema = self.features.arrow_schema
        facts = {
            METADATA_KEY.encode(): self.settings.to_json().encode(),
            SHARD_KEY: json.dumps({"images": content.images, "skipped": content.skipped}).encode(),
        }
        table = pa.Table.from_pylist(content.rows, schema.with_metadata({**schema.metadata, **facts}))
        file = pa.BufferOutputStream()
        pq.write_table(table, file)
        write_file(self.folder / "data" / shard.file, file.getvalue().to_pybytes())

    def finish(self, license: str | None, source_set: str | None, push_to_hub: str | None) -> TokenizeReport:
        """Adds settings and card, gives the folder its name, and pushes it."""
        shards = [pq.read_metadata(path) for path in sorted((self.folder / "data").glob("*.parquet"))]
        about = [json.loads(shard.metadata[SHARD_KEY]) for shard in shards]
        skipped = [each for shard in about for each in shard["skipped"]]
        rows = sum(shard.num_rows for shard in shards)
        images = sum(shard["images"] for shard in about)
        if not rows:
            first = f" The first, `{skipped[0]['key']}`: {skipped[0]['reason']}" if skipped else ""
            raise ValueError(f"at least one image must be readable, but none of {images} is.{first}")
        card = token_set_card(
            repo_id=push_to_hub or self.out.name,
            settings=dataclasses.asdict(self.settings),
            columns=self.features,
            images=images,
            rows=rows,
            license=license,
            source_set=source_set,
        )
        write_file(self.folder / SETTINGS_FILE, self.settings.to_json().encode())
        write_file(self.folder / SKIPPED_FILE, (json.dumps(skipped, indent=2) + "\n").encode())
        write_file(self.folder / "README.md", card.encode())
        self.folder.replace(self.out)
        self.record.unlink()
        url = push_folder(self.out, push_to_hub, "Upload token set", "dataset") if push_to_hub else None
        return TokenizeReport(self.out, images, rows, len(shards), skipped, url)

    def _record(self, options: Mapping[str, Any]) -> bytes:
        record = {**dataclasses.asdict(self.settings), **options, "columns": self.features.to_dict()}
        return (json.dumps(record, indent=2) + "\n").encode()


def _write_shards(
    model: SVQVAE, images: ImageRows, shards: _Shards, batch_size: int, shard_size: int, num_workers: int
) -> None:
    """Writes those of this process that are not there yet."""
    state = PartialState()
    encoder = _Encoder(model, shards.settings, images.features, batch_size)
    total = images.length and -(-images.length // state.num_processes)  # near enough: shards are of one size
    with tqdm(total=total, unit="image", disable=None if state.is_main_process else True) as bar:
        loader = DataLoader(
            _Reader(shards.settings),
            batch_size=None,
            sampler=_jobs(images, shards.finished(), shard_size, bar),
            num_workers=num_workers,
            generator=torch.Generator(),  # not the global one
            worker_init_fn=_leave_signals_to_the_parent,
        )
        for shard, group in itertools.groupby(loader, key=lambda read: read.shard):
            shards.write(shard, encoder.encode(group, bar.update))


def _jobs(images: ImageRows, finished: set[str], shard_size: int, bar: tqdm) -> Iterator[_Job]:
    """The images of this process that are still to be read, shard after shard.

    Where shards begin and end depends on the image set alone, so that any number of processes gives the same ones.
    """
    state = PartialState()
    by_part = len(images.parts) >= PARTS_PER_PROCESS * state.num_processes
    for part, rows in enumerate(images.parts):
        if by_part and part % state.num_processes != state.process_index:
            continue
        for index, row in enumerate(rows):
            shard = _Shard(part, index // shard_size)
            if not by_part and sum(shard) % state.num_processes != state.process_index:
                continue
            if shard.file not in finished:
                yield _Job(shard, row)
                continue
            if not bar.disable:
                bar.initial += 1  # what an interrupted run did took no time of this one
            bar.update()


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal may reach all processes of a group; workers end with their parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _check_options(crops: str, resolution: int | None, batch_size: int, shard_size: int, num_workers: int) -> None:
    if crops not in CROPS:
        raise ValueError(f"`crops` must be one of {', '.join(CROPS)}, but is {crops!r}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("num_workers", num_workers, 0),
        *([] if resolution is None else [("resolution", resolution, 1)]),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    if is_whole(crops) != (resolution is None):
        raise ValueError(
            f"`resolution` is the side of crops in pixels, but is {resolution} for `crops` {crops!r}. "
            f"{'Give it' if resolution is None else 'Leave it out'}, or choose other crops."
        )
