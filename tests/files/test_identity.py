"""What a model, an input and an output is: equal for what does the same, different for what does not."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svqvae_files.file_names import DEFAULT_GENERATOR, DEFAULT_MODEL
from svqvae_files.identity import (
    InputIdentity,
    input_identity,
    model_digest,
    output_identity,
    set_digest,
    value_digest,
)


@pytest.fixture
def folder(tmp_path):
    """Folder of a model with a part and a tokenizer."""
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.float16)}
    save_file(weights, folder / "model.safetensors")
    save_file({"a": np.ones(3, np.float32)}, folder / "part" / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"size": 3, "nested": {"deep": [1, 2], "transformers_version": "5"}})
    )
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=4, sort_keys=True))


def save_weights(folder, change=lambda weights: weights, metadata=None):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata)


SAME = {
    "notes in the config": lambda folder: edit_config(folder, _diffusers_version="9", _name_or_path="/home/me"),
    "nested notes": lambda folder: edit_config(folder, nested={"transformers_version": "6", "deep": [1, 2]}),
    "metadata of the weights": lambda folder: save_weights(folder, metadata={"format": "pt"}),
    "order of the weights": lambda folder: save_weights(folder, lambda weights: dict(reversed(weights.items()))),
    "a card": lambda folder: (folder / "README.md").write_text("card"),
    "a note": lambda folder: (folder / "notes.txt").write_text("note"),
    "results": lambda folder: (folder / "report.json").write_text("[1]"),
    "a context model": lambda folder: (folder / "context_model.safetensors").touch(),
    "a hidden folder": lambda folder: shutil.copytree(folder, folder / ".cache"),
    "a checkpoint of a run": lambda folder: shutil.copytree(folder, folder / "checkpoint-5"),
    "times": lambda folder: [os.utime(path, (1, 1)) for path in folder.rglob("*")],
    "a link to itself": lambda folder: (folder / "part" / "up").symlink_to(folder),
}
OTHER = {
    "a value of the config": lambda folder: edit_config(folder, size=4),
    "a nested value": lambda folder: edit_config(folder, nested={"deep": [2, 1]}),
    "a weight": lambda folder: save_weights(folder, lambda weights: weights | {"a": weights["a"] + 1e-6}),
    "a name": lambda folder: save_weights(folder, lambda weights: {"a": weights["a"], "c": weights["b"]}),
    "a shape": lambda folder: save_weights(folder, lambda weights: weights | {"a": weights["a"].reshape(3, 2)}),
    "a type": lambda folder: save_weights(folder, lambda weights: weights | {"a": weights["a"].view(np.int32)}),
    "a vocabulary": lambda folder: (folder / "vocab.txt").write_text("b\na\n"),
    "a template": lambda folder: (folder / "chat_template.jinja").write_text("{{ y }}"),
    "a part": lambda folder: save_file({"a": np.zeros(3, np.float32)}, folder / "part" / "model.safetensors"),
    "a missing part": lambda folder: shutil.rmtree(folder / "part"),
    "a moved part": lambda folder: (folder / "part").rename(folder / "other"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_changes_nothing_does_not_change_the_digest(folder, change):
    before = model_digest(folder)
    change(folder)
    assert model_digest(folder) == before


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_changes_a_model_changes_its_digest(folder, change):
    before = model_digest(folder)
    change(folder)
    assert model_digest(folder) != before


def test_a_model_edited_with_an_older_time_is_another_one(folder):
    before = model_digest(folder)
    time = (folder / "config.json").stat().st_mtime_ns
    edit_config(folder, size=5)
    os.utime(folder / "config.json", ns=(time - 10**9, time - 10**9))
    assert model_digest(folder) != before


def test_a_copy_and_a_link_are_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(folder)
    assert model_digest(folder) == model_digest(tmp_path / "copy") == model_digest(tmp_path / "link")
    assert model_digest(DEFAULT_MODEL) != model_digest(DEFAULT_GENERATOR)


def test_damaged_models_are_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 20, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"`{weights}` must "):
            model_digest(folder)
    weights.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is cut or has further bytes"):
        model_digest(folder)
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="its header is damaged"):
        model_digest(folder)
    weights.write_bytes(whole)
    for content in ("", "[]", "null", '"a"', "{", "[" * 10**5):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"`{folder}/config.json` must hold a JSON object"):
            model_digest(folder)
    with pytest.raises(FileNotFoundError, match="nowhere` cannot be read"):
        model_digest(tmp_path / "nowhere")


def test_an_input_is_its_name_size_and_time(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "b.png"
    path.write_bytes(b"123")
    os.utime(path, ns=(7, 5))
    assert input_identity(tmp_path, "a/b.png") == InputIdentity("a/b.png", 3, "5")
    tmp_path.joinpath("a").rename(tmp_path / "c")
    assert input_identity(tmp_path / "c", "b.png") == InputIdentity("b.png", 3, "5")
    with pytest.raises(FileNotFoundError):
        input_identity(tmp_path, "a/b.png")


def test_a_set_is_all_its_inputs_in_order_its_columns_and_its_classes():
    files = [InputIdentity(name, 1, "2") for name in "abc"]
    digests = {
        set_digest(files),
        set_digest(files[::-1]),
        set_digest(files[:2]),
        set_digest([*files[:2], InputIdentity("c", 1, "1")]),
        set_digest(files, ["text"]),
        set_digest(files, class_names=[]),
        set_digest(files, class_names=["text"]),
        set_digest(files, class_names=["b", "a"]),
        set_digest(files, class_names=["a", "b"]),
    }
    assert len(digests) == 9
    assert set_digest(iter(files)) == set_digest(files, ())


def test_an_output_is_its_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    identity = output_identity(path)
    assert identity.size == 3
    assert identity.checksum.startswith("ba7816bf")
    path.write_bytes(b"abd")
    assert output_identity(path) != identity
    with pytest.raises(FileNotFoundError, match="gone` cannot be read"):
        output_identity(tmp_path / "gone")


def test_values_do_not_depend_on_the_order_of_keys():
    assert value_digest({"a": 1, "b": [2]}) == value_digest({"b": [2], "a": 1})
    assert value_digest({"a": 1, "b": [2]}) != value_digest({"a": 1, "b": ["2"]})


def test_identities_need_no_torch():
    slow = "{'torch', 'diffusers', 'PIL'}"
    code = f"import sys, svqvae_files.hub, svqvae_files.identity; assert not {slow} & set(sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
