"""A step's batches made ready on the device while the step before it computes there.

Copies and crops are queued on a stream of their own, one step ahead. Nothing is made twice and nothing is reordered;
what is ahead when training leaves is made again by whoever goes on, because a batch follows from its number.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from pathfm.batch import Batch

Parts = list[Batch]  # of one step
Ready = Callable[[Parts], Parts]


class Beside(Protocol):
    """A queue of the device beside that of the steps."""

    def begin(self, work: Callable[[], Parts]) -> Callable[[], Parts]:
        """Queue the work. What is returned hands its result to the steps, whose queue then waits for it."""


def made_ready(steps: Iterable[Parts], ready: Ready, device: torch.device) -> Iterator[Parts]:
    """`ready(parts)` for every step, in order: on CUDA one ahead and beside the steps, elsewhere when asked for."""
    return one_ahead(iter(steps), ready, _SideStream(device)) if device.type == "cuda" else map(ready, steps)


def one_ahead(steps: Iterator[Parts], ready: Ready, beside: Beside) -> Iterator[Parts]:
    """`ready(parts)` for every step, each begun before the one in front of it is handed out.

    What goes wrong ahead is raised when its turn comes, after all that went well.
    """
    coming = _begun(steps, ready, beside)
    while (due := coming) is not None:
        if isinstance(due, Exception):
            raise due
        coming = _begun(steps, ready, beside)
        yield due()


def _begun(steps: Iterator[Parts], ready: Ready, beside: Beside) -> Callable[[], Parts] | Exception | None:
    try:
        if (parts := next(steps, None)) is None:
            return None
        return beside.begin(lambda: ready(parts))
    except Exception as error:
        return error


class _SideStream:
    """CUDA's. The loader's pinned memory needs no care: torch keeps it until the copies queued from it are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Constants of the crops may have been made by the steps' stream: for the previews.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def begin(self, work: Callable[[], Parts]) -> Callable[[], Parts]:
        with torch.cuda.stream(self._stream):
            parts = work()
        done = self._stream.record_event()

        def hand_over() -> Parts:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(done)
            for tensor in (tensor for part in parts for tensor in part.tensors()):
                tensor.record_stream(stream)  # or its memory is given away as soon as the host forgets it
            return parts

        return hand_over
