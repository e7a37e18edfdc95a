from dataclasses import replace

import torch

from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD, Batch, Skipped, Uncropped


def batch() -> Batch:
    return Batch(
        global_crops=torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
        local_crops=torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8),
        masks=torch.zeros(4, 4, dtype=torch.bool),
        mask_indices=torch.zeros(0, dtype=torch.int64),
        mask_weights=torch.zeros(0),
        positions=torch.tensor([0, 1]),
        samples=torch.tensor([5, 3]),
        skipped=(Skipped(0, 4, "brca", "a.png", "broken"),),
    )


def test_the_numbers_of_crops_follow_from_the_shapes():
    assert (batch().num_samples, batch().num_global_crops, batch().num_local_crops) == (2, 2, 3)


def test_bytes_are_normalised_channel_by_channel():
    raw = batch()
    red = (raw.global_crops[:, 0].float() / 255 - IMAGENET_MEAN[0]) / IMAGENET_STD[0]
    torch.testing.assert_close(raw.normalised().global_crops[:, 0], red)
    assert raw.normalised(torch.bfloat16).local_crops.dtype == torch.bfloat16


def test_float_crops_are_not_normalised_again():
    once = batch().normalised()
    assert torch.equal(once.normalised().global_crops, once.global_crops)


def test_moving_a_batch_keeps_what_is_no_tensor():
    raw = batch()
    moved = raw.to(torch.device("meta"))
    assert moved.global_crops.device.type == moved.positions.device.type == "meta"
    assert moved.skipped == raw.skipped


def test_every_tensor_of_a_batch_is_named_also_of_what_is_still_to_be_cropped():
    images, boxes = torch.zeros(2, 9, 9, 3, dtype=torch.uint8), torch.zeros(2, 5, 4)
    raw = replace(batch(), uncropped=Uncropped(images, {"box": boxes}))
    assert len(list(batch().tensors())) == 7
    assert [tensor is known for tensor, known in zip(list(raw.tensors())[7:], (images, boxes), strict=True)] == [
        True
    ] * 2
