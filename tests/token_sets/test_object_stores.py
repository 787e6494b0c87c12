import io
import json

import datasets
import fsspec
import pytest
from conftest import make_tiny
from numbered_images import write_tar
from s3_server import make_bucket, s3_server
from token_set_parts import SCALES, content, load, save_photos

from svqvae_files.folders import Folder
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.parts import describe_state
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.token_sets.writer import tokenize_set

PARTS = 3


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Image files, and the same in three tar files with captions."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    photos = save_photos(tmp_path / "local" / "photos")
    (tmp_path / "local" / "tars").mkdir()
    for part in range(PARTS):
        members = []
        for path in sorted(photos.iterdir())[part::PARTS]:
            members.append((path.name, path.read_bytes()))
            members.append((f"{path.stem}.txt", path.stem.encode()))
        write_tar(tmp_path / "local" / "tars" / f"shard-{part:02}.tar", members)
    return tmp_path / "local"


@pytest.fixture
def memory(local):
    files = fsspec.filesystem("memory")
    files.put(str(local), "/bucket", recursive=True)
    yield "memory://bucket"
    files.rm("/", recursive=True)


def tokenize(data, out, **options):
    images = open_images([str(each) for each in (data if isinstance(data, list) else [data])])
    return tokenize_set(make_tiny(), images, out, model_name="org/tiny", scales=SCALES, **options)


def check_equal(local_set, url):
    """Equal files, except for the fingerprint of the image set, which names its places."""
    folder = Folder(url)
    found = {name: folder.read(name) for name in folder.sizes("")}
    expected = content(local_set)
    assert found.keys() == expected.keys()
    for name, body in expected.items():
        if name.endswith(".parquet") or name in ("README.md", "skipped.jsonl"):
            assert found[name] == body
    assert read_settings(url) == read_settings(local_set)
    assert json.loads(found["svqvae_tokens.json"])["totals"] == json.loads(expected["svqvae_tokens.json"])["totals"]


@pytest.mark.parametrize("names", [["photos/*.png"], ["tars/shard-{00..01}.tar", "tars/shard-02.tar"]])
def test_urls_make_the_same_set_as_local_paths(local, memory, names):
    report = tokenize([f"{memory}/{name}" for name in names], f"{memory}/tokens")
    tokenize([local / name for name in names], local / "tokens")
    assert (report.images, report.rows) == (7, 6)
    check_equal(local / "tokens", f"{memory}/tokens")


def test_parquet_files_at_a_url_name_no_files_of_this_machine(local, memory):
    image = datasets.Features({"image": datasets.Image()})
    embedded = {"bytes": (local / "photos" / "0.png").read_bytes(), "path": "0.png"}
    rows = {"image": [embedded, {"bytes": None, "path": str(local / "photos" / "1.png")}]}
    file = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=image).to_parquet(file)
    Folder(memory).write("sets/a.parquet", file.getvalue())
    report = tokenize(f"{memory}/sets/a.parquet", f"{memory}/tokens")
    assert (report.rows, report.skipped) == (1, 1)
    assert b"which is not in the set" in Folder(memory).read("tokens/skipped.jsonl")


def test_a_changed_or_missing_file_at_a_url_is_refused(memory):
    tokenize(f"{memory}/photos", f"{memory}/tokens", parts=[0], num_parts=2)
    Folder(memory).write("photos/0.png", b"other")
    with pytest.raises(ValueError, match="same images, but names, sizes or times of change"):
        tokenize(f"{memory}/photos", f"{memory}/tokens", num_parts=2)
    with pytest.raises(FileNotFoundError, match="no file or folder matches `memory:///?bucket/tars/shard-03.tar`"):
        open_images([f"{memory}/tars/shard-{{02..03}}.tar"])
    with pytest.raises(FileNotFoundError, match="no file or folder matches `memory://bucket/none"):
        open_images([f"{memory}/none*.tar"])
    with pytest.raises(ValueError, match="must be a new or empty folder, but it is not empty"):
        tokenize(f"{memory}/photos", f"{memory}/tars")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_s3_server_with_faults_gets_the_same_set(local, tmp_path, monkeypatch):
    with s3_server() as (address, faults):
        make_bucket("bucket", address, monkeypatch)
        fsspec.filesystem("s3").put(f"{local}/tars/", "bucket/tars/", recursive=True)
        faults.rate = 0.1
        failures = []
        for _ in range(10):
            try:
                report = tokenize("s3://bucket/tars/shard-{00..02}.tar", "s3://bucket/tokens", num_workers=0)
                break
            except OSError as error:
                failures.append(str(error))
        faults.rate = 0
        assert all("\n" not in failure for failure in failures)
        assert report.complete, failures
        tokenize(local / "tars", local / "tokens")
        check_equal(local / "tokens", "s3://bucket/tokens")
        assert describe_state("s3://bucket/tokens") == {"parts": f"{PARTS} (complete; finished: {PARTS})"}
        tars = [request for request in faults.requests if request.startswith("GET") and ".tar" in request]
        assert tokenize("s3://bucket/tars/shard-{00..02}.tar", "s3://bucket/tokens").rows == report.rows
        again = [request for request in faults.requests if request.startswith("GET") and ".tar" in request]
        assert len(again) - len(tars) <= 1  # one is looked into, to find the columns
        url = "s3://bucket/tokens/data/**/*.parquet"
        rows = datasets.load_dataset("parquet", data_files=url, split="train", streaming=True)
        assert list(rows) == list(load(local / "tokens"))
        assert detokenize_set(make_tiny(), "s3://bucket/tokens", tmp_path / "images", max_images=1) == (2, 0)
