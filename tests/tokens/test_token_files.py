import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from svqvae_hf.tokens.token_files import METADATA_KEY, ImageTokens, load_tokens, save_tokens

FINGERPRINT = "0123456789abcdef" * 4


def make_tokens(**changes):
    values = {
        "ids": [torch.arange(2 * 3).reshape(2, 3), torch.arange(4 * 6).reshape(4, 6)],
        "height": 15,
        "width": 23,
        "scales": (0.5, 1.0),
        "f": 4,
        "tile_size": 256,
        "overlap": 32,
        "codebook_size": 64,
        "codebook_fingerprint": FINGERPRINT,
        "scale_from": "image",
    }
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


def test_more_than_ten_scales_keep_their_order(tmp_path):
    scales = tuple(1 + i / 1000 for i in reversed(range(12)))
    tokens = make_tokens(ids=[torch.full((4, 6), i) for i in range(12)], scales=scales)
    save_tokens(tmp_path / "a.safetensors", tokens)
    loaded = load_tokens(str(tmp_path / "a.safetensors"))
    assert loaded.scales == scales
    assert [ids[0, 0].item() for ids in loaded.ids] == list(range(12))


def test_tokens_without_tiles_come_back(tmp_path):
    save_tokens(tmp_path / "a.safetensors", make_tokens(tile_size=None, overlap=None))
    assert load_tokens(tmp_path / "a.safetensors").tile_size is None


def test_older_files_hold_scales_from_the_latents(tmp_path):
    assert load_tokens(write_raw(tmp_path / "a.safetensors")).scale_from == "image"
    assert load_tokens(write_raw(tmp_path / "a.safetensors", scale_from="DELETED")).scale_from == "latents"


def test_ids_alone_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`tokens` must be ImageTokens, got Tensor. Make them with .* `image_tokens`"):
        save_tokens(tmp_path / "a.safetensors", torch.zeros(1, 2, 3, dtype=torch.int64))


def test_equal_tokens_make_equal_files(tmp_path):
    contents = set()
    for _ in range(4):
        save_tokens(tmp_path / "a.safetensors", make_tokens())
        contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1


def test_bits_per_pixel():
    tokens = make_tokens()
    assert tokens.bits_per_pixel(0) == 2 * 3 * 6 / (15 * 23)
    assert tokens.bits_per_pixel(1) == 4 * 6 * 6 / (15 * 23)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, r"`height` must be an integer of at least 1 and under 2\*\*31, got 0"),
        ({"width": 2.5}, r"`width` must be an integer of at least 1 and under 2\*\*31, got 2.5"),
        ({"f": True}, "`f` must be an integer"),
        ({"tile_size": None}, r"`tile_size` must be an integer of at least 1 and under 2\*\*31, got None"),
        ({"overlap": None}, r"`overlap` must be an integer of at least 0 and under 2\*\*31, got None"),
        ({"codebook_fingerprint": "abc"}, "`codebook_fingerprint` must be 64 hexadecimal digits, got 'abc'"),
        ({"scale_from": "pixels"}, "`scale_from` must be one of latents, image, got 'pixels'"),
        ({"codebook_size": 23}, r"ids must be in \[0, 22\], got \[0, 23\] at scale 1"),
        ({"scales": (1.0,)}, "`ids` must have one grid per scale, got 2 for 1 scales"),
        ({"scales": (), "ids": []}, "`ids` must have one grid per scale, got 0"),
        ({"scales": (0.5, float("nan"))}, "a scale must be a finite number above 0, got nan"),
        ({"scales": (0.5, "1")}, "a scale must be a finite number above 0, got '1'"),
        ({"scales": (0.0, 1.0)}, "a scale must be a finite number above 0, got 0.0"),
        ({"scales": (1.0, 0.5)}, r"the ids of scale 1 must have shape \(4, 6\) .* got \(2, 3\)"),
        ({"height": 17}, r"must have shape \(5, 6\) for an image of 17 x 23 pixels and f = 4, got \(4, 6\)"),
        ({"ids": [torch.zeros(2, 3), torch.full((4, 6), -1)]}, r"got \[-1, -1\]"),
        ({"ids": [torch.zeros(6), torch.zeros(4, 6)]}, r"must have shape \(2, 3\) .* got \(6,\)"),
    ],
)
def test_values_that_do_not_match_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        make_tokens(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "must have format version 1, got"),
        ({"format_version": "DELETED"}, "must have format version 1"),
        ({"overlap": "DELETED", "f": "DELETED"}, r"must also have \['f', 'overlap'\]"),
        ({"scales": 1}, "scales must be a list, got 1"),
        ({"scales": [0.5, 1.0, 2.0]}, r"tensors must be \['ids_0', 'ids_1', 'ids_2'\]"),
        ({"scales": [0.5, 2.0]}, r"the ids of scale 2 must have shape \(8, 12\)"),
        ({"codebook_size": 20}, r"ids must be in \[0, 19\]"),
        ({"scales": [0.5, 1e308]}, "cannot convert float infinity to integer"),
        ({"height": 10**400}, r"`height` must be an integer .* under 2\*\*31, got 1000.{0,80}$"),
        ({"width": 2**31}, "`width` must be an integer .* got 2147483648"),
        ({"scales": [10**400, 1.0]}, "too large"),
        ({"codebook_fingerprint": "x" * 10**6}, "64 hexadecimal digits, got 'x{79}.$"),
        ({"text": "[" * 10**6}, "recursion"),
        ({"scale_from": None}, "`scale_from` must be one of latents, image, got None"),
        ({"scale_from": ["image"]}, r"`scale_from` must be one of latents, image, got \['image'\]"),
        ({"codebook_size": "many"}, "`codebook_size` must be an integer"),
        ({"tile_size": 2**31}, "`tile_size` must be an integer"),
        ({"tensors": {"ids_0": torch.zeros(2, 3), "ids_1": torch.zeros(4, 6)}}, "of type uint16 or int32"),
        ({"text": "no json"}, "Expecting value"),
        ({"text": "[1]"}, r"must have format version 1, got \[1\]"),
    ],
)
def test_files_with_values_that_do_not_match_are_named(tmp_path, changes, message):
    path = write_raw(tmp_path / "a.safetensors", **changes)
    with pytest.raises(ValueError, match=f"a.safetensors` is not a token file that can be decoded: .*{message}"):
        load_tokens(path)


def test_another_safetensors_file_raises(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors` is not a token file .* must have the key 'svqvae_tokens'"):
        load_tokens(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_cut_short_raises(tmp_path, length):
    path = tmp_path / "a.safetensors"
    save_tokens(path, make_tokens())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a.safetensors` must be a safetensors file, but is another kind or cut"):
        load_tokens(path)


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the token file `.*a.safetensors` does not exist"):
        load_tokens(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokens(tmp_path)
