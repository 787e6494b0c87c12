"""Search for the nearest codes: `python benchmarks/search.py`.

Compares our search with the full distance matrix of the original, for latents and codes of 8 dimensions on the unit
sphere. Peak memory excludes latents and codebook. A matrix that needs more than four fifths of the free memory is not
computed.
"""

import functools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import Row, describe_machine, in_own_process, make_parser, report, take_turns

from svqvae_hf.models.quantizer import VectorQuantizer
from svqvae_hf.tokens.image_tokens import available_memory

DIM = 8
MEMORY_FRACTION = 0.8
OURS, MATRIX = "svqvae-hf", "full distance matrix"
PAIR_BYTES = {OURS: 0, MATRIX: 3 * 4}  # per pair of a latent and a code: the float32 matrices held at once


def prepare(name: str, latents: int, codes: int, device: str) -> Callable[[], torch.Tensor]:
    """Makes and warms up a search, and returns it as a function whose result is the ids `(latents,)`."""
    generator = torch.Generator().manual_seed(0)
    codebook = F.normalize(torch.randn(codes, DIM, generator=generator), dim=-1).to(device)
    queries = torch.randn(latents, DIM, generator=generator).to(device)
    search = functools.partial(search_matrix, codebook) if name == MATRIX else make_quantizer(codebook)
    search(queries[:64])
    return functools.partial(search, queries)


def make_quantizer(codebook: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Our search."""
    quantizer = VectorQuantizer(*codebook.shape, commit_loss_beta=0.25, entropy_loss_ratio=0.0, l2_norm=True)
    quantizer.embedding.weight.data = codebook
    quantizer.eval()
    return lambda queries: quantizer.nearest_ids(queries.T[None, :, :, None]).flatten()  # as one column of an image


def search_matrix(codebook: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The original's search."""
    queries, codes = F.normalize(queries, dim=-1), F.normalize(codebook, dim=-1)
    squares = queries.square().sum(1, keepdim=True) + codes.square().sum(1)
    return (squares - 2 * torch.einsum("bd,nd->bn", queries, codes)).argmin(1)


@torch.inference_mode()
def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--latents", type=int, default=65_536, help="default: 65536")
    sizes = [1024, 4096, 16_384, 65_536, 262_144]
    parser.add_argument("--codes", type=int, nargs="+", default=sizes, help="default: 1024 to 262144")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    free = available_memory(torch.device(options.device))
    rows: list[Row] = []
    for codes in options.codes:
        needed = {name: size * options.latents * codes for name, size in PAIR_BYTES.items()}
        fitting = [name for name, size in needed.items() if size <= MEMORY_FRACTION * free]
        searches = {name: prepare(name, options.latents, codes, options.device) for name in fitting}
        ids = {name: search() for name, search in searches.items()}
        seconds = take_turns(searches, options.rounds, options.device)
        del searches
        for name in fitting:
            cost = in_own_process(
                options.device, options.threads, prepare, name, options.latents, codes, options.device
            )
            rows.append(
                {
                    "contestant": name,
                    "codes": codes,
                    "seconds": statistics.median(seconds[name]),
                    "peak memory, MiB": cost.peak_mib,
                    "ids equal to ours": f"{(ids[name] == ids[OURS]).double().mean().item():.3%}",
                    "rounds": seconds[name],
                }
            )
    report(options, machine, {f"Nearest codes of {options.latents} latents": rows})


if __name__ == "__main__":
    main()
