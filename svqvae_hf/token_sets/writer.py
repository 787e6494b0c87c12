"""Makes a token set from an image set, part by part: ids in Parquet files, which `datasets` reads."""

import hashlib
import itertools
import json
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.files.folders import Folder
from svqvae_hf.files.outputs import check_new_folder, is_writable, scale_endings
from svqvae_hf.hub.repositories import check_repo_id, prepare_repo, push_output
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.crops import CROPS, is_whole
from svqvae_hf.token_sets.encoder import ImageCounts, RowEncoder
from svqvae_hf.token_sets.manifest import SKIPPED_FILE, join_parts, read_totals
from svqvae_hf.token_sets.reading import read_crops
from svqvae_hf.token_sets.records import OPTIONS_FILE, RECORDS, PartRecord, PartRecords, check_options
from svqvae_hf.token_sets.settings import SETTINGS_FILE, TokenSettings
from svqvae_hf.token_sets.shards import row_features, write_shards

IMAGES_PER_PART = 10_000  # by default, in sets with random access
MAX_PARTS = 1000  # by default


@dataclass(frozen=True)
class TokenizeReport:
    """Summary of a run; `str` formats it.

    Args:
        out (`str`): Folder of the set.
        complete (`bool`): Whether the set is complete. If so, the numbers are those of the set, otherwise of this run.
        parts (`int`): Number of parts.
        images (`int`): Number of images, including the skipped ones.
        rows (`int`): Number of rows.
        ids (`int`): Number of ids of all scales.
        files (`int`): Number of Parquet files.
        skipped (`int`): Number of images that could not be read.
        url (`str`, *optional*): URL of the commit on the Hub; `None` if the set was not pushed.
    """

    out: str
    complete: bool
    parts: int
    images: int
    rows: int
    ids: int
    files: int
    skipped: int
    url: str | None = None

    def __str__(self) -> str:
        counts = f"images: {self.images}, rows: {self.rows}, files: {self.files}"
        lines = [f"written  {self.out} ({counts if self.complete else f'parts: {self.parts}, {counts}'})"]
        if not self.complete:
            lines.append(f"waiting  for other parts, see svqvae tokenize --status {self.out}")
        elif self.skipped:
            lines.append(f"skipped  {self.out}/{SKIPPED_FILE} (unreadable images: {self.skipped})")
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


def tokenize_set(
    model: SVQVAE,
    images: ImageSet,
    out: str | os.PathLike,
    *,
    model_name: str,
    source_set: str | None = None,
    scales: Sequence[float] = (1.0,),
    scale_from: str = "latents",
    min_psnr: float | None = None,
    max_bits: float | None = None,
    crops: str = "whole",
    resolution: int | None = None,
    min_side: int | None = None,
    batch_size: int | None = None,
    shard_mb: float = 256,
    part: int | None = None,
    num_parts: int | None = None,
    num_workers: int = 0,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> TokenizeReport:
    """Makes a token set from an image set, or one part of it.

    The set is cut in parts, which depend on the image set and `num_parts` alone. Any number of processes on any number
    of machines may make parts of one set at the same time, and none waits for another. A part that is done is never
    read again. A part that was interrupted is made again by the next process. The process that finishes the last part
    completes the set. On devices of one kind, the files are the same however many processes took part.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode, on its device, with its tiling configured.
        images ([`ImageSet`]): Images from [`~svqvae_hf.data.image_sets.open_images`]. Unreadable ones are skipped and
            listed.
        out (`str` or `os.PathLike`): Folder to create, or its URL for `fsspec`, such as `s3://bucket/tokens`. It must
            be absent, empty, or a token set that was started with the same options.
        model_name (`str`): Hub id of the model, or the name of its folder, for the settings and the card.
        source_set (`str`, *optional*): Name of the image set on the Hub, for the card.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Output side over input side, one column of ids each.
        scale_from (`str`, defaults to `"latents"`): What is resized to a scale, see [`SVQVAE.forward`].
        min_psnr (`float`, *optional*): Target of [`encode_to_psnr`], which chooses one of the scales for each row.
        max_bits (`float`, *optional*): Target of [`encode_to_bits`], which chooses one of the scales for each row.
        crops (`str`, defaults to `"whole"`): Crops of an image that become rows, a key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.
        min_side (`int`, *optional*): Side in pixels below which an image is skipped like an unreadable one.
        batch_size (`int`, *optional*): Crops of equal size that are encoded together. With 1, the ids equal
            [`SVQVAE.encode_tokens`] of one image. With more, a few may differ, because sums are rounded differently.
            By default 64, or fewer if these have more than a megapixel in all.
        shard_mb (`float`, defaults to 256): Size of a Parquet file in megabytes, before compression.
        part (`int`, *optional*): Number of the part to make, from 0. By default all that are not done and that no
            other process is making.
        num_parts (`int`, *optional*): Number of parts, at most the number of images or, in a stream, of files. By
            default one per 10,000 images or per file, and at most 1,000.
        num_workers (`int`, defaults to 0): Processes that read and crop images; with 0, this process does.
        license (`str`, *optional*): Licence of the images, by the Hub's identifier, for the card.
        push_to_hub (`str`, *optional*): `org/name` on the Hub to upload the set to, once it is complete.
        private (`bool`, *optional*): Whether a new repository is private.

    Returns:
        [`TokenizeReport`]: Numbers of images, rows and files.

    Raises:
        OSError: `out` cannot be written, an image cannot be fetched, or the set cannot be pushed.
        ValueError: An option is out of range, or differs from the options that the set was started with; no image can
            be read; or an image needs more memory than is available.
    """
    _check_options(crops, resolution, min_side, batch_size, shard_mb, num_workers)
    num_parts = _choose_parts(images, part, num_parts)
    folder = check_out(out)
    _check_push(folder, push_to_hub, private)
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
        min_psnr=min_psnr,
        max_bits=max_bits,
    )
    features = row_features(settings, images.features)
    options = _options(
        settings,
        columns=features.to_dict(),
        images=images.length,
        image_set=images.fingerprint,
        parts=num_parts,
        min_side=min_side,
        batch_size=batch_size,
        shard_mb=shard_mb,
        dtype=str(model.dtype),
        device=model.device.type,
    )
    records = PartRecords(folder, num_parts, SETTINGS_FILE)
    if push_to_hub is not None and read_totals(folder) is None:
        prepare_repo(push_to_hub, private=private, license=license, repo_type="dataset")
    _start(folder, options)
    made: list[PartRecord] = []
    if read_totals(folder) is None:
        encoder = RowEncoder(model, settings, images.features, batch_size)
        maker = _PartMaker(images, records, encoder, features, options["fingerprint"], shard_mb, min_side, num_workers)
        made = maker.make(part)
        if records.gather(part or 0, options["fingerprint"]):
            name = push_to_hub or folder.path.rpartition("/")[2]
            try:
                join_parts(folder, records, settings, features, options, license, source_set, name)
            except OSError:
                if read_totals(folder) is None:  # otherwise another process has joined them at the same time
                    raise
    totals = read_totals(folder)
    if totals is None:
        return _partial_report(folder, made)
    url = push_output(Path(folder.path), push_to_hub, "Upload token set", repo_type="dataset") if push_to_hub else None
    return TokenizeReport(folder.url, True, num_parts, **totals, url=url)


@dataclass
class _PartMaker:
    """Makes parts of a token set."""

    images: ImageSet
    records: PartRecords
    encoder: RowEncoder
    features: datasets.Features
    fingerprint: str
    shard_mb: float
    min_side: int | None
    num_workers: int

    def make(self, part: int | None) -> list[PartRecord]:
        """Makes a part, or all that are not done and that no other process is making. Returns their records.

        Raises:
            Exception: A part failed. Raised once the others are made, or once two parts in a row have failed.
        """
        made: list[PartRecord] = []
        failure: Exception | None = None
        failed_before = False
        with tqdm(total=self.images.length if part is None else None, unit="image", disable=None) as bar:
            for number in self.records.to_do() if part is None else [part]:
                if not self.records.claim(number, anyway=part is not None):
                    continue
                try:
                    made += self._make_claimed(number, bar.update)
                except Exception as error:
                    traceback.clear_frames(error.__traceback__)  # which would keep batches and worker processes alive
                    failure = failure or error
                    if failed_before:
                        break
                    failed_before = True
                    continue
                failed_before = False
                self.records.gather(number, self.fingerprint)
        if failure is not None:
            raise failure
        return made

    def _make_claimed(self, part: int, on_image: Callable[[], object]) -> list[PartRecord]:
        """Makes a claimed part, and returns its record; none if another process was faster."""
        try:
            return self._make(part, on_image)
        except (KeyboardInterrupt, SystemExit):
            with suppress(OSError):
                self.records.release(part)
            raise
        except Exception as error:
            with suppress(OSError):
                if self.records.is_done(part):  # the other process has deleted our unfinished file
                    self.records.release(part)
                    return []
                self.records.fail(part, " ".join(str(error).split()))
            raise

    def _make(self, part: int, on_image: Callable[[], object]) -> list[PartRecord]:
        counts, settings = ImageCounts(), self.encoder.settings

        def count() -> None:
            on_image()
            self.records.beat(part, counts.images)

        shards = self.images.part(part, self.records.num_parts)
        rows = itertools.chain.from_iterable(shard.read() for shard in shards)
        read = read_crops(rows, settings.crops, settings.resolution, self.min_side, self.num_workers)
        encoded = self.encoder.encode(read, counts, count)
        files = []
        for file in write_shards(self.records.folder, part, encoded, settings, self.features, self.shard_mb):
            if self.records.is_done(part):
                self.records.release(part)
                return []
            files.append(file)
        record = PartRecord(
            part=part,
            options=self.fingerprint,
            read=[shard.name for shard in shards],
            images=counts.images,
            rows=sum(file["rows"] for file in files),
            ids=sum(file["ids"] for file in files),
            skipped=counts.skipped,
            files=[{name: file[name] for name in ("name", "rows")} for file in files],
        )
        self.records.finish(record)
        return [record]


def check_out(out: str | os.PathLike) -> Folder:
    """Raises unless a folder can become a token set: it is absent or empty, or a token set was started in it.

    Args:
        out (`str` or `os.PathLike`): Folder, or its URL for `fsspec`.

    Returns:
        [`Folder`]: The folder.

    Raises:
        OSError: The folder cannot be reached.
        ValueError: It has something else in it, or cannot be written.
    """
    folder = Folder(out)
    path = Path(folder.url.removeprefix("file://"))
    if (path.is_dir() or not folder.is_local) and _is_started(folder):
        return folder
    if not folder.is_local:
        if folder.names(""):
            raise ValueError(f"`{folder.url}` must be a new or empty folder, but it is not empty. Choose another.")
        return folder
    check_new_folder(path)
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not is_writable(nearest):
        raise ValueError(f"`{path}` must be a folder that can be written, but `{nearest}` cannot be. Choose another.")
    return folder


def _is_started(folder: Folder) -> bool:
    """Whether a token set was started in a folder, or another process is starting one right now."""
    if folder.names("") == {RECORDS} and all(name.startswith(".") for name in folder.names(RECORDS)):
        return True
    return any(folder.read(name) is not None for name in (SETTINGS_FILE, OPTIONS_FILE))


def _start(folder: Folder, options: Mapping[str, Any]) -> None:
    """Starts a token set, or raises if it was started with other options."""
    complete = folder.read(SETTINGS_FILE)
    recorded = complete and json.dumps(json.loads(complete).get("options", {})).encode()
    recorded = recorded or folder.read(OPTIONS_FILE)
    if recorded is None:
        folder.write(OPTIONS_FILE, json.dumps(options, indent=2).encode())
        recorded = folder.read(OPTIONS_FILE) or b"{}"  # perhaps of another process that has started it, too
    check_options(json.loads(recorded), options, folder.url)


def _partial_report(folder: Folder, made: Sequence[PartRecord]) -> TokenizeReport:
    return TokenizeReport(
        folder.url,
        False,
        len(made),
        sum(record.images for record in made),
        sum(record.rows for record in made),
        sum(record.ids for record in made),
        sum(len(record.files) for record in made),
        sum(len(record.skipped) for record in made),
    )


def _options(settings: TokenSettings, **others: Any) -> dict[str, Any]:
    """Options on which the files depend, and their fingerprint."""
    options = json.loads(json.dumps(json.loads(settings.to_json()) | others))
    return options | {"fingerprint": hashlib.sha256(json.dumps(options).encode()).hexdigest()}


def _choose_parts(images: ImageSet, part: int | None, num_parts: int | None) -> int:
    if part is not None and num_parts is None:
        raise ValueError(f"`part` needs `num_parts`, the same number for all parts, got {part} and None.")
    if num_parts is None:
        least = 1 if images.rows is None else IMAGES_PER_PART
        return min(MAX_PARTS, -(-images.max_parts // least))
    if not 1 <= num_parts <= images.max_parts:
        unit = "files" if images.rows is None else "images"
        raise ValueError(f"`num_parts` must be in [1, {images.max_parts}], the number of {unit}, got {num_parts}.")
    if part is not None and not 0 <= part < num_parts:
        raise ValueError(f"`part` must be in [0, {num_parts - 1}] for {num_parts} parts, got {part}.")
    return num_parts


def _check_push(folder: Folder, push_to_hub: str | None, private: bool | None) -> None:
    if push_to_hub is None:
        if private is not None:
            raise ValueError("`private` needs `push_to_hub`, got None. Pass `org/name`.")
        return
    check_repo_id(push_to_hub)
    if not folder.is_local:
        raise ValueError(
            f"`push_to_hub` needs a local folder, got `{folder.url}`. Upload the set once it is complete."
        )


def _check_options(
    crops: str,
    resolution: int | None,
    min_side: int | None,
    batch_size: int | None,
    shard_mb: float,
    num_workers: int,
) -> None:
    if crops not in CROPS:
        raise ValueError(f"`crops` must be one of {', '.join(CROPS)}, got {crops!r}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("resolution", resolution, 1),
        ("min_side", min_side, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if not 0 < shard_mb < math.inf:
        raise ValueError(f"`shard_mb` must be a number of megabytes above 0, got {shard_mb}.")
    if is_whole(crops) != (resolution is None):
        raise ValueError(
            f"`resolution` must be the side of the crops in pixels, got {resolution} for `crops` {crops!r}. "
            f"{'Pass it' if resolution is None else 'Leave it out'}, or choose other crops."
        )
