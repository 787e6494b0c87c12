from cli_runner import fails, names, svqvae
from tiny_language_models import save_language_model
from transformers import AutoProcessor


def test_extends_a_language_model(tmp_path, capsys, saved_model):
    lm, out = save_language_model(tmp_path / "lm", "qwen"), tmp_path / "out"
    assert svqvae("extend-lm", lm, out, "--vqvae", saved_model, "--grids", "2x2", "2x3") == 0
    assert capsys.readouterr().out == f"written  {out} (image tokens 300 to 368, grids 2 x 2, 2 x 3)\n"
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "vqvae"} < {*names(out)}
    assert AutoProcessor.from_pretrained(out).vocabulary.grids == ((2, 2), (2, 3))


def test_wrong_inputs_are_explained(tmp_path, capsys, saved_model):
    lm, out = save_language_model(tmp_path / "lm", "qwen"), tmp_path / "out"
    capsys.readouterr()  # progress of saving
    for lm_source, grid, message in [
        (lm, "2", "a grid must be rows x columns of codes, such as 16x24, got '2'"),
        (lm, "200x200", "the largest image takes 40003. Pass smaller `--grids`"),
        (saved_model, "2x2", f"`{saved_model}` must be a causal language model of transformers with its tokenizer"),
        (tmp_path / "absent", "2x2", "there is no file or folder"),
        (tmp_path, "2x2", f"`{tmp_path}` must be a causal language model of transformers"),
    ]:
        error = fails(capsys, "extend-lm", lm_source, out, "--vqvae", saved_model, "--grids", grid)
        assert message in error
        assert not out.exists()
    (out / "file").parent.mkdir()
    (out / "file").touch()
    assert "must be a new or empty folder" in fails(capsys, "extend-lm", lm, out, "--vqvae", saved_model)
