"""Which storages of tensors are alive, how large they are and what for: counted while code runs on fake tensors."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage

# Both are documented by torch, although their modules begin with an underscore.
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_GRAIN_BYTES = 512  # torch's allocator for CUDA rounds every storage up to it


class Ledger(TorchDispatchMode):
    """Sees every operation within it, and so every new storage of a fake tensor; a weak reference tells when one goes.

    A storage is counted once, however many views it has, and as of the kind that was named when it came. `of_shards`:
    the kind of what sharding gathers and sends.
    """

    def __init__(self, of_shards: str) -> None:
        super().__init__()
        self.kind = ""  # of what comes from now on
        self.peak_bytes = 0
        self.bytes_at_peak: Mapping[str, int] = {}  # by kind
        self._of_shards = of_shards
        self._total_bytes = 0
        self._bytes: Counter[str] = Counter()
        self._entries: dict[int, _Entry] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it is made of other tensors, whose operations come here too
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device  # what is asked most often; the fake mode would take long to say the same
        result = func(*args, **(kwargs or {}))
        for tensor in _fake_tensors_in(result):
            self._see(tensor.untyped_storage())
        if func.namespace == "fsdp":
            for tensor in _fake_tensors_in([result, (kwargs or {}).get("out")]):
                self.recount(tensor, self._of_shards)
        return result

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """What comes meanwhile is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def seeing_resizes(self) -> Iterator[None]:
        """Sharding frees and fills the room of gathered weights by resizing storages, which is no operation."""
        plain = UntypedStorage.resize_

        def resize_(storage: UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            if (entry := self._entries.get(id(storage))) is not None:
                self._change(entry, _rounded_up(size), self._of_shards)
            return result

        UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            UntypedStorage.resize_ = plain  # type: ignore[method-assign]

    def recount(self, tensor: Tensor, kind: str, *, only_if: str | None = None) -> None:
        """A tensor's storage is of another kind from now on, if it was of kind `only_if` (None: whatever it was)."""
        entry = self._entries.get(id(tensor.untyped_storage()))
        if entry is not None and only_if in (None, entry.kind):
            self._change(entry, entry.num_bytes, kind)

    def recount_all(self, kind: str, into: str) -> None:
        """Whatever is alive of one kind is of another from now on."""
        for entry in self._entries.values():
            if entry.kind == kind:
                self._change(entry, entry.num_bytes, into)

    def forget_peak(self) -> None:
        """The highest that was reached is what is alive now."""
        self.peak_bytes, self.bytes_at_peak = self._total_bytes, dict(self._bytes)

    def _see(self, storage: UntypedStorage) -> None:
        key = id(storage)
        if key not in self._entries:
            entry = _Entry(self.kind, 0, weakref.ref(storage, partial(self._forget, key)))
            self._entries[key] = entry
            self._change(entry, _rounded_up(storage.nbytes()), self.kind)

    def _forget(self, key: int, _: object) -> None:
        entry = self._entries.pop(key)
        self._change(entry, 0, entry.kind)

    def _change(self, entry: "_Entry", num_bytes: int, kind: str) -> None:
        self._bytes[entry.kind] -= entry.num_bytes
        self._bytes[kind] += num_bytes
        self._total_bytes += num_bytes - entry.num_bytes
        entry.num_bytes, entry.kind = num_bytes, kind
        if self._total_bytes > self.peak_bytes:
            self.forget_peak()


@dataclass
class _Entry:
    """A storage that is alive."""

    kind: str
    num_bytes: int
    reference: "weakref.ref[UntypedStorage]"


def _rounded_up(num_bytes: int) -> int:
    return -(-num_bytes // _GRAIN_BYTES) * _GRAIN_BYTES


def _fake_tensors_in(result: Any) -> Iterator[FakeTensor]:
    if type(result) is FakeTensor:
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _fake_tensors_in(part)
