"""Peak memory of tensors, counted tensor by tensor, so that it is the same on every device and in every run."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that the operations inside `with` read or make, weights included.

    Workspace inside one operation does not count.

    Attributes:
        peak (`int`): Most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and counts its tensors."""
        kwargs = kwargs or {}
        self._count((args, kwargs))
        result = func(*args, **kwargs)
        self._count(result)
        return result

    def _count(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)

    def _forget(self, storage_id: int, size: int) -> None:
        self.known.remove(storage_id)
        self.alive -= size
