import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pathfm.training.ledger import Ledger

MIB = 2**20


def numbers(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB // 4)


def test_a_storage_counts_once_with_all_its_views_until_the_last_is_gone():
    with FakeTensorMode(), Ledger("shards") as ledger:
        whole = numbers(3)
        view = whole.view(3, -1)[1:]
        assert ledger.peak_bytes == 3 * MIB
        del whole
        ledger.forget_peak()
        assert ledger.peak_bytes == 3 * MIB, "the view keeps it"
        del view
        ledger.forget_peak()
        assert ledger.peak_bytes == 0


def test_the_peak_is_remembered_with_what_was_alive_then():
    with FakeTensorMode(), Ledger("shards") as ledger:
        with ledger.counting_as("kept"):
            kept = numbers(1)
        with ledger.counting_as("passing"):
            passing = kept.repeat(4)
            del passing
            numbers(2)
    assert ledger.peak_bytes == 5 * MIB
    assert ledger.bytes_at_peak == {"kept": MIB, "passing": 4 * MIB}


def test_what_lives_on_can_be_counted_as_something_else():
    with FakeTensorMode(), Ledger("shards") as ledger:
        with ledger.counting_as("under way"):
            first, second = numbers(1), numbers(2)
        ledger.recount(first, "input", only_if="under way")
        ledger.recount(first, "other", only_if="under way")
        ledger.recount_all("under way", into="gradients")
        ledger.forget_peak()
    assert {kind: size for kind, size in ledger.bytes_at_peak.items() if size} == {"input": MIB, "gradients": 2 * MIB}
    del first, second


def test_a_storage_that_is_resized_is_one_of_the_shards():
    with FakeTensorMode(), Ledger("shards") as ledger, ledger.seeing_resizes():
        gathered = numbers(1)
        gathered.untyped_storage().resize_(0)
        ledger.forget_peak()
        assert ledger.peak_bytes == 0
        gathered.untyped_storage().resize_(MIB)
        assert ledger.bytes_at_peak["shards"] == MIB


def test_small_storages_take_as_much_as_the_allocator_of_cuda_gives_them():
    with FakeTensorMode(), Ledger("shards") as ledger:
        one = torch.empty(1)
        assert ledger.peak_bytes == 512
        del one
