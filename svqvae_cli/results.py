"""Prints results as a table."""

from collections.abc import Sequence

from tqdm import tqdm

from svqvae_hf.evaluation.reconstruction_table import ReconstructionFigures, table_header, table_row

ALL_IMAGES = "all images"


class ResultTable:
    """Table on stdout, one row per image and scale. Its header is printed with the first row.

    Args:
        names (`Sequence[str]`): Names of all images, for the width of their column.
        codebook_size (`int`): Number of codes.
    """

    def __init__(self, names: Sequence[str], codebook_size: int):
        self.name_width = max(map(len, (ALL_IMAGES, *names)))
        self.codebook_size = codebook_size
        self.results: list[list[ReconstructionFigures]] = []  # per image, one per scale

    def add(self, name: str, results: list[ReconstructionFigures]) -> None:
        """Prints the rows of one image."""
        if not self.results:
            tqdm.write(table_header(self.name_width))  # above the progress bars
        self.results.append(results)
        for result in results:
            self._print_row(name, [result])

    def add_totals(self) -> None:
        """Prints one row per scale for all images."""
        for results_at_scale in zip(*self.results, strict=True):
            self._print_row(ALL_IMAGES, results_at_scale)

    def _print_row(self, name: str, results: Sequence[ReconstructionFigures]) -> None:
        tqdm.write(table_row(self.name_width, name, results, self.codebook_size))
