"""Storage buckets of the Hub, `hf://buckets/org/name/...`, as places of image sets and token sets."""

import pytest
from bucket_server import UPLOADS, serve_buckets
from cli_runner import svqvae
from hub_server import run_python
from token_set_parts import content, save_photos

pytestmark = pytest.mark.slow

PHOTOS = "hf://buckets/org/data/photos"
TOKENS = "hf://buckets/org/data/tokens"
RUN = f"""
import sys
from pathlib import Path
import svqvae_cli

def run(*words):
    code = svqvae_cli.main(words)
    assert code == 0, (words, code)
{UPLOADS}
"""
PARTS = f"""
run("tokenize", "{PHOTOS}", "--output", "{TOKENS}", "--num-parts", "2", "--part", "1", "--workers", "0")
run("info", "{TOKENS}")
run("tokenize", "{PHOTOS}", "--output", "{TOKENS}", "--num-parts", "2", "--part", "0", "--workers", "0")
run("decode", "{TOKENS}", "--output", sys.argv[1])

photo, other = map(Path, sys.argv[2:])  # in the bucket
photo.write_bytes(other.read_bytes())
code = svqvae_cli.main(["tokenize", "{PHOTOS}", "--output", "{TOKENS}", "--num-parts", "2", "--workers", "0"])
assert code == 2, code
"""


def test_a_token_set_in_a_bucket_equals_a_local_one(tmp_path):
    bucket = tmp_path / "buckets" / "org" / "data"
    bucket.mkdir(parents=True)
    photos = save_photos(bucket / "photos")
    (photos / "2b.png").unlink()  # the broken one
    assert svqvae("tokenize", photos, "--output", tmp_path / "local", "--num-parts", "2", "--workers", "0") == 0
    assert svqvae("decode", tmp_path / "local", "--output", tmp_path / "decoded") == 0
    with serve_buckets(tmp_path) as env:
        first, second = sorted(photos.iterdir())[:2]
        output = run_python(RUN + PARTS, env, tmp_path / "from-bucket", first, second)
        assert "2 (not complete; finished: 1)" in output
        assert content(bucket / "tokens").keys() == content(tmp_path / "local").keys()
        for file in (tmp_path / "local" / "data").rglob("*.parquet"):
            name = file.relative_to(tmp_path / "local")
            assert (bucket / "tokens" / name).read_bytes() == file.read_bytes()
        for picture in (tmp_path / "decoded").glob("*.png"):
            assert (tmp_path / "from-bucket" / picture.name).read_bytes() == picture.read_bytes()
