"""Crops of a `datasets` image set, the same ones for the same seed whatever happened before."""

import glob
import itertools
import math
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from svqvae_hf.data.image_sets import disable_decoding, read_image
from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES, SVQVAEImageProcessor

FORMATS = ("webdataset", "parquet")  # names of loaders, not of image sets: they need files
CENTRE = (0.5, 0.5)
READ_AHEAD = 64  # encoded images of a stream in memory at least, to replace unreadable ones
MAX_IN_A_ROW = 1000  # unreadable images, before the image set is given up
SIDE, CROP, ORDER, BLOCK = range(4)  # what a random choice is for


@dataclass(frozen=True)
class CropPolicy:
    """How crops are cut. All crops of a batch have one side; the sides take turns at random.

    Args:
        sides (`Sequence[int]`): Sides in pixels; the largest is a multiple of each.
        batch_size (`int`): Crops of the largest side in a batch of one process. A batch of a smaller side has as many
            pixels.
        center_crop (`bool`): Cut from the centre, not at random places.
        random_flip (`bool`): Flip half of the crops, left to right.
        resize_range (`tuple[float, float]`): Range of the random factor that resizes an image before its crop, as far
            as the image still holds it. A smaller image is enlarged to hold it.
    """

    sides: Sequence[int]
    batch_size: int
    center_crop: bool
    random_flip: bool
    resize_range: tuple[float, float]


@dataclass(frozen=True)
class CropBatch:
    """Crops of one side.

    Args:
        sample (`torch.Tensor` of shape `(batch, 3, side, side)`): Crops in the loader's `pixel_range`, float32.
        labels (`list`): Value of the label column of each crop's image; None where the set was loaded without one.
        unreadable (`list[str]`): Names of the images that could not be read and were replaced by the next ones.
        num_read (`int`): Images tried, the unreadable ones too.
    """

    sample: torch.Tensor
    labels: list[Any]
    unreadable: list[str]
    num_read: int


class Encoded(NamedTuple):
    """An image as it is stored; `content` is None if `name` is a file that holds it, on disk or remote."""

    name: str
    content: bytes | None
    label: Any


class Crop(NamedTuple):
    """A crop `(3, side, side)`, and the label of its image."""

    pixels: torch.Tensor
    label: Any


class Job(NamedTuple):
    """A batch to cut: rows of a map-style set or images of a stream, and the seed of each."""

    side: int
    items: list[int] | list[Encoded]
    seeds: list[tuple[int, ...]]


def load_images(
    dataset_name: str | None,
    dataset_config_name: str | None,
    data_files: Sequence[str],
    train_data_dir: str | None,
    image_column: str,
    split: str,
    streaming: bool,
    label_column: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads an image set as one column of images that are not decoded yet, and one of labels if asked for.

    Args:
        dataset_name (`str`, *optional*): Image set on the Hub, a local one, or the format of `data_files`, such as
            `webdataset` or `parquet`.
        dataset_config_name (`str`, *optional*): Its configuration.
        data_files (`Sequence[str]`): Its files, or globs of them; all if empty.
        train_data_dir (`str`, *optional*): Folder of images, searched through except for hidden files; instead of all
            of the above and `split`.
        image_column (`str`): Column that holds the images; `"image"` in a folder.
        split (`str`): Split of the image set.
        streaming (`bool`): Give a stream, which is read from the files as it goes, without a copy on disk.
        label_column (`str`, *optional*): Column that holds the labels or captions. In a folder, `"label"` is the name
            of the folder that an image is in.

    Raises:
        ValueError: If there is no such set, folder, file or column, or no image in it, or both columns are one.
    """
    if train_data_dir is not None:
        images = _load_folder(train_data_dir)
        images = images.to_iterable_dataset() if streaming else images
    else:
        images = _load_set(dataset_name, dataset_config_name, list(data_files), split, streaming)
    if image_column not in (images.column_names or []):
        raise ValueError(f"`--image_column` must be one of {images.column_names}, but is {image_column!r}.")
    feature = images.features[image_column]
    if not (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        or (isinstance(feature, dict) and "bytes" in feature)
    ):
        raise ValueError(f"`--image_column` must hold images, but {image_column!r} holds {feature}.")
    if label_column is not None and label_column not in images.column_names:
        raise ValueError(f"`--label_column` must be one of {images.column_names}, but is {label_column!r}.")
    if label_column == image_column:
        raise ValueError(f"`--label_column` must be another than `--image_column`, but both are {image_column!r}.")
    columns = [image_column] if label_column is None else [image_column, label_column]
    return disable_decoding(images.select_columns(columns), image_column)


def _load_folder(folder: str) -> datasets.Dataset:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder!r} must be a folder of images, but is none.")
    names = glob.glob("**", root_dir=folder, recursive=True)
    paths = [str(Path(folder, name).absolute()) for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)]
    if not paths:
        raise ValueError(f"The folder {folder!r} must hold images ({', '.join(IMAGE_SUFFIXES)}), but has none.")
    labels = [Path(path).parent.relative_to(Path(folder).absolute()).as_posix() for path in paths]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=sorted(set(labels)))}
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=datasets.Features(features))


def _load_set(
    name: str | None, config_name: str | None, data_files: list[str], split: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if name in FORMATS and not data_files:
        raise ValueError(f"`--dataset_name {name}` needs `--data_files`: its files, or globs of them.")
    files = {split: data_files} if data_files else None
    try:
        images = datasets.load_dataset(name, config_name, data_files=files, split=split, streaming=streaming)
    except IndexError as error:  # what webdataset and Parquet make of a glob without a match
        raise ValueError(f"`--data_files` must name files that exist, but {data_files} match none.") from error
    except Exception as error:  # of datasets, its readers of files, or the network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"The image set {name!r} cannot be loaded: {reason}") from error
    if not streaming and len(images) == 0:
        raise ValueError(f"The image set {name!r} must hold images, but its split {split!r} has none.")
    return images


class CropLoader:
    """Batches of crops, read ahead by worker processes.

    A batch depends on the image set, the policy, the seed, the process and its number alone, not on workers or global
    random states. In the same batch, all processes have crops of the same side. In a pass over the set, no two of them
    see the same image, and each image is seen once, in a new order each pass. An image that cannot be read is replaced
    by the next one of the process that can be, which is seen once more.

    A stream is split between processes by shards if their number is a multiple of that of the processes; else each
    process skips the images of the others. It is read in the main process and shuffled `shuffle_buffer` images at a
    time.

    Iterating goes on after the last batch that was given, as does a loader that loads that one's state.

    Args:
        images (`datasets.Dataset` or `datasets.IterableDataset`): From [`load_images`].
        policy ([`CropPolicy`]): How crops are cut.
        pixel_range (`tuple[float, float]`): Values of black and white.
        seed (`int`): Seed of the order, the sides, the places, the factors and the flips.
        num_workers (`int`): Processes that cut crops; 0: this one.
        process_index (`int`): This process of the training.
        num_processes (`int`): Processes that share the set.
        num_batches (`int`): Batches in all, with those before the state that is loaded.
        shuffle_buffer (`int`, defaults to 1000): Images of a stream that are shuffled at a time.
    """

    def __init__(
        self,
        images: datasets.Dataset | datasets.IterableDataset,
        policy: CropPolicy,
        pixel_range: tuple[float, float],
        *,
        seed: int,
        num_workers: int,
        process_index: int,
        num_processes: int,
        num_batches: int,
        shuffle_buffer: int = 1000,
    ):
        self.images = images
        self.policy = policy
        self.seed = seed
        self.num_workers = num_workers
        self.process_index = process_index
        self.num_processes = num_processes
        self.num_batches = num_batches
        self.shuffle_buffer = shuffle_buffer
        streaming = isinstance(images, datasets.IterableDataset)
        self.cutter = Cutter(None if streaming else images, policy, pixel_range)
        self.order = {
            "seed": seed,
            "streaming": streaming,
            "shuffle_buffer": shuffle_buffer if streaming else None,
            "num_shards": images.num_shards if streaming else None,
            "num_rows": None if streaming else len(images),
        }
        self.batch = 0
        self.reader_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was given: numbers, strings and dictionaries, small."""
        return deepcopy({"order": self.order, "batch": self.batch, "reader": self.reader_state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the place from which iterating goes on.

        Raises:
            ValueError: If the loader whose state it is gave images in another order, or its set had another number of
                rows, or of shards in a stream.
        """
        for name, value in self.order.items():
            if state["order"][name] != value:
                raise ValueError(
                    f"`{name}` must be {state['order'][name]} as when the state was saved, but is {value}."
                )
        self.batch, self.reader_state = state["batch"], deepcopy(state["reader"])

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the batches that are left.

        Raises:
            ValueError: If 1000 images in a row cannot be read, or a process gets none.
        """
        pending: deque[tuple[Job, Iterator[Any], dict[str, Any]]] = deque()
        loader = DataLoader(
            self.cutter,
            batch_size=None,
            sampler=self._jobs(pending),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # not the global one
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
        )
        for sample, labels, failed in loader:
            job, spares, reader_state = pending.popleft()
            unreadable = [name for _, name in failed]
            for slot, _ in failed:
                sample[slot], labels[slot] = self._replacement(job, slot, spares, unreadable)
            self.batch, self.reader_state = self.batch + 1, reader_state
            # Each slot in `failed`, and each later failure, took one more try.
            yield CropBatch(sample, labels, unreadable, num_read=len(job.items) + len(unreadable))

    def _jobs(self, pending: deque[tuple[Job, Iterator[Any], dict[str, Any]]]) -> Iterator[Job]:
        """Gives the jobs to the workers, and keeps what the batch needs when it comes back."""
        reader = self._reader()
        for batch in range(self.batch, self.num_batches):
            side = int(np.random.default_rng((SIDE, self.seed, batch)).choice(self.policy.sides))
            count = self.policy.batch_size * (max(self.policy.sides) // side) ** 2
            seeds = [(CROP, self.seed, batch, slot * self.num_processes + self.process_index) for slot in range(count)]
            job = Job(side, [reader.take() for _ in range(count)], seeds)
            pending.append((job, reader.spares(), reader.state()))
            yield job

    def _reader(self) -> "RowReader | StreamReader":
        if not self.order["streaming"]:
            return RowReader(len(self.images), self.seed, self.process_index, self.num_processes, self.reader_state)
        images = self.images
        if self.num_processes > 1:
            images = split_dataset_by_node(images, self.process_index, self.num_processes)
        # A copy: where a stream is read is kept in it, and loaders may share one.
        return StreamReader(deepcopy(images), self.seed, self.shuffle_buffer, self.reader_state)

    def _replacement(self, job: Job, slot: int, spares: Iterator[Any], unreadable: list[str]) -> Crop:
        for spare in itertools.islice(spares, MAX_IN_A_ROW):
            crop = self.cutter.cut(spare, job.side, job.seeds[slot])
            if isinstance(crop, Crop):
                return crop
            unreadable.append(crop)
        raise ValueError(
            f"The image set must hold images that can be read, but {MAX_IN_A_ROW} in a row cannot be, the last one "
            f"`{unreadable[-1]}`."
        )


class RowReader:
    """Rows of a map-style set for one process: every `num_processes`-th of the order of all passes."""

    def __init__(
        self, num_rows: int, seed: int, process_index: int, num_processes: int, state: Mapping[str, int] | None
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.num_processes = num_processes
        self.position = state["position"] if state else process_index

    def take(self) -> int:
        """The next row."""
        row = self._row(self.position)
        self.position += self.num_processes
        return row

    def spares(self) -> Iterator[int]:
        """The rows that come next, without end, which are not taken."""
        return map(self._row, itertools.count(self.position, self.num_processes))

    def state(self) -> dict[str, int]:
        """For a new reader that goes on from here."""
        return {"position": self.position}

    def _row(self, position: int) -> int:
        index, offset = divmod(position, self.num_rows)
        return int(row_order(self.num_rows, self.seed, index)[offset])


@lru_cache(maxsize=2)
def row_order(num_rows: int, seed: int, index: int) -> np.ndarray:
    """The order of `num_rows` rows in pass `index`."""
    return np.random.default_rng((ORDER, seed, index)).permutation(num_rows)


class Streamed(NamedTuple):
    """An image of a stream; `start` is where it is, if a block begins with it."""

    image: Encoded
    index: int  # of the pass
    start: dict[str, Any] | None


class StreamReader:
    """Images of a stream for one process, shuffled by blocks that do not reach over the end of a pass.

    For each image that is taken the next one is read, so that reading is even.
    """

    def __init__(
        self, images: datasets.IterableDataset, seed: int, shuffle_buffer: int, state: Mapping[str, Any] | None
    ):
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.source = self._read(images, **(state["start"] if state else {"index": 0, "position": 0, "source": None}))
        self.ahead = deque(itertools.islice(self.source, max(shuffle_buffer, READ_AHEAD)))
        self.block: list[Encoded] = []
        self.start = self.ahead[0].start
        self.taken = 0
        for _ in range(state["taken"] if state else 0):
            self.take()

    def take(self) -> Encoded:
        """The next image."""
        if not self.block:
            self._begin_block()
        self.ahead.append(next(self.source))
        self.taken += 1
        return self.block.pop()

    def spares(self) -> Iterator[Encoded]:
        """The images that come next and are in memory, again and again, which are not taken."""
        return itertools.cycle([*reversed(self.block), *(each.image for each in self.ahead)])

    def state(self) -> dict[str, Any]:
        """For a new reader that goes on from here."""
        return {"start": self.start, "taken": self.taken}

    def _begin_block(self) -> None:
        self.start, self.taken = self.ahead[0].start, 0
        index = self.ahead[0].index
        while len(self.block) < self.shuffle_buffer and self.ahead and self.ahead[0].index == index:
            self.block.append(self.ahead.popleft().image)
        np.random.default_rng((BLOCK, self.seed, index, self.start["position"])).shuffle(self.block)

    def _read(
        self, images: datasets.IterableDataset, index: int, position: int, source: dict[str, Any] | None
    ) -> Iterator[Streamed]:
        """The images of pass after pass, from a position on."""
        while True:
            # The epoch seeds the order of shards, which is the same in all processes; at epoch 0 there is none.
            images.set_epoch(int(np.random.default_rng((ORDER, self.seed, index)).integers(1, 2**62)))
            images.load_state_dict(source)
            rows = iter(images)
            while True:
                start = None
                if position % self.shuffle_buffer == 0:
                    start = {"index": index, "position": position, "source": images.state_dict() if position else None}
                row = next(rows, None)
                if row is None:
                    break
                yield Streamed(_encoded(row, f"image {position} of pass {index}"), index, start)
                position += 1
            if position == 0:
                raise ValueError(
                    "Each process must get images of the stream, but one gets none. Start fewer processes."
                )
            index, position, source = index + 1, 0, None


class Cutter(TorchDataset):
    """Cuts the crops of a job, in whatever process.

    Args:
        images (`datasets.Dataset`, *optional*): The map-style set; a stream's images come with the job.
        policy ([`CropPolicy`]): How crops are cut.
        pixel_range (`tuple[float, float]`): Values of black and white.
    """

    def __init__(self, images: datasets.Dataset | None, policy: CropPolicy, pixel_range: tuple[float, float]):
        self.images = images
        self.policy = policy
        self.processor = SVQVAEImageProcessor(pixel_range=pixel_range)

    def __getitem__(self, job: Job) -> tuple[torch.Tensor, list[Any], list[tuple[int, str]]]:
        """Crops `(batch, 3, side, side)`, their labels; slots of those whose image cannot be read, with its name."""
        sample = torch.zeros(len(job.items), 3, job.side, job.side)
        labels: list[Any] = [None] * len(job.items)
        failed = []
        for slot, (item, seed) in enumerate(zip(job.items, job.seeds, strict=True)):
            crop = self.cut(item, job.side, seed)
            if isinstance(crop, Crop):
                sample[slot], labels[slot] = crop
            else:
                failed.append((slot, crop))
        return sample, labels, failed

    def cut(self, item: int | Encoded, side: int, seed: tuple[int, ...]) -> Crop | str:
        """A crop, or the name of an image that cannot be read."""
        if self.images is not None:
            item = _encoded(self.images[item], f"row {item}")
        try:
            image = _read_image(item)
        except (OSError, ValueError):
            return item.name
        rng = np.random.default_rng(seed)
        factor, place, flip = rng.uniform(*self.policy.resize_range), rng.random(2), rng.random() < 0.5
        crop = _crop(image, side, factor, CENTRE if self.policy.center_crop else place)
        if flip and self.policy.random_flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return Crop(self.processor.preprocess(crop)["pixel_values"][0], item.label)


def centre_crops(
    images: datasets.Dataset | datasets.IterableDataset, count: int, side: int, pixel_range: tuple[float, float]
) -> torch.Tensor:
    """Cuts the centres of the first images that can be read.

    Args:
        images (`datasets.Dataset` or `datasets.IterableDataset`): From [`load_images`].
        count (`int`): Crops to cut, or fewer if there are not as many images.
        side (`int`): Side in pixels. A smaller image is enlarged to hold it.
        pixel_range (`tuple[float, float]`): Values of black and white.

    Returns:
        `torch.Tensor` of shape `(count, 3, side, side)` in `pixel_range`.

    Raises:
        ValueError: If no image can be read.
    """
    crops = []
    for index, row in enumerate(images):
        try:
            crops.append(_crop(_read_image(_encoded(row, f"image {index}")), side, 1.0, CENTRE))
        except (OSError, ValueError):
            continue
        if len(crops) == count:
            break
    if not crops:
        raise ValueError("The validation images must hold one at least that can be read, but hold none.")
    return SVQVAEImageProcessor(pixel_range=pixel_range).preprocess(crops)["pixel_values"]


def _encoded(row: Mapping[str, Any], name: str) -> Encoded:
    """A row of an image, which may be empty, and its label if there are any; `name` is for one without a path."""
    value, *labels = row.values()
    path, content = (value["path"], value["bytes"]) if value else (None, None)
    return Encoded(path or name, b"" if path is None and content is None else content, *(labels or [None]))


def _read_image(encoded: Encoded) -> Image.Image:
    return read_image({"path": encoded.name, "bytes": encoded.content})


def _crop(image: Image.Image, side: int, factor: float, place: Sequence[float]) -> Image.Image:
    """A square of an image resized by `factor`, at `place`: 0 is left or top, 1 right or bottom."""
    span = min(side / factor, *image.size)  # pixels of the image that the crop covers
    if span == side:
        left, top = (math.floor(at * (length - side + 1)) for at, length in zip(place, image.size, strict=True))
        return image.crop((left, top, left + side, top + side))
    left, top = (at * (length - span) for at, length in zip(place, image.size, strict=True))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + span, top + span))


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A signal may reach all processes of a group; workers go on so that the trainer can save, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
