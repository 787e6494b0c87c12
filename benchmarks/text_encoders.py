"""Times text encoders for training LlamaGen on captions: `python benchmarks/text_encoders.py`.

training/train_llamagen.py encodes the captions of each step anew. This times the encoding of a batch of captions by T5
encoders of FLAN-T5's sizes, and one forward and backward pass of LlamaGen-B on the same number of images, both in
bfloat16. All weights are random, because the speed does not depend on them.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measuring import Row, make_parser, parse_options, report, take_turns
from torch import nn
from transformers import T5Config, T5EncoderModel

from svqvae_hf import LlamaGenConfig, LlamaGenForCausalLM

CAPTION_TOKENS = 120  # of LlamaGen's models; shorter captions are padded to it
CODES = 16384
HEAD_CHANNELS = 64  # in T5 and in LlamaGen
TERA = 10**12


@dataclass(frozen=True)
class EncoderSize:
    """Size of a T5 encoder, as the config of `google/flan-t5-*` on the Hub has it.

    Args:
        channels (`int`): `d_model`, the channels of the features.
        inner_channels (`int`): `d_ff`.
        layers (`int`): Number of layers of the encoder.
        heads (`int`): Number of attention heads.
    """

    channels: int
    inner_channels: int
    layers: int
    heads: int


SIZES = {
    "google/flan-t5-small": EncoderSize(channels=512, inner_channels=1024, layers=8, heads=6),
    "google/flan-t5-base": EncoderSize(channels=768, inner_channels=2048, layers=12, heads=12),
    "google/flan-t5-large": EncoderSize(channels=1024, inner_channels=2816, layers=24, heads=16),
    "google/flan-t5-xl": EncoderSize(channels=2048, inner_channels=5120, layers=24, heads=32),
}


def make_text_encoder(size: EncoderSize) -> T5EncoderModel:
    """Makes a text encoder in bfloat16, as the training script loads it."""
    config = T5Config(
        d_model=size.channels,
        d_ff=size.inner_channels,
        d_kv=HEAD_CHANNELS,
        num_layers=size.layers,
        num_heads=size.heads,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).to(torch.bfloat16).eval()


def count_layer_weights(encoder: T5EncoderModel) -> int:
    """Weights that are multiplied with each token. Those of the embedding are only looked up."""
    return sum(weight.numel() for weight in encoder.encoder.block.parameters())


def encode_captions(encoder: T5EncoderModel, batch: int) -> Callable[[], object]:
    """Returns a function that encodes a batch of captions."""
    tokens = torch.randint(encoder.config.vocab_size, (batch, CAPTION_TOKENS), device=encoder.device)
    mask = torch.ones_like(tokens)

    @torch.no_grad()
    def encode() -> object:
        return encoder(input_ids=tokens, attention_mask=mask)

    return encode


def train_on_images(options: argparse.Namespace) -> Callable[[], object]:
    """Returns a function that does a forward and a backward pass of LlamaGen on a batch of images with captions."""
    caption_channels = options.hidden_size
    config = LlamaGenConfig(
        codebook_size=CODES,
        num_classes=1,
        grid_size=options.side,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // HEAD_CHANNELS,
        num_condition_tokens=CAPTION_TOKENS,
        caption_dim=caption_channels,
    )
    model = LlamaGenForCausalLM(config).to(options.device)
    tokens = torch.randint(CODES, (options.batch, 1 + options.side**2), device=options.device)
    tokens[:, 0] = CODES  # stands for the caption
    features = torch.randn(options.batch, CAPTION_TOKENS, caption_channels, device=options.device)
    mask = torch.ones(features.shape[:2], dtype=torch.int64, device=options.device)

    def train() -> None:
        with torch.autocast(model.device.type, torch.bfloat16):
            output = model(input_ids=tokens, labels=tokens, prompt_embeds=features, prompt_attention_mask=mask)
        output.loss.backward()
        model.zero_grad()

    return train


def compare(options: argparse.Namespace) -> list[Row]:
    """Times all encoders and the training in turns, with a row of the table per encoder."""
    encoders: dict[str, nn.Module] = {}
    runs: dict[str, Callable[[], object]] = {"training": train_on_images(options)}
    for name in options.sizes:
        encoders[name] = make_text_encoder(SIZES[name]).to(options.device)
        runs[name] = encode_captions(encoders[name], options.batch)
    for run in runs.values():
        run()  # warms up
    _, medians = take_turns(runs, options.rounds, options.device)
    training_seconds = medians["training"] / options.batch
    rows = []
    for name, encoder in encoders.items():
        num_weights = count_layer_weights(encoder)
        seconds = medians[name] / options.batch
        row = {
            "text encoder": name,
            "channels": SIZES[name].channels,
            "weights of its layers, M": num_weights / 10**6,
            "TFLOP per caption": 2 * num_weights * CAPTION_TOKENS / TERA,
            "seconds per caption": seconds,
            "seconds of training per image": training_seconds,
            "share of the step, %": 100 * seconds / (seconds + training_seconds),
        }
        rows.append(row)
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="NAME", help="default: all")
    parser.add_argument("--batch", type=int, default=2, help="images of a step (default: %(default)s)")
    parser.add_argument("--side", type=int, default=16, help="ids per side of an image (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=768, help="of LlamaGen (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of LlamaGen (default: %(default)s)")
    options, machine = parse_options(parser)
    report(options, machine, {"A step by captions": compare(options)})


if __name__ == "__main__":
    main()
