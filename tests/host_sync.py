"""A trap for whatever makes the host wait until its device has computed a value."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_READ_A_VALUE = {  # whatever they are given: the host needs a number, or the size of what comes out
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten.lift_fresh,  # torch.tensor([1.0]): numbers of the host, which is held up until they are copied
}
_INDEXED_BY_TENSORS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_METHODS_THAT_READ = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class HostSync(AssertionError):
    """The host would have waited."""


@contextmanager
def no_host_sync(device: torch.device | str) -> Iterator[None]:
    """Inside, what would make the host wait for a GPU raises: CUDA's own error there, `HostSync` elsewhere.

    Elsewhere nothing waits, so operations and methods stand for it, on tensors of any device.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    with ExitStack() as stack:
        for name in _METHODS_THAT_READ:
            stack.enter_context(patch.object(Tensor, name, _raising(name)))
        stack.enter_context(_Operations())
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func.overloadpacket, args, kwargs) or func is aten.repeat_interleave.Tensor:
            raise HostSync(f"{func} makes the host wait")
        return func(*args, **kwargs)


def _waits(operation: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if operation in _INDEXED_BY_TENSORS:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if operation is aten._to_copy:
        return torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
    if operation is aten.copy_:
        return args[0].device.type != args[1].device.type
    return operation in _READ_A_VALUE


def _raising(name: str) -> Callable[..., Any]:
    def method(*_: Any, **__: Any) -> Any:
        raise HostSync(f"Tensor.{name} makes the host wait")

    return method
