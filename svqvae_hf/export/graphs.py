"""Encoder and decoder as traced graphs: image to ids, ids to image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

from svqvae_hf.export.norms import with_nested_means
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.resizing import map_range

TRACED_GRID = (2, 3, 5)  # batch, rows and columns of ids


class EncoderGraph(nn.Module):
    """Image to ids, untiled. The codebook is searched in one piece, so the graph works for any number of ids.

    Args:
        model ([`SVQVAE`]): Model in float32. Its encoder is copied.
    """

    def __init__(self, model: SVQVAE):
        super().__init__()
        self.encoder = with_nested_means(model.encoder)  # its own norms would be inexact in a graph, see `norms.py`
        self.quant_conv = model.quant_conv
        self.downsampling = model.f  # pixels per latent along each side
        self.pixel_range = model.config["pixel_range"]
        self.network_range = model.config["network_range"]
        self.l2_norm = model.config["codebook_l2_norm"]
        codes = codebook(model)
        # `forward` finds the nearest code of a latent. Its score of a code is the product of both, minus half of the
        # code's squared length.
        self.codes = nn.Buffer(codes.T.contiguous())  # (codebook_embed_dim, codebook_size)
        self.half_squares = nn.Buffer(codes.square().sum(-1) / 2)  # (codebook_size,)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """`(batch, in_channels, height, width)` -> int64 ids `(batch, ceil(height / f), ceil(width / f))`."""
        # The sides must become multiples of f. How much padding that takes depends on the image, but the padding of a
        # graph is a constant. So the graph pads by the most that any image needs, and crops what is too much.
        height, width = sample.shape[-2:]
        most_padding = self.downsampling - 1
        rows = (height + most_padding) // self.downsampling  # of latents: height / f, rounded up
        columns = (width + most_padding) // self.downsampling
        sample = F.pad(sample, (0, most_padding, 0, most_padding), mode="replicate")
        sample = sample[..., : rows * self.downsampling, : columns * self.downsampling]

        hidden = self.encoder(map_range(sample, self.pixel_range, self.network_range))
        latents = self.quant_conv(hidden)
        latents = latents.permute(0, 2, 3, 1)  # (batch, rows, columns, codebook_embed_dim)
        # The nearest code has the highest score, see `find_nearest` in `quantizer.py`.
        if self.l2_norm:  # all codes have the same length
            scores = F.normalize(latents, dim=-1) @ self.codes  # (batch, rows, columns, codebook_size)
        else:
            scores = latents @ self.codes - self.half_squares  # (batch, rows, columns, codebook_size)
        return scores.argmax(-1)


class DecoderGraph(nn.Module):
    """Ids to image, untiled and clamped to `pixel_range`.

    Args:
        model ([`SVQVAE`]): Model in float32. Its decoder is copied.
    """

    def __init__(self, model: SVQVAE):
        super().__init__()
        self.post_quant_conv = model.post_quant_conv
        self.decoder = with_nested_means(model.decoder)  # as in `EncoderGraph`
        self.network_range = model.config["network_range"]
        self.pixel_range = model.config["pixel_range"]
        self.codes = nn.Buffer(codebook(model))  # (codebook_size, codebook_embed_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, rows, columns)` -> `(batch, out_channels, rows * f, columns * f)`."""
        latents = F.embedding(ids, self.codes)  # (batch, rows, columns, codebook_embed_dim)
        latents = latents.permute(0, 3, 1, 2)  # (batch, codebook_embed_dim, rows, columns)
        sample = self.decoder(self.post_quant_conv(latents))
        return map_range(sample, self.network_range, self.pixel_range).clamp(*self.pixel_range)


def codebook(model: SVQVAE) -> torch.Tensor:
    """Codebook as the search uses it, `(codebook_size, codebook_embed_dim)`."""
    all_ids = torch.arange(model.config["codebook_size"])
    return model.quantize.get_codebook_entry(all_ids).detach()


def trace_encoder(model: SVQVAE) -> ExportedProgram:
    """Traces the encoder, with dynamic batch, height and width."""
    return trace_graph(EncoderGraph(model), coarse_noise(model, TRACED_GRID), (0, 2, 3))


def trace_decoder(model: SVQVAE) -> ExportedProgram:
    """Traces the decoder, with dynamic batch, rows and columns."""
    return trace_graph(DecoderGraph(model), torch.zeros(TRACED_GRID, dtype=torch.int64), (0, 1, 2))


def coarse_noise(model: SVQVAE, grid: tuple[int, int, int]) -> torch.Tensor:
    """Makes images for a grid of ids: noise on a coarse pattern, the same at each call.

    Args:
        model ([`SVQVAE`]): Model whose `in_channels`, `f` and `pixel_range` the images have.
        grid (`tuple[int, int, int]`): Batch, rows and columns of ids.
    """
    batch, rows, columns = grid
    channels = model.config["in_channels"]
    size = (rows * model.f, columns * model.f)
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand((batch, channels, rows, columns), generator=generator)
    pattern = F.interpolate(pattern, size, mode="bilinear")
    noise = torch.rand((batch, channels, *size), generator=generator)
    return map_range(torch.lerp(pattern, noise, 0.25), (0, 1), model.config["pixel_range"])


def trace_graph(graph: nn.Module, example: torch.Tensor, dynamic: Sequence[int]) -> ExportedProgram:
    """Traces a graph with an example input, some of whose dimensions are dynamic.

    Args:
        graph (`torch.nn.Module`): Network with one input.
        example (`torch.Tensor`): Input of the network.
        dynamic (`Sequence[int]`): Dimensions of the input that may have any length.
    """
    dynamic_dims = dict.fromkeys(dynamic, Dim.DYNAMIC)
    program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic_dims,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    _allow_lengths_of_one(program)
    return program


def _allow_lengths_of_one(program: ExportedProgram) -> None:
    """Lets dynamic dimensions have a length of one.

    The tracer demands at least two images, rows and columns of ids, although the graph works for one of each.
    `compare_graphs` runs it on one. The demand is written twice: in code that checks the input, and as a range of each
    dynamic dimension.
    """
    program._guards_code = []
    for symbol, allowed_range in program.range_constraints.items():
        range_class = type(allowed_range)
        program.range_constraints[symbol] = range_class(1, allowed_range.upper)
