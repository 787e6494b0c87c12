from cli_runner import names, svqvae
from tiny_language_models import save_language_model
from transformers import AutoProcessor


def test_extends_a_language_model(tmp_path, capsys, saved_model):
    lm, out = save_language_model(tmp_path / "lm", "qwen"), tmp_path / "out"
    assert svqvae("extend-lm", lm, out, "--vqvae", saved_model, "--grids", "2x2", "2x3") == 0
    assert capsys.readouterr().out == f"written  {out} (image tokens 300 to 368, grids 2 x 2, 2 x 3)\n"
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "vqvae"} < {*names(out)}
    assert AutoProcessor.from_pretrained(out).vocabulary.grids == ((2, 2), (2, 3))
