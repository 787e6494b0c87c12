import pytest
import svqvae_in_100_lines as plain
import torch
import torch.nn.functional as F
from conftest import ROOT

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.models.layers import RepeatConv2d


@pytest.fixture
def models():
    return SVQVAE.from_pretrained(DEFAULT_MODEL).eval(), plain.load(DEFAULT_MODEL)


@pytest.fixture
def plain_operations(monkeypatch):
    """The package with plain operations instead of its fast ones; `test_layers.py` compares the two."""
    monkeypatch.setattr("svqvae_hf.models.modeling_svqvae.fast_layout", lambda hidden: hidden)

    def forward(self, hidden, shared):
        return F.conv2d(F.interpolate(hidden, scale_factor=2.0), self.weight, self.bias, padding=1)

    monkeypatch.setattr(RepeatConv2d, "forward", forward)


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad", "plain_operations")
def test_ids_and_pixels_are_bit_equal_to_the_packages(models, photo):
    ours, other = models
    processor = SVQVAEImageProcessor()
    batch = processor(photo)
    pixels = (batch["pixel_values"] * 255).round().byte()
    ids = other.encode(pixels)
    assert torch.equal(ids, ours.encode_tokens(batch["pixel_values"]))
    assert torch.equal(other.decode(ids), (ours.decode_tokens(ids) * 255).round().byte())
    assert ids.unique().numel() > 500


def test_it_has_the_weights_of_the_package_and_about_100_lines_of_code(models):
    assert models[1].state_dict().keys() == models[0].state_dict().keys()
    source = (ROOT / "examples" / "svqvae_in_100_lines.py").read_text()
    code = source[source.index("class ResnetBlock") : source.index("def load")]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 100
