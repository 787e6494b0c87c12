import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from svqvae_hf.tokens.token_files import CHECKSUM, METADATA_KEY, ImageTokens, load_tokens, save_tokens

FINGERPRINT = "0123456789abcdef" * 4


def make_tokens(**changes):
    ids = [torch.arange(2 * 3).reshape(2, 3), torch.arange(4 * 6).reshape(4, 6)]
    values = {"ids": ids, "height": 15, "width": 23, "scales": (0.5, 1.0), "f": 4, "tile_size": 256, "overlap": 32}
    values |= {"codebook_size": 64, "codebook_fingerprint": FINGERPRINT, "scale_from": "image"}
    return ImageTokens(**values | changes)


def write_raw(path, tensors=None, text=None, **changes):
    """Writes a token file that is valid except for the changes."""
    save_tokens(path, make_tokens())
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[METADATA_KEY]) | changes
        stored = {name: file.get_tensor(name) for name in file.keys()}
    record = {name: value for name, value in record.items() if value != "DELETED"}
    metadata = {METADATA_KEY: json.dumps(record) if text is None else text}
    safetensors.torch.save_file(stored if tensors is None else tensors, path, metadata)
    return path


@pytest.mark.parametrize(("codebook_size", "dtype"), [(64, torch.uint16), (65536, torch.uint16), (65537, torch.int32)])
def test_a_saved_file_loads_unchanged(tmp_path, codebook_size, dtype):
    tokens = make_tokens(codebook_size=codebook_size, ids=[torch.full((2, 3), codebook_size - 1)], scales=(0.5,))
    save_tokens(tmp_path / "a.safetensors", tokens)
    loaded = load_tokens(tmp_path / "a.safetensors")
    assert loaded.ids[0].dtype == torch.int64
    assert torch.equal(loaded.ids[0], tokens.ids[0])
    assert {**vars(loaded), "ids": 0} == {**vars(tokens), "ids": 0}
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["ids_0"].dtype == dtype


def test_ids_alone_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`tokens` must be ImageTokens, got Tensor. Make them with .* `image_tokens`"):
        save_tokens(tmp_path / "a.safetensors", torch.zeros(1, 2, 3, dtype=torch.int64))


def test_equal_tokens_make_equal_files(tmp_path):
    contents = set()
    for _ in range(4):
        save_tokens(tmp_path / "a.safetensors", make_tokens())
        contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, r"`height` must be an integer of at least 1 and under 2\*\*31, got 0"),
        ({"tile_size": None}, r"`tile_size` must be an integer of at least 1 and under 2\*\*31, got None"),
        ({"codebook_fingerprint": "abc"}, "`codebook_fingerprint` must be 64 hex digits, got 'abc'"),
        ({"scale_from": "pixels"}, "`scale_from` must be one of latents, image, got 'pixels'"),
        ({"codebook_size": 23}, r"scale 1 needs integer ids in \[0, 23\), got int64 in \[0, 23\]"),
        ({"scales": (1.0,)}, "`ids` must be a list of one grid per scale, got a list of 2 for 1 scales"),
        ({"ids": 5}, "`ids` must be a list of one grid per scale, got a value of type int"),
        ({"ids": torch.zeros(2, 3)}, "`ids` must be a list of one grid per scale, got a value of type Tensor"),
        ({"scales": (0.5, float("nan"))}, r"a scale must be a number above 0 and under 2\*\*31, got nan"),
        ({"scales": (1.0, 1.0)}, "scales must differ within six digits, got 1, 1"),
        ({"scales": (1.0, 0.5)}, r"the ids of scale 1 must have shape \(4, 6\) .* got \(2, 3\)"),
        ({"height": 17}, r"must have shape \(5, 6\) for an image of 17 x 23 pixels and f = 4, got \(4, 6\)"),
        ({"ids": [torch.zeros(2, 3).long(), torch.full((4, 6), -1)]}, r"got int64 in \[-1, -1\]"),
        ({"ids": [torch.zeros(2, 3), torch.zeros(4, 6)]}, "needs integer ids .* got float32"),
    ],
)
def test_values_that_do_not_match_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        make_tokens(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "must have format version 1, got"),
        ({"overlap": "DELETED", "f": "DELETED"}, "must also have f, overlap"),
        ({"scales": 1}, "scales must be a list, got 1"),
        ({"scales": [1, 1.0000001]}, "scales must differ within six digits"),
        ({"scales": [0.5, 1.0, 2.0]}, "`ids` must be a list of one grid per scale, got a list of 2 for 3 scales"),
        ({"codebook_size": 20}, r"needs integer ids in \[0, 20\)"),
        ({"scales": [0.5, 1e308]}, r"a scale must be a number above 0 and under 2\*\*31, got 1e\+308"),
        ({"height": 10**400}, r"`height` must be an integer .* under 2\*\*31, got 1000.{0,80}$"),
        ({"codebook_fingerprint": "x" * 10**6}, "64 hex digits, got 'x{79}.$"),
        ({"text": "[" * 10**6}, "recursion"),
        ({"scale_from": ["image"]}, r"`scale_from` must be one of latents, image, got \['image'\]"),
        ({"tensors": {"ids_0": torch.zeros(2, 3), "ids_1": torch.zeros(4, 6)}}, "of type uint16 or int32"),
        ({"text": "[1]"}, r"must have format version 1, got \[1\]"),
    ],
)
def test_files_with_values_that_do_not_match_are_named(tmp_path, changes, message):
    path = write_raw(tmp_path / "a.safetensors", **changes)
    with pytest.raises(
        ValueError, match=f"a.safetensors` must be a token file that can be decoded, but is not: .*{message}"
    ):
        load_tokens(path)


def test_files_without_a_checksum_are_read(tmp_path):
    loaded = load_tokens(write_raw(tmp_path / "a.safetensors", **{CHECKSUM: "DELETED"}))
    assert loaded.to_record() == make_tokens().to_record()
