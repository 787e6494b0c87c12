"""Progress bars on stderr."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from svqvae_hf.files.inputs import InputFile


@contextmanager
def progress(
    inputs: Sequence[InputFile],
) -> Iterator[tuple[Iterable[InputFile], Callable[[int, int], None]]]:
    """Shows a bar over the inputs and, below it, a bar over the tiles of the current one; on a terminal only.

    Yields:
        `tuple[Iterable[InputFile], Callable]`: The inputs, and a function for `on_tile` of [`SVQVAE.enable_tiling`].
    """
    with (
        tqdm(inputs, unit="image", disable=None) as images,
        tqdm(unit="tile", position=1, leave=False, delay=1, disable=None) as tiles,
    ):

        def on_tile(done: int, total: int) -> None:
            if done != tiles.n + 1 or tiles.total != total:
                tiles.reset(total)
                tiles.initial = tiles.n = done - 1  # tiles finished before a restart do not count for the rate
            tiles.update()

        yield images, on_tile
