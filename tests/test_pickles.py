import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from svqvae_hf.checkpoints import read_checkpoint
from svqvae_hf.perceptual import load_lpips
from svqvae_hf.pickles import load_pickle

# Opcodes: `)` empty tuple, `\x85` tuple of 1, `\x86` of 2, `q` to the memo, `h` from it, `}` empty dict, `s` set item.
NESTS = {
    "deep, for which the stack is too small": b")" + b"\x85" * 200_000,
    "small, of 33 million tuples when hashed": b")" + b"q\0h\0\x86" * 25,
}


def write(path: Path, key: bytes, form: str) -> Path:
    """A file of `{key: 1}`, in the form of today's files or of the oldest."""
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
def test_nests_of_tuples_are_refused(nest, form, tmp_path):
    path = write(tmp_path / "file.pt", NESTS[nest], form)
    with pytest.raises(pickle.UnpicklingError, match="a nest of tuples holds more than 10000 values"):
        load_pickle(path)
    for read in (read_checkpoint, lambda path: load_lpips("alex", path)):
        with pytest.raises(ValueError, match=r"`.*file.pt` must be .*cannot be read as one"):
            read(path)


@pytest.mark.parametrize("form", ["archive", "legacy"])
@pytest.mark.parametrize(
    "name",
    ["__builtin__ bytearray", "torch FloatTensor", "torch.cuda HalfTensor", "torch Tensor", "torch UntypedStorage"],
)
def test_calls_that_take_any_memory_are_refused(name, form, tmp_path):
    call = b"c" + name.replace(" ", "\n").encode() + b"\nK\x05\x85R"  # of the number 5
    with pytest.raises(pickle.UnpicklingError, match=f"GLOBAL {name.replace(' ', '.')} can take any memory"):
        load_pickle(write(tmp_path / "file.pt", call, form))


@pytest.mark.parametrize("form", ["archive", "legacy"])
def test_other_tuples_are_read(form, tmp_path):
    assert load_pickle(write(tmp_path / "file.pt", b")" + b"q\0h\0\x86" * 3, form)) == {
        ((((), ()), ((), ())), (((), ()), ((), ()))): 1
    }
    shared = tuple(range(9000))
    content = {"weight": torch.arange(6.0).view(2, 3), ("a", (1, 2)): [shared, shared, shared], "state": {1: ()}}
    torch.save(content, tmp_path / "saved.pt", _use_new_zipfile_serialization=form == "archive")
    read = load_pickle(tmp_path / "saved.pt")
    assert torch.equal(read.pop("weight"), content.pop("weight"))
    assert read == content
