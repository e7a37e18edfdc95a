"""Profiles are validated in one line, and cannot overrule what the launcher relies on."""

from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.launch.profile import hours, read_profile

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


def test_the_command_line_overrules_the_file_and_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    path = _profile(tmp_path, "{partition: gpu, gpus_per_node: 8, container: {runtime: docker, image: x}}")
    profile = read_profile(path, {"gpus_per_node": 2})
    assert (profile.partition, profile.gpus_per_node, profile.container.image) == ("gpu", 2, "x")
    with pytest.raises(UserError, match=r"^the command line: gpus_per_node: .*, not -2$"):
        read_profile(path, {"gpus_per_node": -2})
    with pytest.raises(UserError, match=r"^the command line: .*should be greater than 0\.1, not 0\.02"):
        read_profile(path, {"time_limit_hours": 0.02})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("48", 48), ("0.5", 0.5), ("1:30:00", 1.5), ("2-00:00:00", 48), ("2-12", 60), ("1-00:30", 24.5)],
)
def test_a_time_limit_is_in_hours_or_in_the_form_of_slurm(text: str, expected: float) -> None:
    assert hours(text) == expected


@pytest.mark.parametrize("text", ["", "10:00", "forever", "-1", "1-2-3", "1:2:3"])
def test_what_could_be_minutes_or_hours_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"give hours, as in 48 or 0.5, or D-HH:MM:SS"):
        hours(text)
