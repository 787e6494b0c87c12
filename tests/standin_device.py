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
        arguments = tree_leaves((args, kwargs))
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        devices = [argument for argument in arguments if isinstance(argument, torch.device)]
        tensors_on_cpu = [tensor for tensor in tensors if not isinstance(tensor, StandIn) and tensor.ndim > 0]
        may_move_tensors = op is torch.ops.aten.copy_.default or devices
        if tensors_on_cpu and not may_move_tensors:
            raise RuntimeError(f"{op} got tensors on two devices")
        result = op(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs or {}))
        if CPU in devices:
            return result
        arguments_by_values = {id(_to_cpu(tensor)): tensor for tensor in tensors}

        def place(value: Any) -> Any:
            """A result on the stand-in. An operation that changes an argument in place returns that argument."""
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in arguments_by_values:
                return arguments_by_values[id(value)]
            return StandIn(value)

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
