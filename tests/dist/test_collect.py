import pytest
import torch
import torch.distributed as dist

from pathfm.dist.collect import (
    agree_any,
    decided_by_first,
    gather_lists,
    gather_rows,
    gather_uneven_rows,
    sum_over_ranks,
)
from pathfm.errors import UserError
from tests.several_ranks import on_ranks


def every_collective() -> dict:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {
        "sum": sum_over_ranks(torch.tensor([1.0, float(rank)])).tolist(),
        "any": (agree_any(rank == 1), agree_any(False)),
        "first": decided_by_first(lambda: f"rank {rank} decided"),
        "lists": gather_lists(["a"] * rank + ["b"]),
    }


def refuse() -> str:
    def decide() -> None:
        raise UserError("the first rank says no")

    with pytest.raises(UserError, match="the first rank says no"):
        decided_by_first(decide)
    return "refused"


def test_two_ranks_sum_agree_and_gather():
    assert (
        on_ranks(2, every_collective)
        == [
            {
                "sum": [2.0, 1.0],
                "any": (True, False),
                "first": "rank 0 decided",
                "lists": ["b", "a", "b"],
            }
        ]
        * 2
    )


def test_one_process_alone_gets_its_input_back():
    assert every_collective() == {
        "sum": [1.0, 0.0],
        "any": (False, False),
        "first": "rank 0 decided",
        "lists": ["b"],
    }


def test_a_refusal_of_the_first_rank_reaches_all():
    assert on_ranks(2, refuse) == ["refused"] * 2


def gradient_of_gathered_rows() -> tuple[list[float], list[float]]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = torch.tensor([[1.0], [2.0]]) + 10 * rank
    own.requires_grad_()
    rows = gather_rows(own)
    (rows**2).sum().backward()
    return rows.flatten().tolist(), own.grad.flatten().tolist()


def test_gathered_rows_are_those_of_all_ranks_and_carry_the_gradient_of_the_own_ones():
    everyone = [1.0, 2.0, 11.0, 12.0]
    assert on_ranks(2, gradient_of_gathered_rows) == [(everyone, [2.0, 4.0]), (everyone, [22.0, 24.0])]
    assert gradient_of_gathered_rows() == ([1.0, 2.0], [2.0, 4.0])


def rows_of_uneven_ranks() -> tuple[list[list[float]], list[int]]:
    rank = dist.get_rank() if dist.is_initialized() else 3
    own = torch.full((rank, 2), float(rank))
    return gather_uneven_rows(own).tolist(), gather_uneven_rows(torch.arange(rank)).tolist()


def test_ranks_gather_as_many_rows_as_each_has_even_none():
    rows = [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert on_ranks(3, rows_of_uneven_ranks) == [(rows, [0, 0, 1])] * 3
    assert rows_of_uneven_ranks() == ([[3.0, 3.0]] * 3, [0, 1, 2])
