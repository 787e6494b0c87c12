# ruff: noqa  (in diffusers' style)
"""Converts an original SVQVAE file: the names of its weights stay, and the config is read from their shapes.

python scripts/convert_svqvae_to_diffusers.py svqvae.safetensors OUT
"""

import argparse
import re

from safetensors.torch import load_file

from diffusers import SVQVAE


def read_config(state: dict) -> dict:
    """Config of the weights. Their value range is [0, 1], as in the Open Model Initiative's release."""
    base = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(match[1]) for match in map(re.compile(r"encoder\.conv_blocks\.(\d+)").match, state) if match)
    blocks = 1 + max(
        int(match[1]) for match in map(re.compile(r"encoder\.conv_blocks\.0\.res\.(\d+)").match, state) if match
    )

    def multipliers(network: str) -> list:
        return [state[f"{network}.conv_blocks.{level}.res.0.conv1.weight"].shape[0] // base for level in range(levels)]

    return {
        "base_channels": base,
        "encoder_ch_mult": multipliers("encoder"),
        "decoder_ch_mult": multipliers("decoder")[::-1],
        "num_res_blocks": blocks,
        "z_channels": state["encoder.conv_out.weight"].shape[0],
        "codebook_size": state["quantize.embedding.weight"].shape[0],
        "codebook_embed_dim": state["quantize.embedding.weight"].shape[1],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="original safetensors file")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--norm_num_groups", type=int, default=32)
    args = parser.parse_args()
    state = load_file(args.source)
    state.pop("quantize.codebook_used", None)  # a usage log
    model = SVQVAE(**read_config(state), norm_num_groups=args.norm_num_groups)
    model.load_state_dict(state)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
