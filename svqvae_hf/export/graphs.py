"""Encoder and decoder as traced graphs: image to ids, ids to image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.resizing import map_range

TRACED_GRID = (2, 3, 5)  # batch, rows and columns of ids


class EncoderGraph(nn.Module):
    """Image to ids, untiled. The codebook is searched in one piece, so the graph works for any number of ids.

    Args:
        model ([`SVQVAE`]): Model in float32.
    """

    def __init__(self, model: SVQVAE):
        super().__init__()
        self.encoder, self.quant_conv, self.f = model.encoder, model.quant_conv, model.f
        self.ranges = model.config["pixel_range"], model.config["network_range"]
        self.l2_norm = model.config["codebook_l2_norm"]
        codes = _codes(model)
        self.codes = nn.Buffer(codes.T.contiguous())  # (codebook_embed_dim, codebook_size)
        self.offset = None if self.l2_norm else nn.Buffer(codes.square().sum(-1) / 2)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """`(batch, in_channels, height, width)` -> int64 ids `(batch, ceil(height / f), ceil(width / f))`."""
        rows, columns = ((side + self.f - 1) // self.f for side in sample.shape[-2:])
        # Pad by the most that any size needs, then crop: the padding of one size is not a constant of the graph.
        sample = F.pad(sample, (0, self.f - 1, 0, self.f - 1), mode="replicate")
        sample = sample[..., : rows * self.f, : columns * self.f]
        latents = self.quant_conv(self.encoder(map_range(sample, *self.ranges)))
        latents = latents.permute(0, 2, 3, 1)  # (batch, h, w, codebook_embed_dim)
        if self.l2_norm:
            latents = F.normalize(latents, dim=-1)
        scores = latents @ self.codes
        return (scores if self.offset is None else scores - self.offset).argmax(-1)


class DecoderGraph(nn.Module):
    """Ids to image, untiled and clamped to `pixel_range`.

    Args:
        model ([`SVQVAE`]): Model in float32.
    """

    def __init__(self, model: SVQVAE):
        super().__init__()
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        self.ranges = model.config["network_range"], model.config["pixel_range"]
        self.codes = nn.Buffer(_codes(model))  # (codebook_size, codebook_embed_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, h, w)` -> `(batch, out_channels, h * f, w * f)`."""
        latents = F.embedding(ids, self.codes).permute(0, 3, 1, 2)
        return map_range(self.decoder(self.post_quant_conv(latents)), *self.ranges).clamp(*self.ranges[1])


def trace_graphs(model: SVQVAE) -> tuple[ExportedProgram, ExportedProgram]:
    """Traces encoder and decoder, with dynamic batch, height and width."""
    return (
        trace_graph(EncoderGraph(model), example_images(model, TRACED_GRID), (0, 2, 3)),
        trace_graph(DecoderGraph(model), torch.zeros(TRACED_GRID, dtype=torch.int64), (0, 1, 2)),
    )


def example_images(model: SVQVAE, grid: tuple[int, int, int]) -> torch.Tensor:
    """Makes images for a grid of ids: noise on a coarse pattern, the same at each call."""
    batch, rows, columns = grid
    generator = torch.Generator().manual_seed(0)
    channels, size = model.config["in_channels"], (rows * model.f, columns * model.f)
    coarse = F.interpolate(torch.rand((batch, channels, rows, columns), generator=generator), size, mode="bilinear")
    low, high = model.config["pixel_range"]
    return low + (high - low) * torch.lerp(coarse, torch.rand((batch, channels, *size), generator=generator), 0.25)


def _codes(model: SVQVAE) -> torch.Tensor:
    """Codebook as the search uses it, `(codebook_size, codebook_embed_dim)`."""
    return model.quantize.get_codebook_entry(torch.arange(model.config["codebook_size"])).detach()


def trace_graph(graph: nn.Module, example: torch.Tensor, dynamic: Sequence[int]) -> ExportedProgram:
    """Traces a graph with an example input, some of whose dimensions are dynamic."""
    dims = dict.fromkeys(dynamic, Dim.DYNAMIC)
    program = torch.export.export(graph, (example,), dynamic_shapes=(dims,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    # The tracer demands at least two images, rows and columns of ids, although the graph works for one of each:
    # `compare_graphs` runs it on one.
    program._guards_code = []
    for symbol, sides in program.range_constraints.items():
        program.range_constraints[symbol] = type(sides)(1, sides.upper)
    return program
