import shutil

from cli_runner import fails, names, svqvae
from huggingface_hub import ModelCard
from tiny_language_models import save_language_model
from transformers import AutoProcessor


def test_extends_a_language_model(tmp_path, capsys, saved_model):
    lm, out = save_language_model(tmp_path / "lm", "qwen"), tmp_path / "out"
    assert svqvae("extend-lm", lm, "--output", out, "--vqvae", saved_model, "--grids", "2x2", "2x3") == 0
    assert capsys.readouterr().out == f"written  {out} (image tokens 300 to 368, grids 2 x 2, 2 x 3)\n"
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "vqvae"} < {*names(out)}
    assert AutoProcessor.from_pretrained(out).vocabulary.grids == ((2, 2), (2, 3))


def test_extends_by_the_bundled_tokenizer_and_writes_a_card(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm, out = save_language_model(tmp_path / "lm", "qwen"), tmp_path / "out"
    assert svqvae("extend-lm", lm, "--output", out, "--grids", "2x2") == 0
    capsys.readouterr()
    card = ModelCard((out / "README.md").read_text())
    assert card.data.to_dict()["license"] == "cc-by-sa-4.0"
    assert card.data.library_name == "transformers"
    assert 'ImageLanguageModel.from_pretrained("out")' in card.text
    assert "| SVQVAE | `bundled` (licence: cc-by-sa-4.0) |" in card.text
    (tmp_path / "bundled").mkdir()  # the default is no folder here
    assert svqvae("extend-lm", lm, "--output", tmp_path / "again", "--grids", "2x2") == 0


def test_a_cut_tokenizer_is_named_and_not_the_language_model(tmp_path, capsys, saved_model):
    lm = save_language_model(tmp_path / "lm", "qwen")
    vqvae = shutil.copytree(saved_model, tmp_path / "vqvae")
    weights = vqvae / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    capsys.readouterr()
    error = fails(capsys, "extend-lm", lm, "--output", tmp_path / "out", "--vqvae", vqvae)
    assert f"could not load the model `{vqvae}`: its weight file is empty, cut short" in error
    shutil.copy(f"{saved_model}/{weights.name}", weights)
    (lm / "model.safetensors").write_bytes(b"")
    error = fails(capsys, "extend-lm", lm, "--output", tmp_path / "out", "--vqvae", vqvae)
    assert f"`{lm}/model.safetensors` must be a safetensors file" in error
    assert not (tmp_path / "out").exists()
