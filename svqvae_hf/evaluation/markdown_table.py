"""A table in Markdown that can also be read as plain text, because its columns are aligned."""

from collections.abc import Sequence

from svqvae_files.inputs import printable


class MarkdownTable:
    """Collects rows of text, and pads them to columns that are aligned to the right.

    Args:
        titles (`Sequence[str]`): Titles of the columns.
    """

    def __init__(self, titles: Sequence[str]):
        self.titles = list(titles)
        self.rows: list[list[str]] = []

    def add_row(self, cells: Sequence[str]) -> None:
        """Adds a row with one cell per column, whose characters need not be printable."""
        if len(cells) != len(self.titles):
            raise ValueError(f"`cells` must be one per column, got {len(cells)} for {len(self.titles)} columns.")
        row = []
        for cell in cells:
            row.append(printable(cell).replace("|", r"\|"))
        self.rows.append(row)

    def lines(self) -> list[str]:
        """Lines of the table: titles, a rule, and the rows."""
        widths = [self._width(column) for column in range(len(self.titles))]
        rule = [_rule_cell(width) for width in widths]
        lines = [_line(self.titles, widths), _line(rule, widths)]
        for row in self.rows:
            lines.append(_line(row, widths))
        return lines

    def _width(self, column: int) -> int:
        """Number of characters of the longest cell of a column."""
        width = len(self.titles[column])
        for row in self.rows:
            width = max(width, len(row[column]))
        return width


def _rule_cell(width: int) -> str:
    """Cell of the line below the titles, such as `---:`. The colon aligns the column to the right."""
    return "-" * (width - 1) + ":"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Line of a table, with its cells padded to the widths of the columns."""
    padded_cells = []
    for cell, width in zip(cells, widths, strict=True):
        padded_cells.append(cell.rjust(width))
    joined = " | ".join(padded_cells)
    return f"| {joined} |"
