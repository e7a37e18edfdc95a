"""`pathfm evaluate`: from weights and labelled tiles to a report, on one rank and two, with features kept."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix

from pathfm.batch import normalise_crops
from pathfm.data.datasets import KNN
from pathfm.data.labelled import load_tiles
from pathfm.errors import EXIT_INTERRUPTED, UserError
from pathfm.evaluate.knn import knn_probabilities
from pathfm.evaluate.report import read_evaluation
from pathfm.jobs import evaluation
from pathfm.jobs.evaluate import main
from tests.features.small import STUDENT, patch_backbone, saved_teacher
from tests.jobs.journeys import environment
from tests.labelled import CLASSES, make_labelled

SIDE = 32
QUICK = ("--side", str(SIDE), "--k", "1,5,50", "--linear-steps", "40", "--bootstrap", "100", "--device", "cpu")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def slides(labelled: Path) -> str:
    return f"{write_slides(labelled.parent / 'slides.csv', labelled)}:slide"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's export, with the run's recipe beside it."""
    run = tmp_path_factory.mktemp("runs") / "vits"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"student: {json.dumps(STUDENT.model_dump(mode='json'))}\n")
    return saved_teacher(run / "exports" / "teacher_00000007.pth", patch_backbone())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def judged(labelled: Path, slides: str, weights: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluations")
    few = ("--n-per-class", "1,3", "--tries", "4")
    assert main(words(labelled, weights, cache, output, "--groups", slides, *few)) == 0
    return output


def words(labelled: Path, weights: Path | str, cache: Path, output: Path, *options: str) -> list[str]:
    splits = [word for split in ("query", "test") for word in (f"--{split}", f"KNN:root={labelled}:split={split}")]
    return [str(weights), *splits, "--cache", str(cache), "--output", str(output), *QUICK, *options]


def write_slides(path: Path, labelled: Path, *, shared: bool = False) -> Path:
    """Three tiles in a row are of one slide."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "label", "slide"])
        for split in ("query", "test"):
            dataset = KNN(labelled, split)
            for row in range(len(dataset)):
                prefix = "s" if shared else split
                table.writerow([f"tiles/{dataset.name_of(row)}", dataset.label(row), f"{prefix}_{row // 3}"])
    return path


def report_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def class_tokens(labelled: Path, split: str) -> torch.Tensor:
    """By hand."""
    dataset = KNN(labelled, split)
    (tiles,) = load_tiles(dataset, [range(len(dataset))], SIDE)
    return patch_backbone()([normalise_crops(tiles.images)])[0].cls


def test_a_report_has_every_task_with_intervals_and_what_it_was_made_of(judged: Path, labelled: Path, weights: Path):
    report = report_in(judged)
    few = [f"{what}_{n}_per_class" for n in (1, 3) for what in ("knn_1", "knn_5", "logistic")]
    assert set(report["tasks"]) == {"knn_1", "knn_5", "linear", "logistic", *few} - {"knn_5_1_per_class"}
    for found in report["tasks"].values():
        for metric in ("acc", "balanced_acc", "auc"):
            assert 0 <= found[metric]["low"] <= found[metric]["value"] <= found[metric]["high"] <= 1
    assert report["name"] == "vits_teacher_00000007"
    assert (report["query"]["samples"], report["test"]["samples"], report["test"]["groups"]) == (36, 21, 7)
    assert report["test"]["classes"] == dict.fromkeys(CLASSES, 7)
    assert report["test"]["fingerprint"] == KNN(labelled, "test").fingerprint()
    assert (report["weights"]["path"], report["weights"]["width"]) == (str(weights), 192)
    assert report["tasks"]["linear"]["chosen"]["features"] in ("cls_1", "cls_4", "cls_1+mean_patch", "cls_4+mean_patch")
    assert report["tasks"]["logistic_3_per_class"]["tries"] == 4
    assert {path.suffix for path in judged.iterdir()} == {".json", ".md", ".npz", ".png"}


def test_numbers_are_what_the_kept_probabilities_say(judged: Path, labelled: Path):
    (path,) = judged.glob("*.json")
    read = read_evaluation(path)
    labels = KNN(labelled, "test").labels
    assert (read.test.labels == labels).all()
    assert len(set(read.test.groups)) == 7
    for task, found in read.report["tasks"].items():
        accuracies = [accuracy_score(labels, one.argmax(1)) for one in read.tries[task]]
        assert found["acc"]["value"] == pytest.approx(np.mean(accuracies))
    linear = read.tries["linear"][0].argmax(1)
    assert read.report["tasks"]["linear"]["confusion"] == confusion_matrix(labels, linear).tolist()


def test_neighbours_are_sought_among_class_tokens_of_the_last_block(judged: Path, labelled: Path):
    (path,) = judged.glob("*.json")
    query, test = (class_tokens(labelled, split) for split in ("query", "test"))
    labels = torch.from_numpy(KNN(labelled, "query").labels)
    expected = knn_probabilities(query, labels, test, 3, [5])[5]
    np.testing.assert_allclose(read_evaluation(path).tries["knn_5"][0], expected, atol=1e-4)


def test_markdown_says_the_same_in_words(judged: Path):
    text = next(judged.glob("*.md")).read_text()
    found = report_in(judged)["tasks"]["knn_5"]["acc"]
    value, low, high = (f"{100 * found[key]:.1f}" for key in ("value", "low", "high"))
    assert f"| kNN, k = 5 | {value} % [{low}, {high}] |" in text
    assert "95 % intervals of 100 bootstrap resamples of the 7 test groups (`slide` of " in text
    assert "over 4 tries" in text


def test_features_are_computed_once(judged: Path, labelled, slides, weights, cache, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert len({path.parent for path in before}) == 2

    def never(*_: Any) -> None:
        raise AssertionError("a tile was read again")

    monkeypatch.setattr("pathfm.features.dataset_features.load_tiles", never)
    assert main(words(labelled, weights, cache, tmp_path, "--groups", slides, "--tasks", "knn")) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")} == before
    of_judged, again = report_in(judged)["tasks"], report_in(tmp_path)["tasks"]
    assert again == {task: of_judged[task] for task in ("knn_1", "knn_5")}


def test_two_ranks_find_what_one_finds(judged: Path, labelled, slides, weights, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "pathfm"]
    few = ("--n-per-class", "1,3", "--tries", "4")
    command = words(labelled, weights, tmp_path / "cache", tmp_path / "out", "--groups", slides, *few)
    done = subprocess.run([*launcher, "evaluate", *command], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("21 test samples") == 1
    one, two = (read_evaluation(next(folder.glob("*.json"))) for folder in (judged, tmp_path / "out"))
    for task, tries in one.tries.items():
        np.testing.assert_allclose(two.tries[task], tries, atol=1e-4)
    assert two.report["tasks"]["linear"]["chosen"]["features"] == one.report["tasks"]["linear"]["chosen"]["features"]


def test_whoever_is_told_to_leave_does_so_and_goes_on_later(labelled, weights, tmp_path, monkeypatch):
    command = words(labelled, weights, tmp_path / "cache", tmp_path / "out", "--tasks", "knn")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "noted", lambda: "SIGTERM")
        assert main(command) == EXIT_INTERRUPTED
    assert not (tmp_path / "out").exists()
    assert main(command) == 0


def test_random_weights_of_a_recipe_are_the_same_each_time_and_disturb_no_one(labelled, cache, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"student: {json.dumps(STUDENT.model_dump(mode='json'))}\n")
    before = torch.get_rng_state()
    for number in range(2):
        command = words(labelled, f"random:{recipe}", cache, tmp_path / str(number), "--tasks", "knn")
        assert main(command) == 0
    assert torch.get_rng_state().equal(before)
    first, second = (report_in(tmp_path / str(number)) for number in range(2))
    assert first["weights"] == second["weights"]
    assert first["tasks"] == second["tasks"]
    assert first["name"] == "random_tiny"
    assert first["weights"]["path"] == f"random:{recipe}"


def test_tiles_are_seen_at_the_size_of_the_runs_recipe(labelled, cache, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    student = json.dumps(STUDENT.model_dump(mode="json"))
    recipe.write_text(f"student: {student}\ncrops: {{global_crops_size: 48, local_crops_size: 32}}\n")
    command = words(labelled, f"random:{recipe}", cache, tmp_path / "out", "--tasks", "knn")
    del command[command.index("--side") : command.index("--side") + 2]
    assert main(command) == 0
    assert report_in(tmp_path / "out")["weights"]["side"] == 48


def test_without_groups_the_report_says_what_that_means(labelled, weights, cache, tmp_path):
    assert main(words(labelled, weights, cache, tmp_path, "--tasks", "knn", "--name", "mine")) == 0
    assert "Nothing was said of slides or patients" in (tmp_path / "mine.md").read_text()
    assert report_in(tmp_path)["groups"] is None


def test_splits_that_share_a_slide_are_refused_unless_one_insists(labelled, weights, cache, tmp_path):
    groups = f"{write_slides(tmp_path / 'shared.csv', labelled, shared=True)}:slide"
    command = words(labelled, weights, cache, tmp_path / "out", "--tasks", "knn", "--groups", groups)
    with pytest.raises(UserError, match=r"query and test share 7 groups of 'slide' \(s_0, s_1, s_2 and 4 more\)"):
        main(command)
    assert main([*command, "--allow-shared-groups"]) == 0
    assert "**7 groups are in query and test both**" in next((tmp_path / "out").glob("*.md")).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "Pathology:root=/nowhere"], "nowhere"),
        (["--groups", "labels.csv"], "groups are given as FILE.csv:COLUMN"),
        (["--groups", "nowhere.csv:slide"], "cannot read nowhere.csv"),
        (["--groups", "{root}/labels.csv:site"], "all samples of --query are of one site, 'here'; two are needed"),
        (["--side", "40"], r"40 px is no whole number of the 16 px patches .* take 32"),
        (["nowhere.pth"], "there is no nowhere.pth; name a file of weights, a run's directory, or random:RECIPE"),
        (["random:vits41"], "no recipe 'vits41'.*did you mean 'vits14'"),
        (["random:vits14", "--name", "x"], "--name is for one backbone"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_computed(options, message, labelled, weights, tmp_path):
    table = (labelled.parent / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([f"{table[0]},site", *(f"{row},here" for row in table[1:])]))
    options = [word.replace("{root}", str(tmp_path)) for word in options]
    command = words(labelled, weights, tmp_path / "cache", tmp_path / "out")
    positional = [word for word in options[:1] if not word.startswith("-")]
    with pytest.raises(UserError, match=message):
        main([*positional, *command, *options[len(positional) :]])
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()
