import torch

from pathfm.training.meter import Meter
from tests.several_ranks import on_ranks


def test_every_steps_value_is_read_back_once_asked():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.5), "finite": torch.tensor(True)})
    meter.add({"loss": torch.tensor(2.5), "finite": torch.tensor(False)})
    assert meter.read() == {"loss": [1.5, 2.5], "finite": [1.0, 0.0]}
    meter.add({"loss": torch.tensor(3.5), "finite": torch.tensor(True)})
    assert meter.read()["loss"] == [1.5, 2.5, 3.5]
    meter.clear()
    assert meter.read() == {}


def test_a_restored_meter_goes_on_where_it_was():
    first, second = Meter(), Meter()
    first.add({"loss": torch.tensor(0.1)})
    second.load_state_dict(first.state_dict())
    for meter in (first, second):
        meter.add({"loss": torch.tensor(0.2)})
    assert first.read() == second.read()


def mean_of_ranks() -> list[float]:
    meter = Meter()
    meter.add({"loss": torch.tensor(float(torch.distributed.get_rank()))})
    return meter.read()["loss"]


def test_metrics_are_means_over_ranks_not_sums():
    assert on_ranks(2, mean_of_ranks) == [[0.5], [0.5]]


def test_a_metric_that_only_some_steps_have_keeps_its_place():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)})
    meter.read()
    meter.add({"loss": torch.tensor(2.0), "rank": torch.tensor(7.0)})
    meter.add({"loss": torch.tensor(3.0)})
    series = meter.read()
    assert series["loss"] == [1.0, 2.0, 3.0]
    assert [value == value for value in series["rank"]] == [False, True, False]
    assert series["rank"][1] == 7.0
    restored = Meter()
    restored.load_state_dict(meter.state_dict())
    assert restored.own(0) == {}
