import pickle
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from svqvae_hf import SVQVAE
from svqvae_hf.evaluation.perceptual import load_lpips
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.untrusted.pickles import load_pickle

# Opcodes: `)` empty tuple, `\x85` tuple of 1, `\x86` of 2, `q` to the memo, `h` from it, `}` empty dict, `s` set item.
NESTS = {
    "deeper than the stack": b")" + b"\x85" * 200_000,
    "33 million tuples when hashed": b")" + b"q\0h\0\x86" * 25,
}


def write(path: Path, key: bytes, form: str) -> Path:
    """Writes a file with the content `{key: 1}`, as an archive or in the oldest form."""
    pickled = b"\x80\x02}" + key + b"K\x01s."
    if form != "legacy":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("file/data.pkl" if form == "archive" else "file/Data.PKL", pickled)
            archive.writestr("file/version", b"3\n")
    else:
        before = b"".join(pickle.dumps(each, 2) for each in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
        path.write_bytes(before + pickled + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("form", ["archive", "archive in capitals", "legacy"])
@pytest.mark.parametrize("nest", NESTS)
def test_nested_tuples_are_refused(nest, form, tmp_path):
    path = write(tmp_path / "file.pt", NESTS[nest], form)
    with pytest.raises(pickle.UnpicklingError, match="a tuple must hold at most 10000 nested tuples, itself included"):
        load_pickle(path)
    for read in (lambda path: read_checkpoint(path, SVQVAE), lambda path: load_lpips("alex", path)):
        with pytest.raises(ValueError, match=r"`.*file.pt` must be .*cannot be read as one"):
            read(path)


# Opcodes: `c` names a global, `K` is a byte, `R` calls with a tuple, `]` is an empty list, `a` appends, `X` is text.
STORAGE = b"ctorch.storage\nUntypedStorage\n"
REBUILD = b"ctorch._tensor\n_rebuild_from_type_v2\n"  # calls its first argument with its third
REBUILD_TENSOR, TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nTensor\n"
HEX = b"X\x03\0\0\0hex"
GREEDY = {
    "bytearray": b"c__builtin__\nbytearray\nK\x05\x85R",
    "tensor": b"ctorch\nFloatTensor\nK\x05\x85R",
    "tensor of a GPU": b"ctorch.cuda\nHalfTensor\nK\x05\x85R",
    "storage": STORAGE + b"K\x05\x85R",
    "storage by its other name": b"ctorch\nUntypedStorage\nK\x05\x85R",
    "storage as an argument": REBUILD + b"(" + STORAGE + STORAGE + b"K\x05\x85}tR",
    "storage in a list of arguments": REBUILD + b"]q\0" + STORAGE + b"aK\x05\x85ah\0R",
    "plain tensor": TENSOR + b"K\x05\x85R",
    "plain tensor as an argument": REBUILD + b"(" + TENSOR + TENSOR + b"K\x05\x85}tR",
    "plain tensor in arguments": REBUILD + b"(" + REBUILD_TENSOR + TENSOR + TENSOR + b"\x85}tR",
    "plain tensor in a list of arguments": REBUILD + b"]q\0" + TENSOR + b"aK\x05\x85ah\0R",
    "plain tensor for another call": REBUILD_TENSOR + b"(" + REBUILD_TENSOR + TENSOR + b")}tR",
    "arguments within arguments": REBUILD
    + b"("
    + REBUILD
    + REBUILD_TENSOR
    + b"("
    + REBUILD_TENSOR
    + TENSOR
    + b")}t}tR",
    "text that grows": b"c_codecs\nencode\nX\x01\0\0\0a" + HEX + b"\x86R",
    "text that grows, by another call": REBUILD + b"(c_codecs\nencode\nK\x05X\x01\0\0\0a" + HEX + b"\x86}tR",
}


@pytest.mark.parametrize("form", ["archive", "legacy"])
@pytest.mark.parametrize("name", GREEDY)
def test_calls_that_allocate_any_memory_are_refused(name, form, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL [\w.]+( as a type)? can take any memory"):
        load_pickle(write(tmp_path / "file.pt", GREEDY[name], form))


@pytest.mark.parametrize("form", ["archive", "legacy"])
def test_honest_files_are_read(form, tmp_path):
    assert load_pickle(write(tmp_path / "file.pt", b")" + b"q\0h\0\x86" * 3, form)) == {
        ((((), ()), ((), ())), (((), ()), ((), ()))): 1
    }
    shared = tuple(range(20_000))
    content = {
        "weight": torch.arange(6.0).view(2, 3),
        "counts": torch.ones(3, dtype=torch.uint8),
        ("a", (1, 2)): [shared, shared, shared],
        "bytes": b"\0\xff",
        "state": {1: ()},
    }
    if form == "archive":  # dtypes that the oldest form cannot store
        content |= {"counts": torch.ones(3, dtype=torch.uint16), "float8": torch.ones(3).to(torch.float8_e4m3fn)}
    torch.save(content, tmp_path / "saved.pt", _use_new_zipfile_serialization=form == "archive")
    read = load_pickle(tmp_path / "saved.pt")
    for name in ("weight", "counts", "float8"):
        if name in content:
            assert torch.equal(read.pop(name).float(), content.pop(name).float())
    assert read == content


@pytest.mark.parametrize("form", ["archive", "legacy"])
def test_tensors_with_attributes_are_read_without_them(form, golden_dir, tmp_path):
    content = torch.load(golden_dir / "flexvar_tiny.pth", weights_only=True)
    for tensor in content["model"].values():
        tensor.numel = "hidden"
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=form == "archive")
    read = read_checkpoint(tmp_path / "file.pt", SVQVAE).state_dict
    expected = read_checkpoint(golden_dir / "flexvar_tiny.pth", SVQVAE).state_dict
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())


def test_archive_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(2)}, tmp_path / "saved.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_pickle(tmp_path / "saved.pt")["weight"].tolist() == [1, 1]


def archive(path: Path, names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in names.items():
            file.writestr(name, content)


def test_compressed_archive_is_not_unpacked(tmp_path):
    torch.save({"model": {"a": torch.zeros(100)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        content = {name: file.read(name) for name in file.namelist()}
    content = {name: bytes(1 << 24) if "/data/" in name else each for name, each in content.items()}
    archive(tmp_path / "bomb.pt", content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bomb.pt` must be a whole PyTorch checkpoint .* compressed") as error:
        read_checkpoint(tmp_path / "bomb.pt", SVQVAE)
    assert "the archive unpacks to 167" in str(error.value.__cause__)


def test_entries_that_share_their_bytes_are_not_unpacked(tmp_path):
    archive(tmp_path / "a.pt", {"a/data.pkl": pickle.dumps({}, 2), "a/data/0": bytes(10_000)})
    content = (tmp_path / "a.pt").read_bytes()
    start, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
    directory = content[start:end] + 99 * content[content.rindex(b"PK\1\2") : end]
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 101, 101, len(directory), start, 0)
    (tmp_path / "a.pt").write_bytes(content[:start] + directory + last)
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        assert len(file.namelist()) == 101
    with pytest.raises(ValueError, match=r"a.pt` must be a whole PyTorch checkpoint .* compressed") as error:
        read_checkpoint(tmp_path / "a.pt", SVQVAE)
    assert "the archive unpacks to 1000" in str(error.value.__cause__)


def test_two_threads_read_checkpoints(golden_dir, monkeypatch):
    """torch's list of safe classes belongs to the process: one reader must not reset it for another."""
    load, both = torch.load, threading.Barrier(2)

    def slow_load(*args, **options):
        try:
            both.wait(0.2)
        except threading.BrokenBarrierError:
            both.reset()
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", slow_load)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda path: read_checkpoint(path, SVQVAE), 2 * [golden_dir / "llamagen_tiny.pt"]))
    assert {each.format.name for each in found} == {"llamagen"}
