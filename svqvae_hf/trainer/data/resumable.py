"""Loaders that resume exactly, because their batches depend on their numbers alone."""

from collections.abc import Mapping
from typing import Any


class Resumable:
    """A loader of `num_rows` rows in an order by its seed.

    Iteration continues after the last batch yielded, also after `load_state_dict`.
    """

    unit: str  # name of the rows
    num_rows: int
    seed: int
    batch = 0  # batches yielded

    @property
    def contents(self) -> str:
        """Size of the set, for the log."""
        return f"{self.num_rows:,} {self.unit}"

    @property
    def order(self) -> dict[str, int]:
        """Settings that decide, with the number of a batch, which rows it holds."""
        return {"seed": self.seed, f"number of {self.unit}": self.num_rows}

    def state_dict(self) -> dict[str, Any]:
        """Number of batches yielded, and the order; equal on all processes."""
        return {"batch": self.batch, "order": self.order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the batch at which iteration continues.

        Raises:
            ValueError: If the state is of a loader with another order, or of another set.
        """
        for name, value in self.order.items():
            if (saved := state["order"].get(name)) != value:
                raise ValueError(
                    f"The {name} must be {saved} as when the checkpoint was written, but is {value}. Restore it, or "
                    "start a new run in another `--output_dir`."
                )
        self.batch = state["batch"]
