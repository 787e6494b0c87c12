import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from llamagen_checkout import MODULES, make_checkout

# A stand-in for the original's checkout: the same names, but it runs this library's model, changed or not.
CHECKOUT = """
from types import SimpleNamespace

from svqvae_hf import SVQVAE

Encoder = Decoder = ModelArgs = dict

class ScalableVQVAE:
    @staticmethod
    def load(path, args):
        model = SVQVAE.from_single_file(path)
        {change}
        return SimpleNamespace(
            encoder=model.encoder,
            quant_conv=model.quant_conv,
            quantize=model.quantize,
            decode=lambda quantized: model.decode(quantized, force_not_quantize=True).sample,
        )
"""


@pytest.fixture
def run(monkeypatch):
    def run_script(name: str, *args: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "conversion" / name), run_name="__main__")
        for module in ("svqvae", *MODULES):
            sys.modules.pop(module, None)
        return exit_.value.code

    return run_script


def checkout(folder: Path, change: str) -> Path:
    (folder / "svqvae.py").write_text(CHECKOUT.format(change=change))
    return folder


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_equal_language_models_pass(kind, run, golden_dir, tmp_path, capsys):
    file = golden_dir / f"llamagen_gpt_{kind}_tiny.pt"
    sizes = ("--grid-size", "2", "--num-heads", "4")
    assert run("compare_llamagen.py", make_checkout(tmp_path), file, *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 2 * 2)
    assert lines[0] == "float32  logits of one pass up to 0.0e+00 apart, allowed 1.0e-04  ok"
    assert lines[1] == "float32  guidance 1, plain attention: all 4 ids equal in 8 of 8 images  ok"


def test_different_language_models_fail(run, golden_dir, tmp_path, capsys):
    checkout = make_checkout(tmp_path, "self.model.lm_head.weight.data[:9] += 1")
    file = golden_dir / "llamagen_gpt_c2i_tiny.pt"
    assert run("compare_llamagen.py", checkout, file, "--grid-size", "2", "--num-heads", "4") == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("DIFFERS") for line in lines[:5])


def test_convert_script_is_the_command(run, golden_dir, tmp_path):
    assert run("convert.py", golden_dir / "svqvae_tiny.safetensors", tmp_path / "out") in (None, 0)
    assert (tmp_path / "out" / "README.md").exists()
