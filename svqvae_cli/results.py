"""The table of `svqvae reconstruct`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from svqvae_cli.errors import one_line
from svqvae_cli.files import InputFile
from svqvae_cli.runs import Run
from svqvae_hf.evaluation.reconstruction_table import ReconstructionFigures, table_header, table_row
from svqvae_hf.models.modeling_svqvae import SVQVAE


class ResultTable:
    """Table on stdout, one row per image and scale. Its header is printed with the first row.

    Args:
        names (`Sequence[str]`): Names of all images, for the width of their column.
        codebook_size (`int`): Number of codes.
    """

    def __init__(self, names: Sequence[str], codebook_size: int):
        self.name_width = max(len(name) for name in ("1,000 images", *map(one_line, names)))
        self.codebook_size = codebook_size
        self.results: list[list[ReconstructionFigures]] = []  # per image, one per scale

    def add(self, name: str, results: list[ReconstructionFigures]) -> None:
        """Prints the rows of one image."""
        if not self.results:
            tqdm.write(table_header(self.name_width))  # above the progress bars
        self.results.append(results)
        for result in results:
            self._print_row(one_line(name), [result])

    def _print_row(self, name: str, results: Sequence[ReconstructionFigures]) -> None:
        tqdm.write(table_row(self.name_width, name, results, self.codebook_size))


@contextmanager
def printed_table(work: Run[InputFile], model: SVQVAE) -> Iterator[ResultTable]:
    """Table of a run. Ends with one row per scale for all of its images, also if the run is interrupted."""
    table = ResultTable([str(file.name) for file in work.targets], model.config["codebook_size"])
    try:
        yield table
    finally:
        if len(table.results) > 1:
            for results_at_scale in zip(*table.results, strict=True):
                table._print_row(f"{len(table.results):,} images", results_at_scale)
