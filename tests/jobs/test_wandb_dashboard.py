import json
import socket
import sys
from pathlib import Path

import pytest

from pathfm.__main__ import main
from pathfm.config import to_yaml
from pathfm.recipe import Recipe

# Of wandb_workspaces, which writes its models in the manner of an earlier pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RECORDED = Path(__file__).parent / "recorded" / "wandb_dashboard.json"
TUNED = {
    "query_dataset_path": "KNN:root=/data:split=query",
    "test_dataset_path": "KNN:root=/data:split=test",
    "knn": {"nb_knn": [10, 20], "n_per_class_list": [-1, 5]},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return written(tmp_path / "vits14", tune=TUNED, wandb={"username": "lab", "project": "tiles"})


def written(run: Path, **recipe) -> Path:
    (run / "previews").mkdir(parents=True)
    for picture in ("crops.png", "attention_00000500.png", "attention_00001000.png"):
        (run / "previews" / picture).write_bytes(b"")
    (run / "recipe.yaml").write_text(to_yaml(Recipe.model_validate(recipe)))
    return run


def test_what_would_be_made_equals_the_record_and_needs_no_library(run: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)  # as if it were not installed
    assert main(["wandb-dashboard", str(run), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(RECORDED.read_text())


def test_a_run_without_tuning_has_no_section_for_it(tmp_path: Path, capsys):
    assert main(["wandb-dashboard", str(written(tmp_path / "run")), "--dry-run"]) == 0
    names = [section["name"] for section in json.loads(capsys.readouterr().out)["sections"]]
    assert names == ["1 losses", "3 health", "4 throughput", "5 schedules", "6 pictures"]


def test_the_library_makes_that_page_with_every_curve_over_the_samples_seen(run: Path, capsys, monkeypatch):
    from wandb_workspaces.workspaces import Workspace

    saved = []
    monkeypatch.setattr(Workspace, "save", lambda page: saved.append(page) or page)
    monkeypatch.setattr(Workspace, "url", "https://wandb.ai/lab/tiles?nw=page")
    assert main(["wandb-dashboard", str(run)]) == 0
    assert capsys.readouterr().out == "https://wandb.ai/lab/tiles?nw=page\n"
    (page,) = saved
    recorded = json.loads(RECORDED.read_text())
    assert (page.entity, page.project, page.name) == ("lab", "tiles", "pathfm vits14")
    assert [section.name for section in page.sections] == [section["name"] for section in recorded["sections"]]
    curves = [panel for section in page.sections[:-1] for panel in section.panels]
    assert {panel.x for panel in curves} == {"samples_seen"}
    keys = [panel["keys"] for section in recorded["sections"][:-1] for panel in section["panels"]]
    assert [panel.y for panel in curves] == keys
    assert page.sections[-1].panels[-1].media_keys == ["previews/attention"]


def test_without_the_library_one_line_says_what_to_install(run: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["wandb-dashboard", str(run)]) == 2
    assert "pip install 'pathfm[dashboard]'" in capsys.readouterr().err


def test_whose_page_it_is_must_be_known(tmp_path: Path, capsys):
    assert main(["wandb-dashboard", str(written(tmp_path / "run"))]) == 2
    assert "--entity" in capsys.readouterr().err


def test_a_refusal_is_one_line(run: Path, capsys, monkeypatch):
    from wandb_workspaces.workspaces import Workspace

    def refused(page):
        raise RuntimeError("permission\ndenied")

    monkeypatch.setattr(Workspace, "save", refused)
    assert main(["wandb-dashboard", str(run)]) == 2
    assert capsys.readouterr().err == "error: W&B did not take the page (permission denied)\n"
