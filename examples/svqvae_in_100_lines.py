"""SVQVAE in plain PyTorch, to read or to copy. The package computes the same ids of opaque
images faster, and tiles large ones.

python examples/svqvae_in_100_lines.py MODEL_FOLDER photo.jpg reconstruction.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from torch.nn import Conv2d


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, 1e-6)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, 1e-6)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class AttnBlock(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT[:, None].contiguous() for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # one head: (batch, 1, h * w, c)
        return x + self.proj_out(attended.squeeze(1).mT.reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, c, up):
        super().__init__()
        self.up = up
        self.conv = Conv2d(c, c, 3, padding=1) if up else Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        resized = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))
        return self.conv(resized)


class Level(nn.Module):
    def __init__(self, c_in, c, num_blocks, groups, attention=False, downsample=False, upsample=False):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(c if i else c_in, c, groups) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(c, groups) if attention else nn.Identity() for _ in range(num_blocks))
        self.downsample = Resample(c, up=False) if downsample else nn.Identity()
        self.upsample = Resample(c, up=True) if upsample else nn.Identity()

    def forward(self, x):
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def middle(c, groups):
    return nn.Sequential(ResnetBlock(c, c, groups), AttnBlock(c, groups), ResnetBlock(c, c, groups))


class Encoder(nn.Module):
    def __init__(self, c_image, base, ch_mult, num_blocks, groups, z):
        super().__init__()
        c = [base, *(base * mult for mult in ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = Conv2d(c_image, base, 3, padding=1)
        self.conv_blocks = nn.Sequential(
            *(Level(c[i], c[i + 1], num_blocks, groups, i == last, downsample=i < last) for i in range(last + 1))
        )
        self.mid = middle(c[-1], groups)
        self.norm_out = nn.GroupNorm(groups, c[-1], 1e-6)
        self.conv_out = Conv2d(c[-1], z, 3, padding=1)

    def forward(self, x):
        return self.conv_out(F.silu(self.norm_out(self.mid(self.conv_blocks(self.conv_in(x))))))


class Decoder(nn.Module):
    def __init__(self, c_image, base, ch_mult, num_blocks, groups, z):
        super().__init__()
        c = [base * mult for mult in (ch_mult[-1], *reversed(ch_mult))]
        last = len(ch_mult) - 1
        self.conv_in = Conv2d(z, c[0], 3, padding=1)
        self.mid = middle(c[0], groups)
        self.conv_blocks = nn.Sequential(
            *(Level(c[i], c[i + 1], num_blocks + 1, groups, i == 0, upsample=i < last) for i in range(last + 1))
        )
        self.norm_out = nn.GroupNorm(groups, c[-1], 1e-6)
        self.conv_out = Conv2d(c[-1], c_image, 3, padding=1)

    def forward(self, x):
        return self.conv_out(F.silu(self.norm_out(self.conv_blocks(self.mid(self.conv_in(x))))))


class SVQVAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config["codebook_l2_norm"], "only codebooks on the unit sphere"
        self.config = config
        self.f = 2 ** (len(config["encoder_ch_mult"]) - 1)
        base, blocks = config["base_channels"], config["num_res_blocks"]
        groups, z, dim = config["norm_num_groups"], config["z_channels"], config["codebook_embed_dim"]
        self.encoder = Encoder(config["in_channels"], base, config["encoder_ch_mult"], blocks, groups, z)
        self.decoder = Decoder(config["out_channels"], base, config["decoder_ch_mult"], blocks, groups, z)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config["codebook_size"], dim)})
        self.quant_conv = Conv2d(z, dim, 1)
        self.post_quant_conv = Conv2d(dim, z, 1)

    def codes(self):  # on the unit sphere, like the latents
        return F.normalize(self.quantize["embedding"].weight, dim=-1)

    def encode(self, pixels):  # uint8 (batch, 3, height, width) -> ids (batch, h, w)
        low, high = self.config["network_range"]
        bottom, right = (-side % self.f for side in pixels.shape[-2:])
        x = F.pad(low + pixels.float() / 255 * (high - low), (0, right, 0, bottom), mode="replicate")
        latents = self.quant_conv(self.encoder(x)).movedim(1, -1)  # (batch, h, w, 8)
        return (F.normalize(latents, dim=-1) @ self.codes().T).argmax(-1)

    def decode(self, ids):  # ids (batch, h, w) -> uint8 (batch, 3, h * f, w * f)
        low, high = self.config["network_range"]
        x = self.decoder(self.post_quant_conv(self.codes()[ids].movedim(-1, 1).contiguous()))
        return ((x - low) / (high - low)).clamp(0, 1).mul(255).round().byte()


def load(folder):
    model = SVQVAE(json.loads(Path(folder, "config.json").read_text())).eval().requires_grad_(False)
    model.load_state_dict(load_file(Path(folder, "diffusion_pytorch_model.safetensors")))
    return model


if __name__ == "__main__":
    folder, photo, target = sys.argv[1:]
    model = load(folder)
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None]  # (1, 3, height, width)
    ids = model.encode(pixels)
    decoded = model.decode(ids)[0, :, : image.height, : image.width]  # without the padding
    Image.fromarray(decoded.movedim(0, -1).numpy()).save(target)
