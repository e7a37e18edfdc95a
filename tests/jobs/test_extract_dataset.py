"""`pathfm extract --dataset`: every sample of a data set, on any number of ranks, killed and continued."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pathfm.batch import normalise_crops
from pathfm.data.datasets import KNN
from pathfm.data.decode import decode
from pathfm.data.labelled import at_side
from pathfm.errors import EXIT_INTERRUPTED, UserError
from pathfm.features.dataset_features import open_features
from pathfm.jobs.extract import main
from tests.features.small import STUDENT, WIDTH, patch_backbone, saved_teacher
from tests.jobs.journeys import environment, wait_until
from tests.labelled import make_labelled

EVERYTHING = ("--features", "cls,mean_patch,patches", "--last-blocks", "4", "--side", "32")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run's export, with the run's recipe beside it."""
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_text(f"student: {json.dumps(STUDENT.model_dump(mode='json'))}\n")
    return saved_teacher(run / "exports" / "teacher_00000007.pth", patch_backbone())


def words(root: Path, weights: Path, output: Path, *options: str) -> list[str]:
    source = ["--dataset", f"KNN:root={root}:split=test", "--weights", str(weights), "--output", str(output)]
    return [*source, "--device", "cpu", "--readers", "1", *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".csv")}


def test_it_says_where_everything_lies_and_the_manifest_what_was_done(root, weights, tmp_path, capsys):
    assert main(words(root, weights, tmp_path, *EVERYTHING, "--dtype", "fp16")) == 0
    said = capsys.readouterr().out
    assert "features of 21 samples" in said
    assert f"patches [21, 4, 4, {WIDTH}] float16" in said
    assert "left out of the weights: 1 of head" in said
    features = open_features(tmp_path)
    assert features.manifest["source"] == f"KNN:root={root}:split=test"
    assert features.manifest["command"].startswith("pathfm extract --dataset KNN:root=")
    assert features.manifest["identity"]["architecture"]["interpolate_offset"] == 0.0  # as the run's recipe says
    assert features.manifest["identity"]["fingerprint"] == KNN(root, "test").fingerprint()
    assert features.manifest["weights"] == str(weights)


def test_by_default_it_is_the_last_cls_at_the_size_for_which_positions_were_learned(root, weights, tmp_path):
    assert main(words(root, weights, tmp_path)) == 0
    features = open_features(tmp_path)
    tile = torch.from_numpy(at_side(decode(KNN(root, "test").read_bytes(5)), 48)).permute(2, 0, 1)[None]
    expected = patch_backbone()([normalise_crops(tile)])[0].cls
    torch.testing.assert_close(torch.tensor(features.cls[5]), expected, atol=1e-5, rtol=1e-4)
    assert features.cls.shape == (21, 1, WIDTH)
    assert (features.mean_patch, features.patches) == (None, None)


def test_one_file_of_safetensors(root, weights, tmp_path):
    assert main(words(root, weights, tmp_path, "--format", "safetensors")) == 0
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "features.json",
        "features.safetensors",
        "names.csv",
    ]


def test_two_ranks_extract_what_one_does_and_say_it_once(root, weights, tmp_path):
    assert main(words(root, weights, tmp_path / "one", *EVERYTHING)) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "pathfm", "extract", *words(root, weights, tmp_path / "two", *EVERYTHING)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("features of 21 samples") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_whoever_gets_a_signal_leaves_with_75_and_the_same_command_goes_on(
    root, weights, tmp_path, monkeypatch, capsys
):
    assert main(words(root, weights, tmp_path / "undisturbed")) == 0
    command = words(root, weights, tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-m", "pathfm", "extract", *command], env=environment())
    wait_until((tmp_path / "out" / ".features" / "features.json").exists)  # workers, which start now, take a second
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_INTERRUPTED
    assert not (tmp_path / "out" / "features.json").exists()
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert main(command) == 0
    assert "holds this extraction already; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--side", "40"], "a side of 40 px is no whole number of the 16 px patches"),
        (["--last-blocks", "13"], "has 12 blocks; features of its last 13 are not there"),
        (["--region-size", "512"], "--region-size is for --regions and --tiles"),
        (["--format", "packed"], "--format packed is not for this; take one of npy, safetensors"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_written(options, reason, root, weights, tmp_path):
    with pytest.raises(UserError, match=reason):
        main(words(root, weights, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_options_of_data_sets_are_not_for_regions(weights, tmp_path):
    for option, value in (("--side", "32"), ("--features", "patches"), ("--last-blocks", "2"), ("--dtype", "fp16")):
        with pytest.raises(UserError, match=f"{option} is for --dataset; leave it out"):
            main(["--regions", "x", "--weights", str(weights), "--output", str(tmp_path), option, value])


def test_features_are_not_extracted_of_features(weights, tmp_path):
    torch.save(torch.zeros(4, 8), tmp_path / "region.pt")
    with pytest.raises(UserError, match="Regions are features already"):
        main(["--dataset", f"Regions:root={tmp_path}", "--weights", str(weights), "--output", str(tmp_path / "out")])


def test_other_weights_are_refused_where_features_lie(root, weights, tmp_path):
    assert main(words(root, weights, tmp_path)) == 0
    other = saved_teacher(tmp_path / "other" / "teacher.pth", patch_backbone(seed=5))
    with pytest.raises(UserError, match=r"holds another extraction .*weights_sha256") as caught:
        main(words(root, other, tmp_path))
    assert "\n" not in str(caught.value)
