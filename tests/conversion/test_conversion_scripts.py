import runpy
import sys
from pathlib import Path

import pytest
from checkouts import checkout
from conftest import ROOT


@pytest.fixture
def run(monkeypatch):
    def run_script(name: str, *args: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "conversion" / name), run_name="__main__")
        sys.modules.pop("svqvae", None)
        return exit_.value.code

    return run_script


@pytest.mark.slow
def test_equal_models_pass(run, golden_dir, tmp_path, capsys):
    assert run("compare.py", checkout(tmp_path, "pass"), golden_dir / "svqvae_tiny.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.endswith("ok") for line in lines)
    assert "scale 0.25  latents 0.0e+00  ids 100.000% equal, 0 near ties, 0 others" in lines[2]


@pytest.mark.parametrize("change", ["model.quant_conv.bias.data += 0.1", "model.decoder.conv_out.bias.data += 0.01"])
def test_different_models_fail(change, run, golden_dir, tmp_path, photo, capsys):
    photo.crop((0, 0, 16, 16)).save(tmp_path / "photo.png")
    model = golden_dir / "svqvae_tiny.safetensors"
    assert run("compare.py", checkout(tmp_path, change), model, "--images", tmp_path / "photo.png") == 1
    assert all(line.endswith("DIFFERS") for line in capsys.readouterr().out.splitlines())


def test_convert_script_is_the_command(run, golden_dir, tmp_path):
    assert run("convert.py", golden_dir / "svqvae_tiny.safetensors", "--output", tmp_path / "out") in (None, 0)
    assert (tmp_path / "out" / "README.md").exists()
