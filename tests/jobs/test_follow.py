"""A job that follows a run finds of every exported teacher what the run itself would have found."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pathfm.errors import UserError
from pathfm.jobs.follow import main
from tests.jobs.journeys import command, environment, train, wait_until
from tests.labelled import make_labelled, tuning_settings

SETTINGS = ("tune.tune_every_samples=64", "tune.num_workers=0", "tune.knn.batch_size=8", "tune.bootstrap=100")


@pytest.fixture(scope="module")
def tuning(tmp_path_factory) -> list[str]:
    return [*tuning_settings(make_labelled(tmp_path_factory.mktemp("labelled"))), *SETTINGS]


def tunings(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "results" / "tuning.jsonl").read_text().splitlines()]


def test_a_follower_finds_what_the_run_would_have_found_and_ends_with_it(recipe, data, tuning, tmp_path):
    beside, online = tmp_path / "beside", tmp_path / "online"
    words = command(recipe, data, beside, *tuning, "tune.online=false", "checkpoint.export_every_steps=8")
    training = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
    wait_until((beside / "recipe.yaml").exists)
    follow = [sys.executable, "-m", "pathfm", "evaluate", "--follow", str(beside), "--device", "cpu"]
    followed = subprocess.run(follow, env=environment(), capture_output=True, text=True, timeout=500)
    assert (training.wait(300), followed.returncode) == (0, 0), followed.stderr
    assert train(recipe, data, online, *tuning).returncode == 0
    assert [(line["step"], line["by"]) for line in tunings(beside)] == [(8, "follow"), (16, "follow")]
    for found, expected in zip(tunings(beside), tunings(online), strict=True):
        assert "student" not in found
        assert found["teacher"] == pytest.approx(expected["teacher"], abs=1e-5)
        assert {key: found[key] for key in ("step", "samples_seen", "epoch", "query", "test")} == {
            key: expected[key] for key in ("step", "samples_seen", "epoch", "query", "test")
        }

    again = subprocess.run([*follow, "--once"], env=environment(), capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stderr
    assert len(tunings(beside)) == 2  # each export once


def test_a_run_without_anything_to_tune_on_or_without_a_recipe_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run run has no recipe.yaml yet; start it first"):
        main(["--follow", str(tmp_path / "run")])
    (tmp_path / "run" / "recipe.yaml").write_text("{}\n")
    with pytest.raises(UserError, match=r"run run has nothing to tune on; add tune\.query_dataset_path="):
        main(["--follow", str(tmp_path / "run")])
