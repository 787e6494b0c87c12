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
    neighbours = _inputs_of_neighbours(table, padded, rows, columns, NEIGHBOURS)
    if coarse is None:
        num_zeros = len(COARSE_NEIGHBOURS) * table.shape[1] + POSITION_INPUTS
        zeros = np.zeros((len(rows), num_zeros), np.float32)
        return np.hstack([neighbours, zeros])
    height, width = _unpadded_size(padded)
    coarse_height, coarse_width = _unpadded_size(coarse)
    coarse_rows, steps_down = _place_in_coarser_grid(rows, height, coarse_height)
    coarse_columns, steps_right = _place_in_coarser_grid(columns, width, coarse_width)
    coarse_neighbours = _inputs_of_neighbours(table, coarse, coarse_rows, coarse_columns, COARSE_NEIGHBOURS)
    places_in_cells = np.stack([steps_down, steps_right], axis=1).astype(np.float32)  # (n, POSITION_INPUTS)
    return np.hstack([neighbours, coarse_neighbours, places_in_cells])


def _place_in_coarser_grid(positions: np.ndarray, length: int, coarse_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds where some rows of a grid lie in a coarser grid, or some columns.

    A cell of the coarser grid has `CELL_STEPS`, 128, steps per side. For example, a grid has 6 rows, and the coarser
    grid has 2. In steps, row 4 starts at 4 / 6 of the coarser grid: at 4 * 2 * 128 // 6 = 170. It lies in the coarser
    row 170 // 128 = 1, 170 % 128 = 42 steps below the top.

    Args:
        positions (`np.ndarray` of shape `(n,)`): Rows or columns.
        length (`int`): Number of rows or columns of the grid.
        coarse_length (`int`): Number of rows or columns of the coarser grid.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Coarser rows or columns, and the steps from their start, both `(n,)`.
    """
    steps = positions * coarse_length * CELL_STEPS // length
    coarse_positions = steps // CELL_STEPS
    steps_in_cell = steps % CELL_STEPS
    return coarse_positions, steps_in_cell


def _inputs_of_neighbours(
    table: np.ndarray,
    padded: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    offsets: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Looks up the neighbours of some ids in the table of [`code_inputs`].

    Args:
        table (`np.ndarray` of shape `(codes + 1, dim + 1)`): The inputs that stand for each id.
        padded (`np.ndarray`): Grid of ids, padded by [`pad_ids`].
        rows (`np.ndarray` of shape `(n,)`): Rows of the ids in the grid, without the padding.
        columns (`np.ndarray` of shape `(n,)`): Columns of the ids in the grid, without the padding.
        offsets (`Sequence[tuple[int, int]]`): Places (down, right) of the neighbours, seen from an id.

    Returns:
        `np.ndarray` of shape `(n, len(offsets) * (dim + 1))`: For each id the inputs of its neighbours, one after the
        other.
    """
    inputs = []
    for down, right in offsets:
        neighbours = padded[rows + MARGIN + down, columns + MARGIN + right]  # ids, (n,)
        inputs.append(table[neighbours])  # (n, dim + 1)
    return np.hstack(inputs)


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
        # In a row of the diagonal, the column is `diagonal - SLOPE * row`. It must be at most `last_column`, so the
        # row is at least `(diagonal - last_column) / SLOPE`. It must be at least 0, so the row is at most
        # `diagonal / SLOPE`.
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
