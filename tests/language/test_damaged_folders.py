"""Each file of a language model, an adapter and a LlamaGen, damaged in turn: the same image, or one line of error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import svqvae
from generators import make_autoregressive
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_language_models import extended, load_extended

from svqvae_hf import SVQVAE
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.loaders.adapters import BASE_FILE, record_base

DAMAGES = ("delete", "empty", "halve", "list", "null", "swap")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft


def damage(path: Path, kind: str, other: Path) -> None:
    """Damages a file; `other` is the folder of another model, with files of the same names."""
    content = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        shutil.copy(other, path)
    else:
        path.write_bytes({"empty": b"", "halve": content[: len(content) // 2], "list": b"[]", "null": b"null"}[kind])


def draw(capsys, out: Path, *words: object) -> bytes | None:
    """Image of the command; None if it ended with an error of one line."""
    capsys.readouterr()
    code = svqvae("generate", *words, "--seed", 1, "--output", out)
    captured = capsys.readouterr()
    if code == 0:
        (image,) = out.glob("*.png")
        return image.read_bytes()
    assert code == 2, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("svqvae: error: ")]
    assert len(errors) == 1
    assert "Traceback" not in captured.err
    return None


def silent_damages(folder: Path, other: Path, tmp_path: Path, capsys, command: list) -> list[str]:
    """Damages each file in turn, and runs a command on the folder.

    Returns:
        `list[str]`: File and kind of each damage that led to another image without an error.
    """
    expected = draw(capsys, tmp_path / "whole", *command)
    assert expected is not None
    silent = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or path.suffix == ".md":
            continue
        content = path.read_bytes()
        for kind in DAMAGES:
            if kind == "swap" and not (other / name).is_file():
                continue
            damage(path, kind, other / name)
            image = draw(capsys, tmp_path / f"{name.as_posix().replace('/', '_')}_{kind}", *command)
            if image not in (None, expected):
                silent.append(f"{name} {kind}")
            path.write_bytes(content)
    return silent


@pytest.mark.slow
def test_language_models(tmp_path, capsys):
    folder = tmp_path / "lm"
    model, processor = load_extended("qwen")
    model.generation_config.generation_kwargs = {"guidance_scale": 3.0, "temperature": 0.5}
    ImageLanguageModel(model, processor).save_pretrained(folder)
    del model.generation_config.generation_kwargs
    command = ["--model", folder, "--prompt", "a cat"]
    assert silent_damages(folder, extended("llama"), tmp_path, capsys, command) == []


def test_the_decoder_of_another_model_is_an_error(tmp_path):
    folder = shutil.copytree(extended("qwen"), tmp_path / "lm")
    vqvae = SVQVAE.from_pretrained(folder / "vqvae")
    vqvae.decoder.conv_out.bias.data += 1
    vqvae.save_pretrained(folder / "vqvae")
    with pytest.raises(ValueError, match="vqvae/diffusion_pytorch_model.safetensors` must be as it was saved with"):
        ImageLanguageModel.from_pretrained(folder)


@pytest.mark.slow
def test_llamagen(tmp_path, capsys):
    make_autoregressive().save_pretrained(tmp_path / "pipeline")
    make_autoregressive(hidden_size=64).save_pretrained(tmp_path / "other")
    command = ["--model", tmp_path / "pipeline", "--class", 1]
    folder = tmp_path / "pipeline" / "language_model"
    assert silent_damages(folder, tmp_path / "other" / "language_model", tmp_path, capsys, command) == []


def save_adapter(folder: Path, family: str) -> Path:
    """A LoRA adapter that changes images, with the record of its base."""
    model = ImageLanguageModel.from_pretrained(extended(family)).language_model
    targets = "all-linear" if family == "neox" else ["q_proj", "v_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder)
    record_base(folder, str(extended(family)))
    return folder


@pytest.mark.slow
def test_adapters(tmp_path, capsys):
    folder, other = save_adapter(tmp_path / "adapter", "qwen"), save_adapter(tmp_path / "other", "llama")
    command = ["--model", extended("qwen"), "--adapter", folder, "--prompt", "a cat"]
    plain = draw(capsys, tmp_path / "plain", "--model", extended("qwen"), "--prompt", "a cat")
    assert plain != draw(capsys, tmp_path / "adapted", *command)
    (folder / "README.md").unlink(missing_ok=True)
    content = (folder / BASE_FILE).read_bytes()
    assert silent_damages(folder, other, tmp_path, capsys, command) == []
    assert (folder / BASE_FILE).read_bytes() == content


def test_an_adapter_without_its_tensors_or_of_another_base_is_an_error(tmp_path, capsys):
    folder = save_adapter(tmp_path / "adapter", "qwen")
    weights = load_file(folder / "adapter_model.safetensors")
    command = ["generate", "--model", extended("qwen"), "--output", tmp_path / "out"]
    command += ["--adapter", folder, "--prompt", "a cat"]
    half = dict(sorted(weights.items())[: len(weights) // 2])
    for kept, message in [(half, "lacks 4 of 8: "), ({}, "lacks 8 of 8: ")]:
        save_file(kept, folder / "adapter_model.safetensors")
        record_base(folder, str(extended("qwen")))
        assert svqvae(*command) == 2
        assert message in capsys.readouterr().err
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    assert svqvae(*command) == 2
    assert "but holds others. Restore the file" in capsys.readouterr().err
    save_file(weights, folder / "adapter_model.safetensors")
    record_base(folder, str(extended("qwen")))
    base = tmp_path / "base"
    shutil.copytree(extended("qwen"), base)
    changed = load_file(base / "model.safetensors")
    changed["model.norm.weight"] = torch.full_like(changed["model.norm.weight"], 2)
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    command[2] = base
    assert svqvae(*command) == 2
    assert "was made for another model or other weights of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_processor_of_another_language_model_is_an_error(tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(extended("qwen"), folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(extended("neox") / name, folder)
    with pytest.raises(ValueError, match="the language model and its processor must have the same image tokens"):
        ImageLanguageModel.from_pretrained(folder)


def test_words_of_another_tokenizer_are_an_error(tmp_path):
    """The tokens of images and the number of words are the same, but the words are others."""
    folder = tmp_path / "lm"
    shutil.copytree(extended("qwen"), folder)
    text = (folder / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer.json` must be as it was saved with the processor"):
        ImageLanguageModel.from_pretrained(folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    del config["parts"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the tokenizer must be the one that the language model was made for"):
        ImageLanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_missing_parts_are_an_error(tmp_path, name):
    folder = tmp_path / "lm"
    shutil.copytree(extended("qwen"), folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"must hold `{name}`, which was saved with its processor. Restore the file"):
        ImageLanguageModel.from_pretrained(folder)


def test_no_folder_of_this_machine_is_saved(tmp_path):
    ImageLanguageModel.from_pretrained(extended("qwen")).save_pretrained(tmp_path / "lm")
    for path in [*extended("qwen").rglob("*.json"), *(tmp_path / "lm").rglob("*.json")]:
        assert "/tmp" not in path.read_text(), path
        assert str(tmp_path) not in path.read_text(), path
