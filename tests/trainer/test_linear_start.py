import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny, psnr

from svqvae_hf.trainer.linear_start import start_linear
from svqvae_hf.trainer.model import initialise

CONFIGS = {
    "one group": {"norm_num_groups": 1},
    "groups": {"norm_num_groups": 2},
    "f = 8": {"encoder_ch_mult": (1, 1, 2, 4), "decoder_ch_mult": (1, 1, 2, 2)},
    "codes of any length": {"codebook_l2_norm": False},
    "signed network": {"network_range": (-1.0, 1.0), "num_res_blocks": 2},
}


def make_new(**config):
    model = make_tiny(**({"base_channels": 16, "codebook_embed_dim": 4, "encoder_ch_mult": (1, 1, 2)} | config))
    initialise(model)
    return model


def crops(photo, count, side):
    sample = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
    sample = sample.view(photo.height, photo.width, 3).movedim(-1, 0) / 255
    return sample.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).movedim(1, 0)[:count].contiguous()


def reconstruct(model, sample):
    latents = model.encode(sample).latents
    if model.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=1)
    return model.decode(latents, force_not_quantize=True).sample


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_new_model_reconstructs_images_that_it_has_not_seen(photo, config):
    sample = crops(photo, 24, 64)
    random, linear = make_new(**config), make_new(**config)
    start_linear(linear, sample[::2])
    unseen = sample[1::2]
    assert psnr(reconstruct(linear, unseen), unseen) > psnr(reconstruct(random, unseen), unseen) + 8
    assert psnr(reconstruct(linear, unseen), unseen) > 20
