import math
import struct
import zlib

import pytest
import torch
from context_models import FINGERPRINT, make_context_model, pattern

from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.tokens.token_files import ImageTokens, is_compressed, load_scales, load_tokens, save_tokens

MODEL = make_context_model()


def make_tokens(scales=(1.0, 0.25, 0.5), **changes):
    shapes = [grid_shape(21, 29, 4, scale) for scale in scales]
    values = {
        **{"ids": [torch.from_numpy(pattern(shape, 5) % 64) for shape in shapes], "scales": scales, "height": 21},
        **{"width": 29, "f": 4, "tile_size": 32, "overlap": 8, "codebook_size": 64, "scale_from": "image"},
    }
    return ImageTokens(**{**values, "codebook_fingerprint": FINGERPRINT, **changes})


def equal(tokens, other):
    same = {**vars(tokens), "ids": 0} == {**vars(other), "ids": 0}
    return same and all(torch.equal(*grids) for grids in zip(tokens.ids, other.ids, strict=True))


@pytest.fixture
def path(tmp_path):
    save_tokens(tmp_path / "a.svqz", make_tokens(), MODEL)
    return tmp_path / "a.svqz"


def refused(path, **options):
    """Message of the one error that a file raises."""
    with pytest.raises(ValueError, match=str(path)) as caught:
        load_tokens(path, **{"context_model": MODEL, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_checksums(header, *chunks):
    return b"".join(part + struct.pack("<I", zlib.crc32(part)) for part in (header, *chunks))


@pytest.mark.parametrize(
    "changes",
    [{}, {"scales": (1.0,), "tile_size": None, "overlap": None, "scale_from": "latents"}, {"scales": (0.3, 0.1, 2.0)}],
)
def test_a_saved_file_loads_unchanged(tmp_path, changes):
    tokens = make_tokens(**changes)
    save_tokens(tmp_path / "a.svqz", tokens, MODEL)
    loaded = load_tokens(tmp_path / "a.svqz", MODEL)
    assert equal(loaded, tokens)
    assert loaded.ids[0].dtype == torch.int64
    assert is_compressed(tmp_path / "a.svqz")
    assert load_scales(tmp_path / "a.svqz") == tokens.scales
    save_tokens(tmp_path / "b.safetensors", tokens)
    assert not is_compressed(tmp_path / "b.safetensors")
    assert load_scales(tmp_path / "b.safetensors") == tokens.scales


def test_another_model_is_refused(path):
    other = make_context_model(width=25)
    message = f"its context model must be {MODEL.fingerprint[:16]}, got {other.fingerprint[:16]}. Decode it with"
    assert message in refused(path, context_model=other)
    assert "`context_model` must be its context model, got None" in refused(path, context_model=None)
    with pytest.raises(ValueError, match="must be of the context model's codebook, with fingerprint 0123.*got ff"):
        save_tokens(path, make_tokens(codebook_fingerprint="f" * 64), MODEL)
    assert equal(load_tokens(path, MODEL), make_tokens())


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        ({"f": 0}, [1.0], "in range, got 0, (1.0,) and 0"),
        ({"source": 2}, [1.0], "in range, got 4, (1.0,) and 2"),
        ({"version": 2}, [1.0], "version 1, got b'SVQZ' and 2"),
        ({}, [], "in range, got 4, () and 0"),
        ({}, [1.0, 1.0], "scales must differ within six digits"),
        ({}, [math.nan], "got 4, (nan,) and 0"),
        ({}, [math.inf], "got 4, (inf,) and 0"),
        ({}, [-1.0], "got 4, (-1.0,) and 0"),
        ({"height": 0}, [1.0], "`height` must be an integer of at least 1"),
        ({"height": 2**31, "width": 2**31}, [1.0], "its 8 bytes cannot hold"),
    ],
)
def test_hostile_headers_are_refused(path, values, scales, message):
    values = {"version": 1, "f": 4, "source": 0, "height": 8, "width": 8, **values}
    numbers = [values[name] for name in ("version", "f", "source")] + [len(scales)]
    header = struct.pack("<4s4B4I8s", b"SVQZ", *numbers, values["height"], values["width"], 0, 0, bytes(8))
    header = header[:24] + bytes.fromhex(MODEL.fingerprint)[:8]
    header += b"".join(struct.pack("<dI", scale, 8) for scale in scales)
    path.write_bytes(with_checksums(header, *(bytes(8) for _ in scales)))
    assert message in refused(path)


def test_hostile_chunks_make_ids_or_one_error(path):
    header = path.read_bytes()[: 32 + 3 * 12]
    fields = [*struct.iter_unpack("<dI", header[32:])]
    for size in (1, 4, 40, 400):
        for salt in range(8):
            chunk = (pattern((size,), salt) % 256).astype("u1").tobytes()
            changed = header[:32] + b"".join(struct.pack("<dI", scale, size) for scale, _ in fields)
            path.write_bytes(with_checksums(changed, chunk, chunk, chunk))
            if size % 4:
                refused(path)
            else:
                assert load_tokens(path, MODEL).scales == (1.0, 0.25, 0.5)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "it must end after" in refused(path)


def test_the_header_takes_few_bytes(path):
    chunks = sum(size for _, size in struct.iter_unpack("<dI", path.read_bytes()[32 : 32 + 3 * 12]))
    assert path.stat().st_size == chunks + 32 + 3 * (8 + 4) + 4 * 4
