"""`launchers/extract.py`: features on a cluster, brought back by the same supervisor as a training run."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.jobs.submit_extraction import main
from pathfm.launch.attempts import submissions

LAUNCHER = Path(__file__).parents[2] / "launchers" / "extract.py"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Regions, the teachers of two steps of a run, and a Slurm that takes everything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regions").mkdir()
    exports = tmp_path / "runs" / "vits" / "exports"
    exports.mkdir(parents=True)
    for step in (100, 200):
        (exports / f"teacher_{step:08d}.pth").touch()
    (tmp_path / "bin").mkdir()
    scripts = {"sbatch": "echo Submitted batch job 12", "srun": "", "scontrol": "exit 1"}
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def words(place: Path, *more: str, steps: tuple[int, ...] = (100,)) -> list[str]:
    weights = [str(place / "runs" / "vits" / "exports" / f"teacher_{step:08d}.pth") for step in steps]
    return ["--regions", "regions", "--weights", *weights, "--output", "features/vits", *more]


def starts(shown: str) -> list[list[str]]:
    """The commands that the supervisors start."""
    return [shlex.split(line.removeprefix("# ")) for line in shown.splitlines() if line.startswith("# srun ")]


def test_a_dry_run_shows_one_job_with_the_options_of_pathfm_extract(place: Path, capsys: Capture) -> None:
    assert main(words(place, "--nodes", "2", "--dry-run", "--region-size", "4096")) == 0
    ((*_, python, u, m, package, verb), tail) = _parted(starts(capsys.readouterr().out)[0])
    assert (python, u, m, package, verb) == (sys.executable, "-u", "-m", "pathfm", "extract")
    teacher = f"{place}/runs/vits/exports/teacher_00000100.pth"
    expected = ["--regions", f"{place}/regions", "--weights", teacher, "--output", f"{place}/features/vits"]
    assert tail == [*expected, "--region-size", "4096"]


def _parted(command: list[str]) -> tuple[list[str], list[str]]:
    end = command.index("extract") + 1
    return command[:end], command[end:]


def test_several_weights_are_an_array_in_folders_of_their_own(place: Path, capsys: Capture) -> None:
    assert main(words(place, "--parallel", "1", steps=(100, 200))) == 0
    said = capsys.readouterr().out
    assert "submitted job 12: extraction vits, 2 runs, 1 x 8 tasks each, 1 at once" in said
    for step in ("00000100", "00000200"):
        (submission,) = submissions(place / "features" / "vits" / f"vits_teacher_{step}")
        assert submission.job.startswith("12_")


def test_an_extraction_is_submitted_once(place: Path, capsys: Capture) -> None:
    assert main(words(place)) == 0
    assert "submitted job 12: run vits, 1 x 8 tasks" in capsys.readouterr().out
    (place / "bin" / "scontrol").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n"
    )
    with pytest.raises(UserError, match=r"run vits has ended: .* add --resubmit"):
        main(words(place))
    assert main(words(place, "--resubmit")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--regions", "nowhere"], "there is no nowhere"),
        (["--table", "no.csv"], "there is no no.csv"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--parallel", "2"], "add several --weights"),
        (["--cluster", "local", "--nodes", "2"], "--nodes is for --cluster slurm"),
        (["--output", "bin/sbatch/features"], "bin/sbatch cannot be written"),
        (["--regions", "Pathology:root=nowhere"], "there is no Pathology:root=nowhere"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_queued(place: Path, change: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(words(place, *change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_extract_from_is_said(place: Path) -> None:
    with pytest.raises(UserError, match="nothing to extract from is named"):
        main(["--weights", "runs/vits/exports/teacher_00000100.pth", "--output", "x"])


def test_a_data_set_is_named_in_place_of_regions(place: Path, capsys: Capture) -> None:
    (place / "tiles").mkdir()
    dataset = f"KNN:root={place / 'tiles'}:split=test"
    command = ["--dataset", dataset, *words(place, "--dry-run", "--features", "cls,patches")[2:]]
    assert main(command) == 0
    _, tail = _parted(starts(capsys.readouterr().out)[0])
    assert tail[:2] == ["--dataset", dataset]
    assert tail[-2:] == ["--features", "cls,patches"]
    with pytest.raises(UserError, match="--regions and --dataset are extractions of their own"):
        main(words(place, "--dataset", dataset))
    with pytest.raises(UserError, match="there is no KNN:root=nowhere:split=test"):
        main(["--dataset", "KNN:root=nowhere:split=test", *command[2:-3]])
    with pytest.raises(UserError, match="no data set is called 'tiles'"):
        main(["--dataset", "tiles", *command[2:]])


def test_two_weights_of_one_name_do_not_share_a_folder(place: Path) -> None:
    with pytest.raises(UserError, match="two of the weights would be extracted into"):
        main(words(place, steps=(100, 100)))


def test_here_the_command_itself_is_shown(place: Path, capsys: Capture) -> None:
    assert main(words(place, "--cluster", "local", "--dry-run", "--batch-size", "8")) == 0
    assert capsys.readouterr().out.endswith("--batch-size 8\n")


def test_the_launcher_starts_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(LAUNCHER), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Several weights make an array" in done.stdout
