import torch.distributed as dist

from pathfm.dist.agreement import Agreement
from tests.several_ranks import on_ranks


def heard_by_this_rank() -> list[list[int]]:
    agreement, rank = Agreement(dist.new_group(backend="gloo")), dist.get_rank()
    told = [[0, 0], [5 * rank, 0], [7, rank], [0, 0], [0, 0]]
    return [agreement.exchange(numbers) for numbers in told]


def test_all_ranks_hear_the_largest_numbers_one_call_later():
    assert on_ranks(3, heard_by_this_rank) == [[[0, 0], [0, 0], [10, 0], [7, 2], [0, 0]]] * 3


def test_a_process_alone_hears_itself_at_once():
    assert Agreement(None).exchange([3, 0]) == [3, 0]
