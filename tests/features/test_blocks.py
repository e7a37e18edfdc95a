import pytest
import torch

from pathfm.errors import UserError
from pathfm.features.blocks import Blocks


@pytest.fixture
def blocks(tmp_path):
    return Blocks(tmp_path / "work", num_items=5, block_items=2)


def fill(blocks: Blocks) -> torch.Tensor:
    features = torch.rand(5, 4, 3)
    for block in range(len(blocks)):
        numbers = blocks.items_of(block)
        blocks.write(block, features[numbers.start : numbers.stop], [{"number": number} for number in numbers])
    return features


def test_every_item_is_in_one_block(blocks):
    assert [list(blocks.items_of(block)) for block in range(len(blocks))] == [[0, 1], [2, 3], [4]]


def test_what_was_written_is_read_in_order_or_one_by_one(blocks):
    features = fill(blocks)
    assert torch.equal(torch.stack(list(blocks.features())), features)
    assert torch.equal(torch.stack([blocks.feature(number) for number in (4, 0, 3)]), features[[4, 0, 3]])
    assert [note["number"] for note in blocks.notes()] == [0, 1, 2, 3, 4]


def test_what_is_missing_are_the_blocks_that_are_not_there(blocks):
    assert blocks.missing() == [0, 1, 2]
    blocks.write(1, torch.zeros(2, 4, 3), [{}, {}])
    assert blocks.missing() == [0, 2]


def test_a_block_is_extracted_once(blocks):
    blocks.write(1, torch.zeros(2, 4, 3), [{}, {}])
    with pytest.raises(AssertionError, match="extracted already"):
        blocks.write(1, torch.ones(2, 4, 3), [{}, {}])


def test_a_block_that_the_disk_damaged_is_named(blocks):
    fill(blocks)
    (blocks.folder / "block_00000001.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"block_00000001.pt cannot be read .*delete it and start again"):
        list(blocks.features())
