"""Profiles are validated in one line, and cannot overrule what the launcher relies on."""

from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.launch.profile import read_profile

PROFILES = Path(__file__).parents[2] / "launchers" / "profiles"


def _profile(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_valid(path: Path) -> None:
    assert read_profile(path).tasks_per_node >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu", "no key 'partion'; the nearest known key is 'partition'"),
        ("gpus_per_node: -1", "gpus_per_node"),
        ("time_limit_hours: forever", "time_limit_hours"),
        ("memory_per_node: lots", "memory_per_node"),
        ("container: {runtime: apptainer}", "needs an image"),
        ("container: {binds: ['tiles:/tiles']}", "'tiles:/tiles' is not /HOST/PATH"),
        ("sbatch: {ntasks_per_node: 2}", "'ntasks-per-node' is set by the launcher"),
        ("sbatch: {--requeue: true}", "'requeue' is set by the launcher"),
        ("sbatch: {array: 0-3}", "'array' is set by the launcher"),
        ("sbatch: {gpus_per_node: 2}", "'gpus-per-node' is set by the launcher"),
        ("sbatch: {mem-per-gpu: 64G}", "'mem-per-gpu' is set by the launcher"),
        ("{time_limit_hours: 0.5, signal_lead_s: 1800}", "signal_lead_s 1800 is not within time_limit_hours 0.5 (1800"),
        ("environment: {'A-B': x}", "'A-B' cannot be the name"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_profile(_profile(tmp_path, text))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cpu_cluster_has_one_task_per_node(tmp_path: Path) -> None:
    assert read_profile(_profile(tmp_path, "gpus_per_node: 0")).tasks_per_node == 1
