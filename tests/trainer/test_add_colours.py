import torch
import torch.nn.functional as F
from add_colours import colour_latents, replace_rarest


def test_latents_of_colours_are_those_of_flat_images(tiny_model):
    with torch.no_grad():
        latents = colour_latents(tiny_model, levels=2)
        flat = tiny_model.encode(torch.full((1, 3, 64, 64), 0.75)).latents
    assert latents.shape == (8, tiny_model.config["codebook_embed_dim"])
    middle = flat.shape[-1] // 2
    torch.testing.assert_close(latents[-1], F.normalize(flat[0, :, middle, middle], dim=0))


def test_the_rarest_codes_are_replaced():
    codes, new = torch.arange(6.0).view(6, 1), torch.tensor([[10.0], [11.0]])
    replaced = replace_rarest(codes, torch.tensor([5, 0, 3, 1, 4, 2]), new)
    assert replaced.flatten().tolist() == [0, 10, 2, 11, 4, 5]
