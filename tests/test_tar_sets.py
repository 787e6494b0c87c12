"""Eight tar files of jpg, png and webp images with their labels: trained on, evaluated and tokenized."""

import json

import datasets
import pytest
from cli_runner import svqvae
from conftest import make_tiny
from numbered_images import encode, numbered, write_tar

KINDS = {"jpg": "jpeg", "png": "png", "webp": "webp"}
SHARDS, SHARD_SIZE = 8, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model, and tar files of 24 images: one of them is broken, one is small."""
    root = tmp_path_factory.mktemp("tars")
    make_tiny().save_pretrained(root / "model")
    (root / "shards").mkdir()
    for shard in range(SHARDS):
        members = []
        for index, (suffix, kind) in enumerate(KINDS.items()):
            number = shard * SHARD_SIZE + index
            content = b"broken" if number in (5, 7) else encode(numbered(number), kind)
            labels = {"cls": f"{number % 3}", "txt": f"red {number}", "json": json.dumps({"number": number})}
            members += [(f"{number:05}.{suffix}", content)]
            members += [(f"{number:05}.{name}", text.encode()) for name, text in labels.items()]
        write_tar(root / "shards" / f"shard-{shard:05}.tar", members)
    return root


def test_tokenize_keeps_labels_and_names_what_it_skips(root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = ["--model", root / "model", "--tile-size", "32", "--overlap", "8", "--workers", "0"]
    assert svqvae("tokenize", root / "shards", tmp_path / "tokens", *options) == 1  # some are skipped
    rows = datasets.load_dataset(str(tmp_path / "tokens"), split="train")
    numbers = [number for number in range(SHARDS * SHARD_SIZE) if number not in (5, 7)]
    assert rows["cls"] == [number % 3 for number in numbers]
    assert rows["txt"] == [f"red {number}" for number in numbers]
    assert [json.loads(text)["number"] for text in rows["json"]] == numbers
    assert {key.partition(".")[2] for key in rows["key"]} == set(KINDS)
    skipped = [json.loads(line) for line in (tmp_path / "tokens" / "skipped.jsonl").open()]
    assert [image["key"] for image in skipped] == ["00005.webp", "00007.png"]
