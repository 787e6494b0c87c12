"""Token sets are read through their manifest, and resumed through the records of their parts."""

import json
import os
import shutil
import threading

import pytest
from conftest import make_tiny
from token_set_parts import content, load, make_other, save_photos, tokenize

from svqvae_files.folders import Folder
from svqvae_hf.token_sets import writer
from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.manifest import TokenSet, load_rows
from svqvae_hf.token_sets.parts import describe_state
from svqvae_hf.token_sets.row_names import RowNames
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.trainer.data.token_sequences import TokenSource

pytestmark = pytest.mark.usefixtures("cache")
CROPS = {"crops": "centre", "resolution": 16, "scales": [1.0]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def sets(photos, tmp_path_factory):
    """Two token sets of three files each, which only differ in their model, to read and not to change."""
    folder = tmp_path_factory.mktemp("sets")
    tokenize(make_tiny(), photos, folder / "set", num_parts=3, **CROPS)
    tokenize(make_other(), photos, folder / "other", num_parts=3, **CROPS)
    return folder


def files_of(folder):
    return sorted(folder.rglob("*.parquet"))


def delete(folder, sets):
    files_of(folder)[1].unlink()


def cut(folder, sets):
    file = files_of(folder)[1]
    file.write_bytes(file.read_bytes()[:-9])


def flip(folder, sets):
    file = files_of(folder)[1]
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)


def add(folder, sets):
    shutil.copy(files_of(sets / "other")[1], folder / "data" / "0000-0000" / "train-0000007-00000.parquet")


def replace(folder, sets):
    shutil.copy(files_of(sets / "other")[1], files_of(folder)[1])


def reorder(folder, sets):
    first, second, _ = files_of(folder)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def take_manifest(folder, sets):
    shutil.copy(sets / "other" / "manifest.jsonl", folder)


def delete_manifest(folder, sets):
    (folder / "manifest.jsonl").unlink()


DAMAGE = {
    delete: "train-0000001-00000.parquet` is missing, although the manifest",
    cut: "train-0000001-00000.parquet` must (have .* bytes, as the manifest|be the file that the manifest)",
    flip: "train-0000001-00000.parquet` must be the file that the manifest of the set names, but has other content",
    add: "train-0000007-00000.parquet` must not be there, because the token set has no such file",
    replace: "train-0000001-00000.parquet` must (have .* bytes, as the manifest|be the file that the manifest)",
    reorder: "train-000000[01]-00000.parquet` must (have .* bytes, as the manifest|be the file that the manifest)",
    take_manifest: "manifest.jsonl` must be the manifest that svqvae_tokens.json names, but has changed",
    delete_manifest: "manifest.jsonl` is missing, which names the files of the set",
}


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_named(sets, tmp_path, damage, prefix):
    folder = tmp_path / "set"
    shutil.copytree(sets / "set", folder)
    damage(folder, sets)
    name = f"{prefix}{folder}"
    readers = {
        "decode": lambda: detokenize_set(make_tiny(), name, tmp_path / "out"),
        "train": lambda: TokenSource(name, None),
        "load": lambda: load_rows(name),
    }
    if damage not in (flip, reorder, replace):  # sizes may be equal
        readers["info"] = lambda: describe_state(name)
    for read in readers.values():
        with pytest.raises((ValueError, OSError), match=DAMAGE[damage]) as raised:
            read()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [delete, cut, flip])
def test_a_file_is_repaired_by_its_part_from_another_folder(photos, sets, tmp_path, damage):
    folder = tmp_path / "set"
    shutil.copytree(sets / "set", folder)
    damage(folder, sets)
    message = "or make part 1 again: .* `--num-parts 3 --part 1 --output OTHER`, then copy"
    with pytest.raises(ValueError, match=message):
        list(TokenSet(folder).rows())
    if damage != flip:  # the size is equal
        with pytest.raises(ValueError, match=message):
            describe_state(folder)
    tokenize(make_tiny(), photos, tmp_path / "other", num_parts=3, parts=[1], **CROPS)
    shutil.copytree(tmp_path / "other" / "data", folder / "data", dirs_exist_ok=True)
    assert content(folder) == content(sets / "set")
    assert describe_state(folder)["parts"] == "3 (complete; finished: 3)"
    assert list(TokenSet(folder).rows()) == list(TokenSet(sets / "set").rows())


def test_rows_are_those_of_datasets(sets, cache):
    token_set = TokenSet(sets / "set")
    rows = list(load(sets / "set"))
    assert list(token_set.rows()) == rows
    assert list(load_rows(sets / "set")) == rows
    assert [row["key"] for row in token_set.read_columns(["key"])] == [row["key"] for row in rows]
    assert len(rows) == token_set.num_rows == token_set.totals["rows"]


def test_a_folder_of_any_name_is_loaded(sets, tmp_path):
    shutil.copytree(sets / "set", tmp_path / "set [1]")
    assert len(load_rows(tmp_path / "set [1]")) == TokenSet(tmp_path / "set [1]").num_rows


def test_another_set_at_the_same_path_is_copied_even_if_its_times_are_equal(sets, tmp_path):
    """`datasets` knows a file by its path and its time alone."""
    folder = tmp_path / "set"
    for name in ("set", "other"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sets / name, folder)
        for file in files_of(folder):
            os.utime(file, (1, 1))
        assert list(load_rows(folder)) == list(TokenSet(sets / name).rows())


# Parts


@pytest.mark.parametrize("lose", [delete, cut])
@pytest.mark.parametrize("alone", [True, False])
def test_a_part_whose_file_was_lost_is_made_again(photos, sets, tmp_path, lose, alone):
    folder = tmp_path / "set"
    for part in (0, 1):
        tokenize(make_tiny(), photos, folder, num_parts=3, parts=[part], **CROPS)
    lose(folder, sets)
    if alone:
        assert not tokenize(make_tiny(), photos, folder, num_parts=3, parts=[2], **CROPS).complete
    assert describe_state(folder)["missing"] == ("1" if alone else "1-2")
    report = tokenize(make_tiny(), photos, folder, num_parts=3, **CROPS)
    assert (report.complete, report.resumed) == (True, 2 if alone else 1)
    assert content(folder) == content(sets / "set")


def test_a_model_of_another_network_range_is_refused(photos, tmp_path):
    tokenize(make_tiny(), photos, tmp_path / "set", num_parts=2, parts=[0], **CROPS)
    before = content(tmp_path / "set")
    with pytest.raises(ValueError, match="with the same images and options, but it was made otherwise: `encoder` was"):
        tokenize(make_tiny(network_range=(-1.0, 1.0)), photos, tmp_path / "set", num_parts=2, **CROPS)
    assert content(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{}", "0000000.json` must be the record of a part, but is damaged: 'files'"),
        ("[]", "0000000.json` must hold a JSON object, but holds a list"),
        ('{"part": 0, "fil', "0000000.json` must hold a JSON object, but is damaged"),
        ('{"part": "0", "options": "", "read": [], "files": []}', "0000000.json` .* its `part` is damaged"),
        ("of another part", "0000000.json` must be the record of part 0 of this set, but is of part 1"),
        ("of another set", "0000000.json` must be the record of part 0 of this set, but is of part 0, or of other"),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_deleted(photos, tmp_path, damaged, message):
    for part in (0, 1):
        tokenize(make_tiny(), photos, tmp_path / "set", num_parts=3, parts=[part], **CROPS)
    record = tmp_path / "set" / "parts" / "0000000.json"
    text = damaged
    if damaged == "of another part":
        text = record.with_name("0000001.json").read_text()
    if damaged == "of another set":
        text = json.dumps(json.loads(record.read_text()) | {"options": "0" * 64})
    record.write_text(text)
    before = content(tmp_path / "set")
    for call in (
        lambda: tokenize(make_tiny(), photos, tmp_path / "set", num_parts=3, **CROPS),
        lambda: describe_state(tmp_path / "set"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert content(tmp_path / "set") == before


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("content_of_file", [None, "{", "[]"])
def test_a_lost_or_damaged_file_of_options_is_made_again(photos, sets, tmp_path, is_complete, content_of_file):
    """The error names the file and the cure, and the cure makes the same set."""
    folder = tmp_path / "set"
    shutil.copytree(sets / "set", folder)
    if not is_complete:
        shutil.rmtree(folder)
        tokenize(make_tiny(), photos, folder, num_parts=3, parts=[1], **CROPS)
    before = content(folder)
    file = folder / ("svqvae_tokens.json" if is_complete else "parts/options.json")
    file.unlink()
    message = "is missing, although .* Run the same `svqvae tokenize` again, which makes it again"
    if content_of_file is not None:
        file.write_text(content_of_file)
        message = "must hold a JSON object, but .* Delete it and run the same `svqvae tokenize` again, which makes"
    readers = [describe_state] + [read_settings, TokenSet] * (is_complete or content_of_file is None)
    for read in readers:
        with pytest.raises(ValueError, match=f"{file.name}` {message}"):
            read(folder)
    file.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has lost its options, and part . was made with other images or options"):
        tokenize(make_other(), photos, folder, num_parts=3, parts=[1], **CROPS)
    report = tokenize(make_tiny(), photos, folder, num_parts=3, parts=[1], **CROPS)
    assert report.resumed == 1
    assert content(folder) == before


def test_a_set_without_its_options_can_be_started_over(photos, sets, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sets / "set", folder)
    (folder / "svqvae_tokens.json").unlink()
    assert tokenize(make_tiny(), photos, folder, num_parts=3, overwrite=True, **CROPS).resumed == 0
    assert content(folder) == content(sets / "set")


@pytest.mark.parametrize("damage", [delete_manifest, take_manifest])
def test_a_lost_or_damaged_manifest_is_repaired_by_starting_over(photos, sets, tmp_path, damage):
    folder = tmp_path / "set"
    shutil.copytree(sets / "set", folder)
    damage(folder, sets)
    with pytest.raises(ValueError, match="manifest.jsonl` .* Copy it from a backup .* with `svqvae tokenize --overw"):
        tokenize(make_tiny(), photos, folder, num_parts=3, **CROPS)
    tokenize(make_tiny(), photos, folder, num_parts=3, overwrite=True, **CROPS)
    assert content(folder) == content(sets / "set")


def test_settings_are_not_made_again_without_the_list_of_skipped_images(photos, sets, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sets / "set", folder)
    (folder / "svqvae_tokens.json").unlink()
    (folder / "skipped.jsonl").unlink()
    with pytest.raises(ValueError, match="skipped.jsonl` must list all skipped images .* Copy it again"):
        tokenize(make_tiny(), photos, folder, num_parts=3, **CROPS)


def test_a_second_run_with_other_options_ends_before_it_writes(photos, tmp_path, monkeypatch):
    """Both start at the same time, before either has finished a part."""
    barrier = threading.Barrier(2)
    create = Folder.create
    errors = []

    def create_together(*arguments):
        barrier.wait(30)
        create(*arguments)

    monkeypatch.setattr(Folder, "create", create_together)

    def run(resolution):
        try:
            options = CROPS | {"resolution": resolution}
            tokenize(make_tiny(), photos, tmp_path / "set", num_parts=2, **options)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run, args=[resolution]) for resolution in (16, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = errors
    assert "must be continued with the same images and options" in error
    rows = load(tmp_path / "set")
    assert len({(row["height"], row["width"]) for row in rows}) == 1
    assert len(rows) == 6


def test_a_run_that_was_started_over_by_another_ends_with_an_error(photos, tmp_path, monkeypatch):
    write = writer.write_shards

    def write_while_another_starts_over(*arguments):
        monkeypatch.setattr(writer, "write_shards", write)
        tokenize(make_tiny(), photos, tmp_path / "set", overwrite=True, **CROPS | {"resolution": 24})
        return write(*arguments)

    monkeypatch.setattr(writer, "write_shards", write_while_another_starts_over)
    with pytest.raises(ValueError, match="must be continued with the same images and options"):
        tokenize(make_tiny(), photos, tmp_path / "set", num_parts=2, **CROPS)


def test_only_files_of_the_set_are_deleted(photos, tmp_path):
    folder = tmp_path / "set"
    tokenize(make_tiny(), photos, folder, num_parts=2, **CROPS)
    (folder / "notes.txt").write_text("mine")
    (folder / "data" / "mine.parquet").write_text("mine")
    with pytest.raises(ValueError, match="data/mine.parquet` must not be there, because the token set has no such"):
        tokenize(make_tiny(), photos, folder, overwrite=True, **CROPS)
    (folder / "data" / "mine.parquet").unlink()
    tokenize(make_tiny(), photos, folder, overwrite=True, **CROPS)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(files_of(folder)) == 1
    TokenSet(folder).check_files()


def test_what_a_killed_process_leaves_is_deleted(photos, sets, tmp_path):
    folder = tmp_path / "set"
    tokenize(make_tiny(), photos, folder, num_parts=3, parts=[0], **CROPS)
    for place in ("parts", "data/0000-0000"):
        (folder / place / ".0123abcd.tmp").write_bytes(b"half")
    tokenize(make_tiny(), photos, folder, num_parts=3, **CROPS)
    assert content(folder) == content(sets / "set")


# Names of decoded images


def names(*rows):
    row_names = RowNames()
    return [row_names.next_name(number, row) for number, row in enumerate(rows)]


def test_decoded_images_have_the_names_of_the_images():
    keys = ["cat/0.png", "cat/0.JPG", "dog/0.png", "v1.2", "0-1", None, "12345678.png", "cat/.x.png"]
    expected = ["cat/0", "00000001", "dog/0", "v1.2", "0-1", "00000005", "00000006", "00000007"]
    assert names(*({"key": key} for key in keys)) == expected
    crops = ("centre", "centre-flipped", "centre")
    assert names(*({"key": "a.png", "crop": crop} for crop in crops)) == ["a_centre", "a_centre-flipped", "00000002"]


@pytest.mark.parametrize(
    "key", ["../a.png", "/etc/a.png", "a//b.png", "", ".", "a\\b.png", "a\n.png", "x" * 300, "c:a"]
)
def test_keys_that_are_no_path_below_a_folder_become_numbers(key):
    assert names({"key": key}) == ["00000000"]
