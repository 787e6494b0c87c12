"""What an id is predicted from, and the order in which the ids of a grid are coded.

. . c . .      An id `?` is predicted from 12 ids before it, `a`, `b` and `c`, and with a coarser grid also from the
b b b b b      id there that covers the same place and the four ids beside that one. Ids are coded in diagonals,
b a a a b      from the upper left to the lower right. None of the ids before `?` lies on the diagonal of `?` or on
a a ? . .      a later one, so that a whole diagonal is coded at once.
"""

from collections.abc import Iterator, Sequence

import numpy as np

LIMIT = 127  # of the absolute value of weights, activations and codes
MARK = LIMIT  # input that is 0 outside the grid
CELL_STEPS = LIMIT + 1  # steps per side of a coarser id, in which the place of an id within it is counted

# Offsets (down, right) from an id to its neighbours, which are coded before it.
NEIGHBOURS = (
    *((0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1)),
    *((-2, -2), (-2, -1), (-2, 0), (-2, 1), (-2, 2), (-3, 0)),
)
# Offsets (down, right) in the coarser grid, from the id at the same place to itself and its four neighbours.
COARSE_NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0))
SLOPE = 2  # an id lies on the diagonal `column + SLOPE * row`, after the diagonals of its neighbours
MARGIN = 3  # largest distance to a neighbour
AT_ONCE = 256  # ids of a diagonal whose groups are coded before their members, at most; part of the format
POSITION_INPUTS = 2  # row and column of an id within the cell of its coarser id


def num_inputs(code_dim: int) -> int:
    """Number of inputs of an id, for codes of `code_dim` numbers."""
    num_ids = len(NEIGHBOURS) + len(COARSE_NEIGHBOURS)
    return num_ids * (code_dim + 1) + POSITION_INPUTS


def code_inputs(codes: np.ndarray) -> np.ndarray:
    """Inputs that stand for each id: its code, and a mark. The last row stands for a place outside the grid.

    Args:
        codes (`np.ndarray` of shape `(codes, dim)`): Codes in int8.

    Returns:
        `np.ndarray` of shape `(codes + 1, dim + 1)`: Inputs in float32.
    """
    num_codes, code_dim = codes.shape
    inputs = np.zeros((num_codes + 1, code_dim + 1), np.float32)
    inputs[:num_codes, :code_dim] = codes
    inputs[:num_codes, code_dim] = MARK
    return inputs


def pad_ids(ids: np.ndarray, outside: int) -> np.ndarray:
    """Pads a grid of ids by `MARGIN` on all sides with the number that stands for the outside.

    Returns:
        `np.ndarray` of shape `(h + 2 * MARGIN, w + 2 * MARGIN)`: Ids in int64.
    """
    return np.pad(ids.astype(np.int64), MARGIN, constant_values=outside)


def context(
    table: np.ndarray, padded: np.ndarray, coarse: np.ndarray | None, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Inputs of the network for some ids of a grid.

    Args:
        table (`np.ndarray` of shape `(codes + 1, dim + 1)`): Result of [`code_inputs`], a row for each id.
        padded (`np.ndarray`): Ids, padded by [`pad_ids`].
        coarse (`np.ndarray`, *optional*): Coarser ids, padded by [`pad_ids`].
        rows (`np.ndarray` of shape `(n,)`): Rows of the ids.
        columns (`np.ndarray` of shape `(n,)`): Columns of the ids.

    Returns:
        `np.ndarray` of shape `(n, inputs)`: Inputs for the neighbours of each id, for the coarser ids around the same
        place, and for the position of the id within the cell of its coarser id. The last two are zeros without coarser
        ids.
    """
    parts = _rows_of_neighbours(table, padded, rows, columns, NEIGHBOURS)
    if coarse is None:
        num_zeros = len(COARSE_NEIGHBOURS) * table.shape[1] + POSITION_INPUTS
        parts.append(np.zeros((len(rows), num_zeros), np.float32))
        return np.hstack(parts)
    height, width = _unpadded_size(padded)
    coarse_height, coarse_width = _unpadded_size(coarse)
    # Where the ids lie in the coarser grid, in steps: a cell of that grid has CELL_STEPS = 128 steps per side.
    # Row 4 of 6, for example, lies at 4 * 2 * 128 // 6 = 170 steps of a coarser grid with 2 rows. That is in the
    # coarser row 170 // 128 = 1, and there 170 % 128 = 42 steps below the top of the cell.
    row_steps = rows * coarse_height * CELL_STEPS // height  # (n,)
    column_steps = columns * coarse_width * CELL_STEPS // width  # (n,)
    coarse_rows = row_steps // CELL_STEPS
    coarse_columns = column_steps // CELL_STEPS
    parts += _rows_of_neighbours(table, coarse, coarse_rows, coarse_columns, COARSE_NEIGHBOURS)
    steps = np.stack([row_steps, column_steps], axis=1)  # (n, POSITION_INPUTS)
    steps_within_cell = steps % CELL_STEPS
    parts.append(steps_within_cell.astype(np.float32))
    return np.hstack(parts)


def _rows_of_neighbours(
    table: np.ndarray,
    padded: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    offsets: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
    """Looks up the neighbours of some ids in the table of [`code_inputs`].

    Args:
        table (`np.ndarray` of shape `(codes + 1, dim + 1)`): A row for each id.
        padded (`np.ndarray`): Ids, padded by [`pad_ids`].
        rows (`np.ndarray` of shape `(n,)`): Rows of the ids, without the padding.
        columns (`np.ndarray` of shape `(n,)`): Columns of the ids, without the padding.
        offsets (`Sequence[tuple[int, int]]`): Places (down, right) of the neighbours, seen from an id.

    Returns:
        `list[np.ndarray]`: For each offset, the rows `(n, dim + 1)` of the table for the neighbours there.
    """
    parts = []
    for down, right in offsets:
        neighbours = padded[rows + MARGIN + down, columns + MARGIN + right]  # ids, (n,)
        parts.append(table[neighbours])
    return parts


def _unpadded_size(padded: np.ndarray) -> tuple[int, int]:
    """Rows and columns of a grid that [`pad_ids`] padded."""
    padded_height, padded_width = padded.shape
    return padded_height - 2 * MARGIN, padded_width - 2 * MARGIN


def diagonals(height: int, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows and columns of the ids of each diagonal in the order of coding, in parts of at most `AT_ONCE`.

    The diagonal of an id is `column + SLOPE * row`. In a grid of 3 x 5 these are the numbers of the diagonals:

        0 1 2 3 4
        2 3 4 5 6
        4 5 6 7 8
    """
    last_column = width - 1
    num_diagonals = width + SLOPE * (height - 1)
    for diagonal in range(num_diagonals):
        # The column is `diagonal - SLOPE * row`, so it falls from row to row. In the first rows it may be beyond the
        # last column, and in the last rows below 0. The rows between are those of the diagonal.
        first_row = max(0, divide_rounding_up(diagonal - last_column, SLOPE))
        last_row = min(height - 1, diagonal // SLOPE)
        end_row = last_row + 1
        for start in range(first_row, end_row, AT_ONCE):
            stop = min(start + AT_ONCE, end_row)
            rows = np.arange(start, stop)
            columns = diagonal - SLOPE * rows
            yield rows, columns


def divide_rounding_up(dividend: int, divisor: int) -> int:
    """Quotient of two integers, rounded up."""
    return -(-dividend // divisor)
