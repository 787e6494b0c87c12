"""A stand-in for a GPU, to find tensors on a wrong device without one: it computes on the CPU."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """Functions that `torch.standin` has, as `torch.cuda` does."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("standin", Backend())  # for good: only processes of their own import this file
DEVICE = torch.device("standin", 0)
CPU = torch.device("cpu")


class StandIn(torch.Tensor):
    """Tensor that says it is on the stand-in, and holds its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        facts = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        with torch.inference_mode(False):  # `detach` of a weight raises for a result that is made in that mode
            return torch.Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **facts)

    def __init__(self, values: torch.Tensor):
        self.values = values

    def tolist(self) -> list:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, _: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Computes on the CPU. Tensors on two devices are an error, as on a GPU, except for numbers on the CPU."""
        leaves = tree_leaves((args, kwargs))
        tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
        devices = [each for each in leaves if isinstance(each, torch.device)]
        moves = op is torch.ops.aten.copy_.default or devices
        if not moves and any(each.ndim for each in tensors if not isinstance(each, StandIn)):
            raise RuntimeError(f"{op} got tensors on two devices")
        result = op(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs or {}))
        known = {id(_to_cpu(each)): each for each in tensors}  # what an operation changes in place, it returns

        def place(each: Any) -> Any:
            if not isinstance(each, torch.Tensor) or CPU in devices:
                return each
            return known[id(each)] if id(each) in known else StandIn(each)

        return tree_map(place, result)


def _to_cpu(each: Any) -> Any:
    if isinstance(each, StandIn):
        return each.values
    return CPU if isinstance(each, torch.device) else each


def _empty(size: list[int], stride: list[int] | None = None, dtype: torch.dtype | None = None, **_: Any) -> StandIn:
    values = torch.empty(size, dtype=dtype)
    return StandIn(values if stride is None else values.as_strided(size, stride))


LIBRARY = torch.library.Library("aten", "IMPL")  # all functions that make tensors are made of these
LIBRARY.impl("empty.memory_format", lambda size, **options: _empty(size, **options), "PrivateUse1")
LIBRARY.impl("empty_strided", _empty, "PrivateUse1")
LIBRARY.impl("_copy_from", lambda source, target, _=False: _to_cpu(target).copy_(_to_cpu(source)), "PrivateUse1")
