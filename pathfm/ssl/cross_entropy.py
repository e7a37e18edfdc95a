"""Cross-entropy at a head of many prototypes, in chunks of rows: the logits of all rows never lie there at once.

N rows   n rows of a chunk   E bottleneck width   K prototypes
With 131072 prototypes the logits of a batch's masked patches in fp32 take gigabytes, several times over for softmax
and gradients. Here a chunk's gradient is computed right after its logits, and both are let go.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pathfm.models.head import Projection

STUDENT_TEMP = 0.1  # DINO, arXiv 2104.14294, appendix C

# Logits of a chunk, in numbers. A GPU wants large matrix products; on a CPU pieces of 32 MiB and more are mapped anew.
_NUMBERS_AT_ONCE = {"cpu": 7 * 2**20}
_NUMBERS_AT_ONCE_ELSEWHERE = 2**26
# Errors are about 1 / K where a prototype is not meant, too small for fp16, of which 64 times as much is in range.
_FACTOR_OF_ERRORS = {torch.float16: 64.0}


class Chunk(NamedTuple):
    """Rows that are seen at once, and what is asked of them: made when their turn comes."""

    rows: Int[Tensor, " n"]
    targets: Callable[[], Float[Tensor, "n K"]]


class CrossEntropy(NamedTuple):
    """The weighted sum over rows, and every row's own, which carries no gradient."""

    total: Float[Tensor, ""]
    of_rows: Float[Tensor, " N"]


class Errors(NamedTuple):
    """Of one chunk: cross-entropies, and their gradient with respect to logits / temp."""

    cross_entropy: Float[Tensor, " n"]
    gradient: Float[Tensor, "n K"]


ErrorsOf = Callable[[Tensor, Tensor, float], Errors]


def errors_of_chunk(logits: Float[Tensor, "n K"], targets: Float[Tensor, "n K"], temp: float) -> Errors:
    """Elementwise work on one chunk, in fp32. Targets need not sum to 1: those of several pairs may be added up."""
    log_probs = functional.log_softmax(logits.float() / temp, dim=-1)
    found = -(targets * log_probs).sum(-1)
    return Errors(found, log_probs.exp_().mul_(targets.sum(-1, keepdim=True)).sub_(targets))


def cross_entropy(
    student: Projection,
    weights: Float[Tensor, " N"],
    chunks: Iterable[Chunk],
    errors_of: ErrorsOf = errors_of_chunk,
    temp: float = STUDENT_TEMP,
) -> CrossEntropy:
    """sum over rows of weights[n] * H(targets[n], softmax(student.logits()[n] / temp)), with its gradient.

    `chunks` hold every row once. Matrix products are taken in autocast's precision, where it is on, everything else in
    fp32; gradients of the chunks are added up in fp32. `errors_of`: `errors_of_chunk`, compiled perhaps.
    """
    total, of_rows = _ChunkedCrossEntropy.apply(
        student.bottleneck,
        student.prototypes,
        weights,
        chunks,
        errors_of,
        temp,
        _compute_dtype(student.bottleneck),
        torch.is_grad_enabled(),
    )
    return CrossEntropy(total, of_rows)


def rows_at_once(num_prototypes: int, device: torch.device) -> int:
    """How many rows a chunk of logits has."""
    return max(1, _NUMBERS_AT_ONCE.get(device.type, _NUMBERS_AT_ONCE_ELSEWHERE) // num_prototypes)


@contextmanager
def chunks_as_on(device_type: str) -> Iterator[None]:
    """The CPU's chunks are as large as those of another device: where it stands for that, and memory is counted."""
    own = _NUMBERS_AT_ONCE["cpu"]
    _NUMBERS_AT_ONCE["cpu"] = _NUMBERS_AT_ONCE.get(device_type, _NUMBERS_AT_ONCE_ELSEWHERE)
    try:
        yield
    finally:
        _NUMBERS_AT_ONCE["cpu"] = own


def slices_of(num_rows: int, at_once: int) -> Iterator[slice]:
    """Consecutive rows, about equally many in every slice and never more than `at_once`."""
    number = -(-num_rows // at_once)
    for chunk in range(number):
        yield slice(num_rows * chunk // number, num_rows * (chunk + 1) // number)


def _compute_dtype(rows: Tensor) -> torch.dtype:
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are computed on the way forward, for a loss whose own gradient is 1, and multiplied on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        bottleneck: Tensor,
        prototypes: Tensor,
        weights: Tensor,
        chunks: Iterable[Chunk],
        errors_of: ErrorsOf,
        temp: float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(bottleneck.device.type, enabled=False):
            rows, columns = bottleneck.to(dtype), prototypes.to(dtype)
            of_rows = torch.zeros_like(weights)
            gradients = _Gradients(rows, columns, weights / temp) if with_gradient else None
            for chunk in chunks:
                logits = rows.index_select(0, chunk.rows) @ columns.T
                errors = errors_of(logits, chunk.targets(), temp)
                of_rows.index_copy_(0, chunk.rows, errors.cross_entropy)
                if gradients is not None:
                    gradients.add(chunk.rows, errors.gradient)
        if gradients is not None:
            ctx.save_for_backward(gradients.of_rows, gradients.of_columns)
            ctx.factors = gradients.factors()
        ctx.mark_non_differentiable(of_rows)
        return (of_rows * weights).sum(), of_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_rows, of_columns = ctx.saved_tensors
        of_row, of_all_columns = ctx.factors
        return of_rows * (of_row * grad), of_columns * (of_all_columns * grad), *[None] * 6


class _Gradients:
    """Of bottleneck and prototypes, in fp32, as the chunks come."""

    def __init__(self, rows: Float[Tensor, "N E"], columns: Float[Tensor, "K E"], weights: Float[Tensor, " N"]) -> None:
        self.rows, self.columns, self.weights = rows, columns, weights
        self.largest = weights.amax() if len(weights) else weights.new_ones(())
        self.factor = _FACTOR_OF_ERRORS.get(rows.dtype, 1.0)
        # Weights are as small as one in all masked patches; relative to the largest one half precision holds them.
        self.weighted = (rows * (weights / self.largest)[:, None]).to(rows.dtype)
        self.of_rows = torch.zeros_like(rows, dtype=torch.float32)
        self.of_columns = torch.zeros_like(columns, dtype=torch.float32)

    def add(self, chunk: Int[Tensor, " n"], errors: Float[Tensor, "n K"]) -> None:
        errors = (errors * self.factor).to(self.rows.dtype) if self.factor != 1 else errors.to(self.rows.dtype)
        self.of_rows.index_copy_(0, chunk, (errors @ self.columns).float())
        weighted = self.weighted.index_select(0, chunk)
        if errors.dtype == torch.float32:
            self.of_columns.addmm_(errors.T, weighted)
        else:
            self.of_columns += errors.T @ weighted

    def factors(self) -> tuple[Float[Tensor, "N 1"], Float[Tensor, ""]]:
        """That the gradients of rows, and of columns, are still to be multiplied with."""
        return (self.weights / self.factor)[:, None], self.largest / self.factor
