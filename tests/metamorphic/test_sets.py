"""Image sets and token sets under changes that must not matter, or must be an error of one line.

    METAMORPHIC=500 python -m pytest -s tests/metamorphic

Each case draws a kind of set and a change from a seed, which is printed.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from conftest import make_tiny
from numbered_images import encode, numbered, write_tar
from processes import start
from token_set_parts import content

from svqvae_hf.data.image_rows import read_image
from svqvae_hf.data.image_sets import ImageSet, open_images
from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.parts import describe_state
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.token_sequences import TokenSource

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
COUNT = int(os.environ.get("METAMORPHIC", "0"))  # cases of each test; 0: a sample of a few seconds
SECONDS = {"images": 3, "tokens": 5, "damage": 2}
SEED = int(os.environ.get("SEED", time.time()))
IMAGES = 12
CROPS = {"model_name": "tiny", "crops": "centre", "resolution": 16}


# Sets of twelve images


def write_folder(folder: Path, order: list[int]) -> None:
    for number in order:
        numbered(number).save(folder / f"{number:02}.png")


def write_classes(folder: Path, order: list[int]) -> None:
    for number in order:
        (folder / ("cat", "dog")[number % 2]).mkdir(exist_ok=True)
        numbered(number).save(folder / ("cat", "dog")[number % 2] / f"{number:02}.png")


def write_captions(folder: Path, order: list[int]) -> None:
    for half in (0, 1):
        (folder / f"half {half}").mkdir(exist_ok=True)
    lines: dict[int, list[str]] = {0: [], 1: []}
    for number in range(IMAGES):
        entry = {"file_name": f"{number:02}.png", "caption": f"image {number}"}
        lines[number % 2].append(json.dumps(entry))
    for number in order:
        numbered(number).save(folder / f"half {number % 2}" / f"{number:02}.png")
    for half in order[:2] if {order[0] % 2, order[1] % 2} == {0, 1} else (1, 0):
        (folder / f"half {half % 2}" / "metadata.jsonl").write_text("\n".join(lines[half % 2]))


def write_shards(folder: Path, order: list[int]) -> None:
    for shard in dict.fromkeys(number // 4 for number in order):
        members = []
        for number in range(4 * shard, 4 * shard + 4):
            members.append((f"{number:02}.png", encode(numbered(number))))
            members.append((f"{number:02}.txt", f"image {number}".encode()))
        write_tar(folder / f"{shard} [a..b].tar", members)


def write_parquet(folder: Path, order: list[int]) -> None:
    for shard in dict.fromkeys(number // 4 for number in order):
        numbers = range(4 * shard, 4 * shard + 4)
        images = [{"bytes": encode(numbered(number)), "path": f"{number:02}.png"} for number in numbers]
        rows = {"image": images, "caption": [f"image {number}" for number in numbers]}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{shard} [a..b].parquet")


KINDS = {
    "folder": write_folder,
    "classes": write_classes,
    "captions": write_captions,
    "tars": write_shards,
    "parquet": write_parquet,
}


def make_set(folder: Path, kind: str, rng: random.Random) -> Path:
    """Writes a set, its files in a random order."""
    folder.mkdir(parents=True)
    order = list(range(IMAGES))
    rng.shuffle(order)
    KINDS[kind](folder, order)
    return folder


def open_set(folder: Path, prefix: str = "", **options) -> ImageSet:
    return open_images([f"{prefix}{folder}"], **options)


def read_rows(images) -> list:
    return [(row.key, row.values, read_image(row).tobytes()) for row in images]


def assert_one_line(error: BaseException, name: str) -> None:
    assert "\n" not in str(error)
    assert name in str(error), error


# Changes of image sets: each checks that they do not matter, or are seen


def add_stray_files(folder: Path, kind: str, rng: random.Random) -> None:
    images = open_set(folder)
    before = read_rows(images)
    for name in rng.sample(["notes.txt", ".hidden.png", "Thumbs.db", "photo.jpg.part", "README.md", ".git/x.png"], 3):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"stray")
    assert read_rows(open_set(folder)) == before
    assert open_set(folder).fingerprint == images.fingerprint


def rename_the_folder(folder: Path, kind: str, rng: random.Random) -> None:
    images = open_set(folder)
    before = read_rows(images)
    fingerprint = images.fingerprint
    renamed = folder.with_name(rng.choice(["other", "a [b] *", "train test", "ünïcode"]))
    folder.rename(renamed)
    assert read_rows(open_set(renamed)) == before
    assert open_set(renamed).fingerprint == fingerprint


def write_in_another_order(folder: Path, kind: str, rng: random.Random) -> None:
    again = make_set(folder.with_name("again"), kind, rng)
    assert read_rows(open_set(again)) == read_rows(open_set(folder))


def open_by_url(folder: Path, kind: str, rng: random.Random) -> None:
    if kind == "captions":
        with pytest.raises(ValueError, match="has a metadata file, for images of one local folder"):
            open_set(folder, "file://")
        return
    assert read_rows(open_set(folder, "file://")) == read_rows(open_set(folder))


def open_by_a_copy(folder: Path, kind: str, rng: random.Random) -> None:
    assert read_rows(open_set(folder, copy=True)) == read_rows(open_set(folder))


def cut_in_parts(folder: Path, kind: str, rng: random.Random) -> None:
    images = open_set(folder)
    num_parts = rng.randint(1, images.max_parts)
    rows = []
    for number in range(num_parts):
        for part in images.part(number, num_parts):
            rows += read_rows(part.read())
    assert rows == read_rows(images)


def replace_a_file_by_an_older_one(folder: Path, kind: str, rng: random.Random) -> None:
    images = open_set(folder)
    fingerprint = images.fingerprint
    file = rng.choice(images.files.paths())
    older = rng.randint(0, os.stat(file).st_mtime_ns - 1)
    Path(file).write_bytes(Path(file).read_bytes())
    os.utime(file, ns=(older, older))
    assert open_set(folder).fingerprint != fingerprint


def move_a_file_out_of_its_split(folder: Path, kind: str, rng: random.Random) -> None:
    """As an image beside `train` and `test`."""
    suffix = Path(open_set(folder).files.paths()[0]).suffix
    above = folder.with_name("above")
    for split in ("train", "test"):
        shutil.copytree(folder, above / split)
    expected = read_rows(open_set(folder))
    assert read_rows(open_images([str(above)], split="train"))[0][1:] == expected[0][1:]
    stray = above / f"stray{suffix}"
    shutil.copy(open_set(folder).files.paths()[0], stray)
    with pytest.raises(ValueError, match="must (lie in|be of) its splits") as raised:
        open_images([str(above)], split="train")
    assert_one_line(raised.value, stray.name)


IMAGE_CHANGES = [
    add_stray_files,
    rename_the_folder,
    write_in_another_order,
    open_by_url,
    open_by_a_copy,
    cut_in_parts,
    replace_a_file_by_an_older_one,
    move_a_file_out_of_its_split,
]


# Changes of token sets


def tokenize(images: Path, out: Path, **options) -> None:
    tokenize_set(make_tiny(), open_images([str(images)]), out, **CROPS | {"num_parts": 3} | options)


def make_parts_in_any_order(images: Path, out: Path, rng: random.Random) -> None:
    parts = [0, 1, 2]
    rng.shuffle(parts)
    for part in parts:
        tokenize(images, out, parts=[part])


def kill_and_resume(images: Path, out: Path, rng: random.Random) -> None:
    process = start(tokenize, images, out)
    process.join(rng.uniform(0, 1.5))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    tokenize(images, out)


def run_twice_at_once(images: Path, out: Path, rng: random.Random) -> None:
    processes = [start(tokenize, images, out) for _ in range(2)]
    for process in processes:
        process.join()
    tokenize(images, out)
    assert [process.exitcode for process in processes] == [0, 0]


def run_beside_other_options(images: Path, out: Path, rng: random.Random) -> None:
    tokenize(images, out, parts=[rng.randint(0, 2)])
    changes = [{"resolution": 24}, {"scales": [0.5]}, {"batch_size": 3}, {"num_parts": 2}, {"crops": "ten-crop"}]
    with pytest.raises(ValueError, match="must be continued with the same images and options") as raised:
        tokenize(images, out, **rng.choice(changes))
    assert_one_line(raised.value, str(out))
    tokenize(images, out)


def replace_an_image(images: Path, out: Path, rng: random.Random) -> None:
    tokenize(images, out, parts=[0])
    file = Path(rng.choice(open_images([str(images)]).files.paths()))
    before = file.read_bytes(), file.stat().st_mtime_ns
    file.write_bytes(before[0])
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="same images, but names, sizes or times of change of their files"):
        tokenize(images, out)
    os.utime(file, ns=(before[1], before[1]))
    tokenize(images, out)


def lose_a_file(images: Path, out: Path, rng: random.Random) -> None:
    tokenize(images, out, parts=[0, 1])
    file = rng.choice(sorted(out.rglob("*.parquet")))
    if rng.random() < 0.5:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: rng.randint(0, 99)])
    tokenize(images, out)


def use_workers(images: Path, out: Path, rng: random.Random) -> None:
    tokenize(images, out, num_workers=rng.randint(1, 2))


def add_stray_files(images: Path, out: Path, rng: random.Random) -> None:
    (out / "data").mkdir(parents=True)
    tokenize(images, out.with_name("first"), parts=[1])
    shutil.copytree(out.with_name("first"), out, dirs_exist_ok=True)
    strays = [out / rng.choice(["notes.txt", ".DS_Store"]), out / "data" / rng.choice(["Thumbs.db", ".DS_Store"])]
    for path in strays:
        path.write_bytes(b"stray")
    tokenize(images, out)
    assert read_set(out)
    for path in strays:
        path.unlink()  # a set never deletes them


def start_over(images: Path, out: Path, rng: random.Random) -> None:
    tokenize(images, out, num_parts=2, resolution=24)
    tokenize(images, out, overwrite=True)


TOKEN_CHANGES = [
    make_parts_in_any_order,
    kill_and_resume,
    run_twice_at_once,
    run_beside_other_options,
    replace_an_image,
    lose_a_file,
    use_workers,
    add_stray_files,
    start_over,
]


def read_set(folder: Path) -> list:
    return list(TokenSet(folder).rows())


def spoil(folder: Path, rng: random.Random) -> str:
    """Damages a complete set. Returns the name of the file that the error must name."""
    files = sorted(folder.rglob("*.parquet")) + [folder / "manifest.jsonl"]
    file = rng.choice(files)
    kind = rng.choice(["delete", "empty", "halve", "swap", "flip", "add"])
    if kind == "delete":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "halve":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "flip":
        damaged = bytearray(file.read_bytes())
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
    elif kind == "swap":
        other = rng.choice([each for each in files if each != file])
        contents = file.read_bytes(), other.read_bytes()
        file.write_bytes(contents[1])
        other.write_bytes(contents[0])
    else:
        shutil.copy(files[0], folder / "data" / "0000-0000" / "train-0000009-00000.parquet")
    return kind


# The tests


def cases(kind: str, count: int) -> Iterator[int]:
    """Numbers of the cases: as many as are asked for, or for the seconds of a sample."""
    note(f"SEED={SEED} METAMORPHIC={COUNT}")
    end = time.monotonic() + SECONDS[kind]
    if COUNT:
        yield from range(count)
        return
    for case in itertools.count():
        if time.monotonic() > end:
            return
        yield case


def note(text: str) -> None:
    """Prints a line, which pytest shows if the test fails."""
    sys.stdout.write(f"{text}\n")


@pytest.fixture(scope="module")
def made_sets(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """An image set of each kind, and the token set that is made of it at once."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    sets = {}
    for kind in KINDS:
        images = make_set(folder / kind, kind, rng)
        tokenize(images, folder / f"{kind}-tokens" / "out")
        sets[kind] = images, folder / f"{kind}-tokens" / "out"
    return sets


def test_image_sets(tmp_path):
    rng = random.Random(SEED)
    for case in cases("images", COUNT):
        kind = rng.choice(list(KINDS))
        change = rng.choice(IMAGE_CHANGES)
        note(f"image sets, case {case}: {kind}, {change.__name__}")
        folder = make_set(tmp_path / str(case) / "set", kind, rng)
        change(folder, kind, rng)
        shutil.rmtree(tmp_path / str(case))


def test_token_sets(tmp_path, made_sets):
    rng = random.Random(SEED)
    for case in cases("tokens", COUNT // 4):
        kind = rng.choice(list(KINDS))
        change = rng.choice(TOKEN_CHANGES)
        note(f"token sets, case {case}: {kind}, {change.__name__}")
        images, expected = made_sets[kind]
        out = tmp_path / str(case) / "out"
        change(images, out, rng)
        assert content(out) == content(expected)
        shutil.rmtree(tmp_path / str(case))


def test_damaged_token_sets(tmp_path, made_sets):
    rng = random.Random(SEED)
    readers = {
        "decode": lambda folder: detokenize_set(make_tiny(), folder, tmp_path / "images", max_images=1000),
        "train": lambda folder: TokenSource(str(folder), None),
        "rows": read_set,
        "resume": None,
    }
    for case in cases("damage", COUNT):
        kind = rng.choice(list(KINDS))
        images, expected = made_sets[kind]
        folder = tmp_path / str(case) / "out"
        shutil.copytree(expected, folder)
        damage = spoil(folder, rng)
        name = rng.choice(list(readers))
        note(f"damaged token sets, case {case}: {kind}, {damage}, {name}")
        before = content(folder)
        if content(folder) == content(expected):
            continue
        if name == "resume":
            _check_resume(images, folder)
        elif damage == "add" and name == "rows":
            assert read_set(folder) == read_set(expected)  # what no manifest names is not read
        else:
            with pytest.raises((ValueError, OSError)) as raised:
                readers[name](folder)
            assert_one_line(raised.value, str(folder))
        assert content(folder) == before
        shutil.rmtree(tmp_path / str(case))


def _check_resume(images: Path, folder: Path) -> None:
    """Resuming a complete set names a damaged file, or finds all files of the sizes that the manifest names."""
    try:
        tokenize(images, folder)
    except (ValueError, OSError) as error:
        assert_one_line(error, str(folder))
        return
    assert "complete" in describe_state(folder)["parts"]
