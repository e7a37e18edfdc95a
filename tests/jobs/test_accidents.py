"""Steps without a finite loss: counted, written down, and, when they do not end, left out from a checkpoint on."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from pathfm.config import Layer, build
from pathfm.dist.env import ALONE
from pathfm.dist.groups import joined
from pathfm.jobs.pretrain import pretrain
from pathfm.jobs.run_start import NotFinite, claim_run
from pathfm.jobs.training_data import TrainingData
from pathfm.recipe import Recipe
from tests.jobs.journeys import TINY, assert_same_run, make_tiles, metrics, newest_checkpoint, weights

STEPS, BATCH = 16, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_tiles(tmp_path_factory.mktemp("accidents"))


class Journey:
    """Runs on tiles of which the batches of some numbers are not finite."""

    def __init__(self, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.folder, self.bad = data, folder, frozenset[int]()
        untouched = TrainingData.batches

        def batches(training_data, ranks, from_step, passed_over=()):
            for batch in untouched(training_data, ranks, from_step, passed_over):
                crops = batch.normalised()
                if int(batch.positions[0]) // BATCH in self.bad:
                    crops.global_crops[0, 0, 0, 0] = torch.nan
                yield crops

        monkeypatch.setattr(TrainingData, "batches", batches)

    def run(self, name: str, bad: set[int], **settings: dict) -> Path:
        self.bad = frozenset(bad)
        groups = {"train": {"dataset_path": f"Pathology:root={self.data}"}, **settings}
        recipe = build(Recipe, [Layer("tiny", yaml.safe_load(TINY)), Layer("the test", groups)])
        with ExitStack() as stack:
            team = stack.enter_context(joined(ALONE, torch.device("cpu"), 300, 60))
            assert pretrain(recipe, claim_run(stack, self.folder / name, begin_anew=False), team) == 0
        return self.folder / name


@pytest.fixture
def journey(data, tmp_path, monkeypatch) -> Journey:
    return Journey(data, tmp_path, monkeypatch)


def evidence(run: Path, name: str) -> dict:
    return json.loads((run / "accidents" / name).read_text())


def test_a_single_step_is_passed_over_and_the_run_goes_on(journey):
    run = journey.run("run", {6})
    assert sum(line["steps_skipped"] for line in metrics(run)) == 1
    assert metrics(run)[-1]["batches_passed_over"] == 0
    written = evidence(run, "step_00000006.json")
    assert written["batch"] == 6
    assert written["values"]["total_loss"] == "nan"
    assert [of_rank["accident"] for of_rank in written["of_ranks"]] == ["1.0"]
    assert len(written["files"]) == BATCH


def test_five_in_a_row_make_the_run_go_back_and_leave_their_batches_out(journey, caplog):
    run = journey.run("run", set(range(6, 11)))
    assert "steps 6 to 10 had no finite loss or gradient: the run goes back to step 4" in caplog.text
    assert sum(line["steps_skipped"] for line in metrics(run)) == 0  # what was logged before is logged anew
    assert metrics(run)[-1]["batches_passed_over"] == 5
    assert [line["step"] for line in metrics(run)] == [3, 6, 9, 12, 15, 16]
    written = evidence(run, "went_back_from_step_00000011.json")
    assert (written["failed_steps"], written["back_to_step"]) == ([6, 7, 8, 9, 10], 4)
    assert list(written["batches_left_out"]) == ["6", "7", "8", "9", "10"]
    assert all(len(files) == BATCH for files in written["batches_left_out"].values())
    assert all(torch.isfinite(tensor).all() for tensor in weights(run, STEPS).values())


def test_it_does_not_matter_how_often_steps_are_logged_or_saved(journey):
    first = journey.run("first", set(range(6, 11)))
    other = journey.run("other", set(range(6, 11)), checkpoint={"every_steps": 3})
    left, right = weights(first, STEPS), weights(other, STEPS)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_run_that_went_back_and_was_interrupted_goes_on_to_the_same_end(journey, monkeypatch):
    undisturbed = journey.run("undisturbed", set(range(6, 11)))
    from pathfm.jobs import pretrain as page

    told = iter([None] * 18 + ["TERM"] * 100)  # well after it went back
    with monkeypatch.context() as patch:
        patch.setattr(page, "noted", lambda: next(told))
        with pytest.raises(AssertionError):  # it ends with 75
            journey.run("run", set(range(6, 11)))
    run = journey.folder / "run"
    assert 0 < newest_checkpoint(run) < STEPS
    assert_same_run(undisturbed, journey.run("run", set(range(6, 11))), STEPS)


def test_what_does_not_end_leaves_out_more_and_then_ends_the_run(journey, caplog):
    with pytest.raises(NotFinite, match=r"5 steps in a row, from step 4 on, and so they were after .* step 4 2 times"):
        journey.run("run", set(range(6, 1000)))
    assert "goes back to step 4 and leaves out the 5 batches" in caplog.text
    assert "goes back to step 4 and leaves out the 12 batches" in caplog.text
    assert newest_checkpoint(journey.folder / "run") == 4
    assert json.loads((journey.folder / "run" / "exit.json").read_text())["verdict"] == "failed"
