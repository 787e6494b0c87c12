import pytest
import torch
from safetensors.torch import load_file

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoints import read_checkpoint


@pytest.mark.parametrize(
    ("number", "message"),
    [("{}", "at most 16 levels, got 1000"), ("0.res.{}", "at most 64 residual blocks per level, got 1000")],
)
def test_checkpoint_with_many_levels_or_blocks_is_refused_at_once(golden_dir, tmp_path, number, message):
    weights = load_file(golden_dir / "svqvae_tiny.safetensors")
    names = [f"encoder.conv_blocks.{number.format(index)}.x" for index in range(1000)]
    torch.save({"model": weights | {name: torch.zeros(1) for name in names}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pt", SVQVAE)
