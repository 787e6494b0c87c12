"""The blocks of the pages on token sets and image sets that need a set of their own run as printed."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from cli_runner import svqvae
from conftest import ROOT
from PIL import Image
from token_set_parts import content, save_photos, tokenize

from svqvae_cli.command_line import parse
from svqvae_hf.token_sets.manifest import TokenSet

CROPS = {"crops": "centre", "resolution": 16, "scales": [1.0]}


@pytest.fixture
def shell(tmp_path):
    """Runs a command in a folder, with this package as `svqvae`. Returns what it prints."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "svqvae"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m svqvae_cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "work").mkdir()
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(block, exit_code=0):
        result = subprocess.run(
            ["bash", "-c", block], cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == exit_code, result.stderr
        return result.stdout

    return run


@pytest.fixture
def work(tmp_path, shell):
    return tmp_path / "work"


def blocks(page, title, language="bash"):
    """Blocks of a section of a page."""
    text = (ROOT / "docs" / page).read_text()
    section = re.search(rf"^#+ {title}\n.*?(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run_line(line):
    """Runs a line of `svqvae` in this process, which starts faster. Returns the exit code."""
    name, *arguments = shlex.split(line)
    assert name == "svqvae"
    return svqvae(*arguments)


@pytest.mark.slow
def test_a_lost_file_is_repaired_as_the_page_says(work, shell, monkeypatch):
    monkeypatch.chdir(work)
    save_photos(work / "photos")
    for number in range(2):
        (work / "photos" / f"more{number}.png").write_bytes((work / "photos" / "0.png").read_bytes())
    keep, repair = blocks("token_sets.md", "Repair a file")
    repair = repair.replace("--resolution 256", "--resolution 16 --workers 0")  # no processes to start
    make_part, copy, check = repair.splitlines()
    make = make_part.replace("repaired", "tokens").replace(" --part 2", "")
    assert run_line(make) == 1  # one image is broken
    shell(keep)
    assert {path.name for path in (work / "backup").iterdir()} >= {"manifest.jsonl", "svqvae_tokens.json"}
    before = content(work / "tokens")
    (work / "tokens" / "svqvae_tokens.json").unlink()
    assert run_line(make) == 1
    assert content(work / "tokens") == before
    (work / "tokens/data/0000-0000/train-0000002-00000.parquet").unlink()
    assert run_line(check) == 2
    assert run_line(make_part) == 0
    shell(copy)
    assert run_line(check) == 0
    assert content(work / "tokens") == before


@pytest.mark.slow
def test_a_script_waits_for_the_set_as_the_page_says(work, shell, tiny_model):
    save_photos(work / "photos")
    tokenize(tiny_model, work / "photos", work / "tokens", num_parts=2, parts=[0], **CROPS)
    (block,) = blocks("token_sets.md", "Check a whole set")
    first_loop, second_loop = block.splitlines()
    waiting = "sleep() { exit 3; }; "  # ends the script when it would wait
    for loop in (first_loop, second_loop):
        shell(waiting + loop, exit_code=3)
    tokenize(tiny_model, work / "photos", work / "tokens", num_parts=2, **CROPS)
    for loop in (first_loop, second_loop):
        shell(waiting + loop)


def test_a_flipped_byte_is_found_as_the_page_says(work, tiny_model, monkeypatch):
    save_photos(work / "photos")
    tokenize(tiny_model, work / "photos", work / "tokens", **CROPS)
    monkeypatch.chdir(work)
    (code,) = blocks("token_sets.md", "Check a whole set", "python")
    exec(code, {})
    (file,) = (work / "tokens").rglob("*.parquet")
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="train-0000000-00000.parquet` must be the file that the manifest .* part 0 "):
        exec(code, {})


def test_a_lost_photograph_is_found_and_replaced_as_the_page_says(work, shell, tiny_model):
    photos = save_photos(work / "photos")
    list_files, compare, find_changed, replace = blocks("token_sets.md", "A photograph that is lost or modified")
    shell(list_files)
    tokenize(tiny_model, photos, work / "tokens", num_parts=3, parts=[0], **CROPS)
    assert shell(compare) == ""
    name, size, time = shell("grep '5.png' photos.txt").split()
    (photos / "5.png").unlink()
    os.utime(photos / "1.png")
    lines = shell(compare, exit_code=1).splitlines()
    assert [line.split()[:2] for line in lines if line[0] in "<>"] == [
        ["<", "photos/1.png"],
        [">", "photos/1.png"],
        ["<", "photos/5.png"],
    ]
    assert shell(find_changed).split() == ["photos", "photos/1.png"]
    for line in lines:
        if line.startswith("< "):
            name, size, time = line.removeprefix("< ").split()
            shell(replace.replace("photos/a.jpg", name).replace("SIZE", size).replace("TIME", time))
    assert shell(compare) == ""
    report = tokenize(tiny_model, photos, work / "tokens", num_parts=3, **CROPS)
    assert (report.complete, report.resumed, report.images) == (True, 1, 7)
    assert '"key": "5.png"' in (work / "tokens" / "skipped.jsonl").read_text()
    keys = [row["key"] for row in TokenSet(work / "tokens").read_columns(["key"])]
    assert "1.png" in keys  # its part was finished before


def test_the_measurement_of_large_sets_parses_and_makes_its_folder(work, shell):
    (work / "PHOTO.jpg").write_bytes(b"photo")
    (block,) = [block for block in blocks("large_sets.md", "What to run where") if "many" in block]
    _, memory, make_folder, start = block.splitlines()
    shell(make_folder.replace("0..999", "0..4").replace("0..99", "0..1"))
    assert len(list((work / "many").rglob("*.jpg"))) == 10
    for command in (memory, start):
        words = command.partition("svqvae ")[2].split()
        assert parse(words).workers == 0


def pictures(folder):
    """Paths of the pictures below a folder, relative to this folder."""
    return {path.relative_to(folder) for path in folder.rglob("*.png")}


@pytest.mark.parametrize("root", ["photos", "links"])
def test_photographs_of_each_class_are_held_out_as_the_page_says(work, shell, root):
    photos = work / "photos" / "train"
    save_photos(photos / "2023")
    save_photos(photos / "a 'year'" / "may")  # photographs with the same names
    (photos / "2023" / "metadata.jsonl").write_text("")
    photographs = pictures(photos)
    hold_out, _, make_links = blocks("one_gpu_one_day.md", "The set")
    if root == "links":
        shell(make_links.replace("/shared/photos", str(photos)))
    shell(hold_out.replace("photos/", f"{root}/").replace("< 50", "< 2"))
    held_out = pictures(work / root / "held_out")
    assert len(held_out) == 4
    assert len({path.parent for path in held_out}) == 2
    assert pictures(work / root / "train") == photographs - held_out
    if root == "links":
        assert pictures(photos) == photographs
        assert all(path.is_symlink() for path in (work / "links" / "held_out").rglob("*.png"))


def test_photographs_without_classes_are_held_out_as_the_page_says(work, shell):
    train = work / "photos" / "train"
    save_photos(train / "2023")
    save_photos(train / "a 'year'" / "may")
    photographs = pictures(train)
    hold_out, find, _ = blocks("one_gpu_one_day.md", "The set")
    before, after = hold_out.split("find", 1)
    after = after.partition("held_out.txt\n")[2]
    shell(before + find.replace("5000", "9") + after)
    held_out = pictures(work / "photos" / "held_out")
    assert len(held_out) == 9
    assert pictures(train) == photographs - held_out


def test_large_photographs_are_shrunk_as_the_page_says(work, monkeypatch):
    folder = work / "photos" / "a" / "b"
    folder.mkdir(parents=True)
    sideways = Image.Exif()
    sideways[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (1501, 700)).save(folder / "large.JPG", "JPEG")
    Image.new("RGB", (1501, 700)).save(folder / "sideways.jpg", exif=sideways)
    Image.new("RGB", (40, 30)).save(folder / "small.jpeg")
    (folder / "broken.jpg").write_bytes(b"broken")
    Image.new("RGB", (3000, 2000)).save(folder / "panorama.jpg")
    Image.new("RGBA", (700, 600)).save(folder / "transparent.jpg", "PNG")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 2_500_000)  # more than twice as many are an error
    monkeypatch.chdir(work)
    code = blocks("large_sets.md", "Photographs of a camera: shrink them first", "python")[0]
    for machine in ("0, 2", "1, 2", "0, 1"):  # the last run finds nothing to do
        exec(code.replace("MACHINE, MACHINES = 0, 1", f"MACHINE, MACHINES = {machine}"), {})
    copy = work / "small" / "a" / "b" / "transparent.jpg"
    assert copy.read_bytes() == (folder / "transparent.jpg").read_bytes()
    copy.unlink()
    sizes = {}
    for path in (work / "small" / "a" / "b").iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
    assert sizes == {"large.JPG": (1098, 512), "sideways.jpg": (512, 1098), "small.jpeg": (40, 30)}
    left_out = (work / "left_out_0.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in left_out] == ["photos/a/b/broken.jpg", "photos/a/b/panorama.jpg"]


def test_a_sample_for_a_comparison_is_copied_as_the_page_says(work, shell):
    save_photos(work / "photos" / "a b")
    save_photos(work / "photos" / "c")
    (block,) = [block for block in blocks("evaluation.md", "From the download to the report") if "sample" in block]
    copy = "\n".join(line for line in block.splitlines() if line.startswith(("mkdir", "find")))
    copy = copy.replace("*.jpg", "*.png").replace("5000", "9")
    shell(copy)
    sample = [path.relative_to(work / "sample") for path in (work / "sample").rglob("*.png")]
    assert len(sample) == 9


def test_a_wide_picture_becomes_a_square_as_the_page_says(work, monkeypatch):
    folder = work / "photos" / "cat"
    folder.mkdir(parents=True)
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (1, 0, 40, 20))
    wide.save(folder / "wide.png")
    monkeypatch.chdir(work)
    (code,) = blocks("first_models.md", "Your own pictures, id by id", "python")
    exec(code, {})
    with Image.open(work / "squares" / "cat" / "wide.png") as square:
        assert square.size == (40, 40)
        assert square.crop((0, 10, 40, 30)).tobytes() == wide.tobytes()
        assert square.getpixel((20, 0)) == square.getpixel((20, 39)) == (255, 0, 0)


def test_folders_of_classes_are_packed_as_the_page_says(work, tiny_model, monkeypatch):
    photos = work / "photos"
    for folder in ("old.cats", "dogs/2022", "dogs/2023", "birds/2023"):
        save_photos(photos / folder)
    (photos / "dogs" / "2023" / "notes.txt").write_text("notes")
    (photos / ".DS_Store").write_bytes(b"hidden")
    monkeypatch.chdir(work)
    (code,) = blocks("image_sets.md", "Pack a folder of classes into tar files", "py")
    exec(code.replace("7_000", "5"), {})
    assert len(list((work / "shards").iterdir())) == 6
    tokenize(tiny_model, photos, work / "of_folders", **CROPS)
    tokenize(tiny_model, work / "shards", work / "of_shards", **CROPS)
    of_folders = TokenSet(work / "of_folders").load()
    of_shards = TokenSet(work / "of_shards").load()
    assert of_shards["ids_0"][:] == of_folders["ids_0"][:]
    assert of_shards["cls"][:] == of_folders["label"][:]
    assert (work / "classes.txt").read_text().splitlines() == of_folders.features["label"].names


def test_images_without_classes_are_packed_as_the_page_says(work, tiny_model, monkeypatch):
    save_photos(work / "photos")
    monkeypatch.chdir(work)
    (code,) = blocks("image_sets.md", "Pack a folder of classes into tar files", "py")
    *lines, _, _, _, _ = code.splitlines()
    without_classes = "\n".join(line for line in lines if "classes.txt" not in line)
    exec(without_classes, {})
    (shard,) = (work / "shards").iterdir()
    assert shard.name == "shard-00000.tar"
    tokenize(tiny_model, work / "photos", work / "of_folder", **CROPS)
    tokenize(tiny_model, work / "shards", work / "of_shards", **CROPS)
    assert TokenSet(work / "of_shards").load()["ids_0"][:] == TokenSet(work / "of_folder").load()["ids_0"][:]


def test_rows_of_two_sets_are_joined_as_the_page_says(work, tiny_model, monkeypatch):
    (code,) = blocks("large_sets.md", "Photographs that you add later", "py")
    for folder, name in (("photos", "tokens"), ("new-photos", "new-tokens")):
        for label in ("cat", "dog"):
            save_photos(work / folder / label)
        tokenize(tiny_model, work / folder, work / name, **CROPS)
    monkeypatch.chdir(work)
    names = {}
    exec(code, names)
    assert len(names["rows"]) == 24
    shutil.rmtree(work / "new-tokens")
    save_photos(work / "new-photos" / "horse")
    tokenize(tiny_model, work / "new-photos", work / "new-tokens", **CROPS)
    with pytest.raises(ValueError, match="can't be aligned"):
        exec(code, {})
    for name in ("tokens", "new-tokens"):
        code = code.replace(f'"{name}")', f'"{name}").remove_columns("label")')
    exec(code, names)
    assert len(names["rows"]) == 30


def test_the_rehearsal_makes_two_sets_of_different_photographs_as_the_page_says(work, shell, tiny_model, monkeypatch):
    photos = save_photos(work / "photos" / "a 'year'")
    (photos / "notes.txt").write_text("notes")
    tiny_model.save_pretrained(work / "llamagen-f16")
    (block,) = blocks("large_sets.md", "A rehearsal with 1,000 photographs")
    smaller = {"1100": "7", "1000": "5", "100 ": "2 ", "parts 8": "parts 5", "resolution 256": "resolution 16"}
    for number, fewer in smaller.items():
        assert number in block
        block = block.replace(number, fewer)
    lines = block.replace("\\\n", "").splitlines()
    shell("\n".join(line for line in lines if line.startswith(("mkdir", "find", "head", "tail"))))
    monkeypatch.chdir(work)
    train, held_out = [line for line in lines if "svqvae tokenize" in line]
    run_line(train[train.index("svqvae") :].replace("--part {}", ""))
    run_line(held_out + " --workers 0")
    keys = []
    for name in ("tokens", "held-out-tokens"):
        keys.append({row["key"] for row in TokenSet(work / "rehearsal" / name).read_columns(["key"])})
    assert len(keys[0]) + len(keys[1]) == 6  # one of the seven photographs is broken
    assert not keys[0] & keys[1]
