"""Steps' batches that are made ready beside the steps, one ahead: by a stand-in for a stream, and by CUDA's."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.assemble import Assemble
from pathfm.augment.config import AugmentConfig, CropsConfig
from pathfm.augment.masks import MaskPlan
from pathfm.data.loader import Sample
from pathfm.errors import UserError
from pathfm.training.prefetch import made_ready, one_ahead
from tests.ssl.small import random_batch

CPU = torch.device("cpu")


class Queue:
    """Works at once, and writes down in which order it was asked."""

    def __init__(self):
        self.events = []

    def begin(self, work):
        parts = work()
        number = number_of(parts)
        self.events.append(f"begin {number}")

        def hand_over():
            self.events.append(f"wait {number}")
            return parts

        return hand_over


def number_of(parts):
    return int(parts[0].positions[0])


def step_of(number):
    """Two parts whose first position tells the step."""
    return [replace(random_batch(2, seed=10 * number + part), positions=torch.tensor([number, 0])) for part in (0, 1)]


def unchanged(parts):
    return parts


def taken(steps, queue, ready=unchanged):
    """What is handed out, and the events with each step's own between them."""
    for parts in one_ahead(iter(steps), ready, queue):
        queue.events.append(f"step {number_of(parts)}")
        yield parts


def test_every_step_is_begun_before_the_one_in_front_of_it_is_handed_out_and_no_earlier():
    queue = Queue()
    steps = [step_of(number) for number in range(3)]
    assert list(taken(steps, queue)) == steps
    assert queue.events == [
        *("begin 0", "begin 1", "wait 0", "step 0"),
        *("begin 2", "wait 1", "step 1"),
        *("wait 2", "step 2"),
    ]


def test_what_is_handed_out_is_what_was_made_ready():
    handed_out = list(one_ahead(iter([step_of(0), step_of(1)]), lambda parts: parts[:1], Queue()))
    assert [len(parts) for parts in handed_out] == [1, 1]


def fails_at_two(parts):
    if number_of(parts) == 2:
        raise UserError("the device cannot")
    return parts


def loader_that_fails():
    yield step_of(0)
    yield step_of(1)
    raise UserError("a worker was killed")


@pytest.mark.parametrize(
    ("steps", "ready", "message"),
    [(loader_that_fails(), unchanged, "a worker was killed"), (map(step_of, range(9)), fails_at_two, "cannot")],
    ids=["loader", "device"],
)
def test_what_goes_wrong_ahead_is_raised_in_its_turn(steps, ready, message):
    handed_out = one_ahead(iter(steps), ready, Queue())
    assert [number_of(next(handed_out)), number_of(next(handed_out))] == [0, 1]
    with pytest.raises(UserError, match=message):
        next(handed_out)
    with pytest.raises(StopIteration):
        next(handed_out)


def test_after_an_error_nothing_more_is_asked_of_the_loader():
    asked = []

    def steps():
        for number in range(9):
            asked.append(number)
            yield step_of(number)

    with pytest.raises(UserError):
        list(one_ahead(steps(), fails_at_two, Queue()))
    assert asked == [0, 1, 2]


def test_leaving_between_two_steps_lets_go_of_the_loader_and_of_what_is_ahead():
    closed, ahead = [], []

    def steps():
        try:
            for number in range(9):
                parts = step_of(number)
                ahead[:] = [weakref.ref(parts[0].global_crops)]
                yield parts
        finally:
            closed.append(True)

    handed_out = one_ahead(steps(), unchanged, Queue())
    next(handed_out)
    assert ahead[0]() is not None
    del handed_out  # as when the loop returns
    gc.collect()
    assert closed == [True]
    assert ahead[0]() is None


def test_a_cpu_takes_batches_as_they_come():
    asked = []

    def steps():
        for number in range(2):
            asked.append(number)
            yield step_of(number)

    handed_out = made_ready(steps(), unchanged, CPU)
    next(handed_out)
    assert asked == [0]


CROPS = CropsConfig(global_crops_size=56, local_crops_size=28, local_crops_number=4)


def pinned_steps(number):
    """As the loader leaves them: tiles, plans and masks in page-locked memory."""
    assemble = Assemble(CROPS, AugmentConfig(preset="pathology"), MaskPlan(4, 4), 14, 3, 16, crops_on_device=True)
    rng = np.random.default_rng(0)
    for step in range(number):
        positions = range(16 * step, 16 * step + 16)
        samples = [Sample(p, p, rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for p in positions]
        yield [assemble(samples, step).pin_memory()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_made_on_a_side_stream_are_those_made_on_the_steps_own():
    device = torch.device("cuda")

    def cropped(parts):
        return [crop_on_device(part.to(device), CROPS) for part in parts]

    weight = torch.randn(2048, 2048, device=device)
    own = [[part.to(CPU) for part in cropped(parts)] for parts in pinned_steps(12)]
    for (ours,), (oracle,) in zip(made_ready(pinned_steps(12), cropped, device), own, strict=True):
        for _ in range(20):
            weight = torch.nn.functional.normalize(weight @ weight)  # a step that keeps the device busy
        copy = ours.to(CPU)
        torch.cuda.synchronize()
        for name in ("global_crops", "local_crops", "masks", "mask_indices", "mask_weights", "positions", "samples"):
            assert torch.equal(getattr(copy, name), getattr(oracle, name)), name
