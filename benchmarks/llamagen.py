"""LlamaGen's sampling loop and this package's pipeline on the same weights: `python benchmarks/llamagen.py`.

Both sample the ids of images from a model of LlamaGen-B's size with random weights. `LlamaGenReference` does what
LlamaGen's `generate` does: a cache of full length, a mask over its unused part, and both halves of the guided batch in
each step. Decoding the ids to images is not included.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Row, describe_machine, in_own_process, make_parser, report, take_turns
from torch import nn

from svqvae_hf import SVQVAE, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline

THEIRS, OURS = "LlamaGen's loop", "pipeline"
CODES, NUM_CLASSES = 16384, 1000


class Norm(nn.Module):
    """RMSNorm whose normalisation is in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises `(..., channels)`."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    """Attention over a cache of full length."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(channels, 3 * channels, bias=False)
        self.wo = nn.Linear(channels, channels, bias=False)

    def make_cache(self, batch: int, length: int) -> None:
        """Makes an empty cache in the type of the weights."""
        shape = (2, batch, self.heads, length, self.wo.in_features // self.heads)
        self.cache = self.wo.weight.new_zeros(shape)

    def forward(
        self, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attends from `(batch, length, channels)` to all positions that the mask `(length, all)` allows."""
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in self.wqkv(x).chunk(3, dim=-1))
        q, k = (rotate(each, table) for each in (q, k))
        self.cache[0, :, :, positions] = k.transpose(1, 2)
        self.cache[1, :, :, positions] = v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), self.cache[0], self.cache[1], attn_mask=mask)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(channels, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(..., channels)`."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Attention and feed-forward block."""

    def __init__(self, channels: int, inner: int, heads: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(channels, heads), FeedForward(channels, inner)
        self.attention_norm, self.ffn_norm = Norm(channels), Norm(channels)

    def forward(
        self, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Maps `(batch, length, channels)`."""
        x = x + self.attention(self.attention_norm(x), table, positions, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaGenReference(nn.Module):
    """LlamaGen's language model for classes, written for this benchmark, with the names of its weights.

    Args:
        grid_size (`int`): Rows and columns of ids.
        channels (`int`): Channels.
        inner (`int`): Channels within a feed-forward block.
        layers (`int`): Number of layers.
        heads (`int`): Number of heads.
        codes (`int`): Number of codes.
        num_classes (`int`): Number of classes.
    """

    def __init__(
        self, grid_size: int, channels: int, inner: int, layers: int, heads: int, codes: int, num_classes: int
    ):
        super().__init__()
        self.grid_size, self.num_classes = grid_size, num_classes
        self.tok_embeddings = nn.Embedding(codes, channels)
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, channels)})
        self.layers = nn.ModuleList(Layer(channels, inner, heads) for _ in range(layers))
        self.norm = Norm(channels)
        self.output = nn.Linear(channels, codes, bias=False)
        self.table = rotation_table(grid_size, channels // heads)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Float32 logits `(batch, codes)` after embeddings `(batch, length, channels)` at these positions."""
        for layer in self.layers:
            x = layer(x, self.table[positions], positions, self.mask[positions])
        return self.output(self.norm(x))[:, -1].float()

    @torch.no_grad()
    def generate(
        self, labels: torch.Tensor, guidance_scale: float = 1.0, top_k: int = 0, greedy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples ids `(batch, grid_size ** 2)`, and returns them with the logits of each step after guidance."""
        count, ids, steps = len(labels), [], self.grid_size**2
        length = 8 * math.ceil((1 + steps) / 8)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        self.mask = torch.ones(length, length, dtype=torch.bool, device=labels.device).tril()
        for layer in self.layers:
            layer.attention.make_cache(len(labels), length)
        x = self.cls_embedding["embedding_table"](labels)[:, None]
        seen = []
        for step in range(steps):
            logits = self(x, torch.tensor([step], device=labels.device))
            if guided:
                conditional, null = logits.chunk(2)
                logits = null + (conditional - null) * guidance_scale
            seen.append(logits)
            ids.append(logits.argmax(-1) if greedy else draw(logits, top_k))
            x = self.tok_embeddings(ids[-1].repeat(len(labels) // count))[:, None]
        return torch.stack(ids, dim=1), torch.stack(seen, dim=1)


def draw(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Draws one id per row from the most likely ones."""
    if top_k:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def rotation_table(grid_size: int, head_dim: int) -> torch.Tensor:
    """Cosines and sines `(1 + grid_size ** 2, head_dim / 2, 2)`, rows first, and zeros at the class."""
    half = head_dim // 2
    frequencies = 1 / 10000 ** (torch.arange(0, half, 2) / half)
    places = torch.cartesian_prod(torch.arange(grid_size), torch.arange(grid_size))
    angles = (places[..., None] * frequencies).flatten(1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(1, half, 2), table])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring channels of `(batch, length, heads, head_dim)`, in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


def make_reference(options: argparse.Namespace) -> LlamaGenReference:
    """Reference with random weights, always the same."""
    torch.manual_seed(0)
    sizes = (options.hidden_size, options.inner_size, options.layers, options.heads)
    model = LlamaGenReference(options.side, *sizes, CODES, NUM_CLASSES)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.to(getattr(torch, options.dtype)).eval()


def prepare(name: str, batch: int, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """Returns a run of a contestant as a function, whose result is the ids."""
    labels = torch.arange(batch) % NUM_CLASSES
    if name == THEIRS:
        reference = make_reference(options)
        return lambda: reference.generate(labels, options.guidance_scale, options.top_k)[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt.pt")
        torch.save(make_reference(options).state_dict(), file)
        model = LlamaGenForCausalLM.from_single_file(
            file, grid_size=options.side, num_attention_heads=options.heads, dtype=getattr(torch, options.dtype)
        )
    vqvae = SVQVAE(codebook_size=CODES, base_channels=32)  # decodes nothing here
    pipeline = SVQVAEAutoregressivePipeline.from_llamagen(vqvae, model)
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": options.guidance_scale, "top_k": options.top_k, "output_type": "latent"}
    return lambda: pipeline(labels, **call).images.flatten(1)


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--side", type=int, default=16, help="ids per side of the grid (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images per batch (default: 1 8)")
    parser.add_argument("--hidden-size", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--inner-size", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("--device must be cpu")
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    rows: list[Row] = []
    for batch in options.batches:
        runs = {name: prepare(name, batch, options) for name in (THEIRS, OURS)}
        seconds = take_turns(runs, options.rounds, options.device)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        del runs
        for name in seconds:
            cost = in_own_process(options.device, options.threads, prepare, name, batch, options)
            rows.append(
                {
                    "sampling": name,
                    "batch": batch,
                    "milliseconds per id of the batch": 1e3 * medians[name] / options.side**2,
                    "times as fast": medians[THEIRS] / medians[name],
                    "peak memory beyond the weights, MiB": cost.peak_mib,
                    "all seconds": seconds[name],
                }
            )
    report(options, machine, {"Sampling": rows})


if __name__ == "__main__":
    main()
