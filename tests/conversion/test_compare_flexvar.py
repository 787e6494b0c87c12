"""The script that compares a next-scale transformer with FlexVAR's code."""

import importlib.util
import sys

import pytest
from conftest import ROOT
from next_scale_golden import GOLDEN

# A stand-in for FlexVAR's model: the same names, but it runs this library's code, changed or not.
FLEXVAR = """
import torch
from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline

class FlexVAR(torch.nn.Module):
    def __init__(self, tokenizer, num_classes, depth, embed_dim, num_heads, **options):
        super().__init__()
        self.codebook = {{"codebook_size": tokenizer.vocab_size, "codebook_embed_dim": tokenizer.Cvae}}
        self.model = NextScaleTransformer(depth, num_heads, embed_dim // num_heads, num_classes, **self.codebook)
        self.state_dict = self.model.state_dict

    def load_state_dict(self, weights):
        self.model.load_state_dict(weights)
        {change}

    def forward(self, labels, resized, schedule):
        sizes = [(side, side) for side in schedule]
        parts = resized.split([side**2 for side in schedule[1:]], dim=1)
        codes = [part.mT.unflatten(2, size) for part, size in zip(parts, sizes[1:])]
        return self.model(labels, codes, sizes).logits

    def autoregressive_infer_cfg(self, tokenizer, images, labels, schedule, seed, used_llamagen_cfg=False, **sampling):
        vqvae = SVQVAE(base_channels=32, **self.codebook)
        vqvae.quantize.embedding.weight.data = tokenizer.quantize.embedding.weight.data
        side, cfg, top_p = schedule[-1] * vqvae.f, sampling.pop("cfg"), sampling.pop("top_p")
        return SVQVAENextScalePipeline(vqvae, self.model, schedule=[1, 16])(
            labels.tolist(), side, side, schedule=schedule, output_type="latent",
            guidance_scale=cfg if used_llamagen_cfg else cfg + 1,
            guidance_mode="constant" if used_llamagen_cfg else "rising",
            generator=torch.Generator().manual_seed(seed), top_p=top_p or 1.0, **sampling,
        ).images.flatten(1)
"""


@pytest.fixture
def compare(monkeypatch, tmp_path):
    def run_script(change: str) -> int:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "flexvar.py").write_text(FLEXVAR.format(change=change))
        return main(tmp_path, GOLDEN)

    def main(*args) -> int:
        spec = importlib.util.spec_from_file_location("compare_flexvar", ROOT / "conversion" / "compare_flexvar.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        monkeypatch.setattr(script, "SCHEDULES", ((1, 2, 4),))
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["compare_flexvar.py", *map(str, args)])
        try:
            return script.main()
        finally:
            for name in ("models", "models.flexvar"):
                sys.modules.pop(name, None)

    run_script.main = main
    return run_script


def test_equal_transformers_pass(compare, capsys):
    assert compare("pass") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("  ok") for line in lines)


def test_different_transformers_fail(compare, capsys):
    assert compare("self.model.head.weight.data.neg_()") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("DIFFERS") for line in lines)
