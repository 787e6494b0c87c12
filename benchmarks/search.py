"""Search for the nearest codes: `python benchmarks/search.py`.

Compares our search with the full distance matrix of the original and the cosine codebook of vector-quantize-pytorch
(the extra `bench`), for latents and codes of 8 dimensions on the unit sphere. Peak memory excludes latents and
codebook. A search that needs more than four fifths of the free memory is not run.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import Row, describe_machine, in_own_process, make_parser, report, take_turns
from vector_quantize_pytorch import VectorQuantize

from svqvae_hf.models.quantizer import VectorQuantizer
from svqvae_hf.tokens.image_tokens import available_memory

DIM = 8
MEMORY_FRACTION = 0.8
SMALL = 64  # latents of the warm-up search
OURS, MATRIX, LUCIDRAINS = "svqvae-hf", "full distance matrix", "vector-quantize-pytorch"
# Bytes per pair of a latent and a code: the float32 matrices held at once, and a one-hot matrix of int64.
PAIR_BYTES = {OURS: 0, MATRIX: 3 * 4, LUCIDRAINS: 2 * 4 + 8}

Search = Callable[[], torch.Tensor]


def prepare(name: str, latents: int, codes: int, device: str) -> Search:
    """Makes and warms up a search, and returns it as a function whose result is the ids `(latents,)`."""
    generator = torch.Generator().manual_seed(0)
    codebook = F.normalize(torch.randn(codes, DIM, generator=generator), dim=-1).to(device)
    queries = torch.randn(latents, DIM, generator=generator).to(device)
    search = {OURS: _ours, MATRIX: _matrix, LUCIDRAINS: _lucidrains}[name](codebook)
    search(queries[:SMALL])
    return functools.partial(search, queries)


def _ours(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    quantizer = VectorQuantizer(*codebook.shape, commit_loss_beta=0.25, entropy_loss_ratio=0.0, l2_norm=True)
    quantizer.embedding.weight.data = codebook
    quantizer = quantizer.to(codebook.device).eval()

    @torch.inference_mode()
    def search(queries: torch.Tensor) -> torch.Tensor:
        return quantizer.nearest_ids(queries.T[None, :, :, None]).flatten()  # as one column of an image

    return search


def _matrix(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.inference_mode()
    def search(queries: torch.Tensor) -> torch.Tensor:
        queries, codes = F.normalize(queries, dim=-1), F.normalize(codebook, dim=-1)
        squares = queries.square().sum(1, keepdim=True) + codes.square().sum(1)
        return (squares - 2 * torch.einsum("bd,nd->bn", queries, codes)).argmin(1)

    return search


def _lucidrains(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    quantizer = VectorQuantize(dim=DIM, codebook_size=len(codebook), use_cosine_sim=True).to(codebook.device).eval()
    quantizer.codebook = codebook

    @torch.inference_mode()
    def search(queries: torch.Tensor) -> torch.Tensor:
        return quantizer(queries[None])[1].flatten()

    return search


def compare_searches(latents: int, codes: int, free: int, options: argparse.Namespace) -> list[Row]:
    """Compares all searches at one codebook size, with a row per contestant."""
    needed = {name: latents * codes * pair for name, pair in PAIR_BYTES.items()}
    fitting = [name for name in needed if needed[name] <= MEMORY_FRACTION * free]
    searches = {name: prepare(name, latents, codes, options.device) for name in fitting}
    ids = {name: search() for name, search in searches.items()}
    seconds = take_turns(searches, options.rounds, options.device)
    del searches
    ours = statistics.median(seconds[OURS])
    rows: list[Row] = []
    for name in needed:
        row: dict[str, object] = {"contestant": name, "latents": latents, "codes": codes, "note": None}
        figures: dict[str, object] = dict.fromkeys(
            ("seconds", "ours is faster by a factor of", "peak memory, MiB", "ids equal to ours", "rounds")
        )
        if name in fitting:
            median = statistics.median(seconds[name])
            cost = in_own_process(options.device, options.threads, prepare, name, latents, codes, options.device)
            same = (ids[name] == ids[OURS]).double().mean().item()
            figures = dict(
                zip(figures, (median, median / ours, cost.peak_mib, f"{same:.3%}", seconds[name]), strict=True)
            )
        else:
            row["note"] = f"not run: needs about {needed[name] / (1 << 30):.0f} GiB"
        rows.append(row | figures)
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--latents", type=int, nargs="+", default=[65_536], help="default: 65536")
    parser.add_argument(
        "--codes", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536, 262_144], help="default: 1024 to 262144"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    free = available_memory(torch.device(options.device))
    rows = [
        row
        for latents in options.latents
        for codes in options.codes
        for row in compare_searches(latents, codes, free, options)
    ]
    report(options, machine, {"Nearest codes": rows})


if __name__ == "__main__":
    main()
