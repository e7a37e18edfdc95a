"""`pathfm doctor` on good and broken machines, folders and clusters: every check says what it found and what to do."""

import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pathfm.jobs.doctor import Subject, data, main
from pathfm.jobs.examination import cluster, machine, places
from pathfm.jobs.examination.finding import Finding, examined, findings_table, of_problem, worst
from pathfm.launch.profile import Profile
from pathfm.recipe import read_recipe
from pathfm.track.config import WandbConfig
from tests.jobs.fake_programs import programs
from tests.jobs.journeys import TINY, make_tiles

MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /home rw,relatime shared:2 - nfs4 filer:/export/home rw,vers=4.2
31 22 0:26 / /scratch/big\\040disk rw,relatime - lustre mds@tcp:/lfs rw
32 30 0:27 / /home/me rw - tmpfs tmpfs rw
"""


def of_check(name: str, findings: list[dict[str, str]]) -> dict[str, str]:
    return next(finding for finding in findings if finding["check"] == name)


# ---- findings


def test_a_check_that_hangs_is_left_behind_at_its_deadline():
    released = threading.Event()
    finding = examined("mounts", lambda: released.wait() and Finding("mounts", "ok", ""), 0.05, "a mount that hangs?")
    released.set()
    assert finding == Finding("mounts", "fail", "did not answer in 0.05 s: a mount that hangs?")


def test_a_check_that_raises_is_a_finding():
    def look() -> Finding:
        raise OSError(5, "Input/output error", "/data")

    assert examined("data", look) == Finding("data", "fail", "OSError: [Errno 5] Input/output error: '/data'")


def test_a_message_for_people_is_split_into_what_is_wrong_and_what_to_do():
    assert of_problem("data", "no data set is given; add one; or two") == Finding(
        "data", "fail", "no data set is given", "add one; or two"
    )


def test_the_gravest_verdict_counts():
    assert worst([]) == "ok"
    assert worst([Finding("a", "ok", ""), Finding("b", "fail", ""), Finding("c", "warn", "")]) == "fail"


def test_the_table_wraps_what_is_long_and_stays_within_100_columns():
    table = findings_table(
        [
            Finding("versions", "ok", "python 3.12.1, torch 2.10.0, numpy 2.4.6"),
            Finding("shared memory", "fail", "64.0 MB free in /dev/shm, loader workers fill " + "very much " * 5,
                    "lower train.num_workers or data.prefetch_batches; for docker: --ipc=host or --shm-size"),
        ]
    )  # fmt: skip
    assert table == (
        "  check          verdict  what was found  -> what to do\n"
        "  versions       ok       python 3.12.1, torch 2.10.0, numpy 2.4.6\n"
        "  shared memory  fail     64.0 MB free in /dev/shm, loader workers fill very much very much very\n"
        "                          much very much very much\n"
        "                          -> lower train.num_workers or data.prefetch_batches; for docker:\n"
        "                             --ipc=host or --shm-size"
    )


# ---- the machine


@pytest.mark.parametrize(
    ("installed", "verdict", "said"),
    [
        ({"torch": "2.13.0+cpu"}, "ok", "no xformers"),
        ({"torch": "2.10.0+cu128", "xformers": "0.0.35"}, "ok", "xformers 0.0.35"),
        ({"torch": "2.13.0", "xformers": "0.0.35"}, "warn", "xformers 0.0.35 with torch 2.10"),
        ({"torch": "2.9.1"}, "fail", "pathfm needs torch 2.10"),
        ({}, "fail", "install torch"),
    ],
)
def test_versions_are_compared_with_what_is_needed(installed: dict[str, str], verdict: str, said: str):
    finding = machine.versions(installed)
    assert finding.verdict == verdict
    assert said in finding.found + finding.advice


def test_where_the_image_brings_torch_a_login_node_needs_none():
    assert machine.versions({}, trains_in_an_image=True).verdict == "ok"


def test_the_driver_tells_its_version_and_the_gpus(tmp_path: Path, monkeypatch):
    line = "570.86.15, NVIDIA A100-SXM4-80GB, 81920 MiB"
    programs(tmp_path / "bin", monkeypatch, nvidia_smi=f"echo '{line}'; echo '{line}'")
    finding = machine.driver(gpus_are_needed=True)
    assert finding == Finding("driver", "ok", "driver 570.86.15: 2 x NVIDIA A100-SXM4-80GB, 81920 MiB")


def test_a_driver_that_does_not_talk_fails_only_where_gpus_are_needed(tmp_path: Path, monkeypatch):
    programs(tmp_path / "bin", monkeypatch, nvidia_smi="echo 'Failed to initialize NVML: Driver mismatch'; exit 18")
    assert machine.driver(gpus_are_needed=True).verdict == "fail"
    assert machine.driver(gpus_are_needed=False).verdict == "warn"
    assert "Driver mismatch" in machine.driver(gpus_are_needed=False).found


def test_a_machine_without_a_driver_is_in_order_unless_gpus_are_needed(tmp_path: Path, monkeypatch):
    programs(tmp_path / "bin", monkeypatch)
    assert machine.driver(gpus_are_needed=False).verdict == "ok"
    assert machine.driver(gpus_are_needed=True).verdict == "fail"


def test_loader_workers_fill_shared_memory_with_crops():
    settings = ["train.batch_size_per_gpu=4", "train.num_workers=3", "crops.global_crops_size=32",
                "crops.local_crops_size=16", "crops.local_crops_number=2"]  # fmt: skip
    recipe = read_recipe(None, settings).recipe
    assert machine.loader_bytes(recipe, ranks_on_node=2) == 2 * 3 * 4 * 3 * (2 * 32 * 32 + 2 * 16 * 16)


@pytest.mark.parametrize(
    ("free", "is_here", "verdict"),
    [(200, True, "ok"), (199, True, "warn"), (99, True, "fail"), (99, False, "warn")],
)
def test_shared_memory_must_hold_a_batch_for_each_worker(free: int, is_here: bool, verdict: str):
    assert machine.shared_memory(100, 2, lambda: free, is_here=is_here).verdict == verdict


def test_without_workers_no_shared_memory_is_needed():
    assert machine.shared_memory(0, 2, lambda: 0).verdict == "ok"


# ---- places


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/data", "ext4"), ("/home/you", "nfs4"), ("/home/me/runs", "tmpfs"), ("/homes", "ext4"),
     ("/scratch/big disk/runs", "lustre")],
)  # fmt: skip
def test_a_path_lies_on_the_innermost_mount(path: str, kind: str):
    assert places.mount_of(Path(path), MOUNTINFO).kind == kind


def test_the_file_systems_of_data_and_run_are_named(tmp_path: Path):
    finding = places.mounts({"data": tmp_path}, tmp_path / "runs" / "not yet", several_nodes=False)
    kind = places.mount_of(tmp_path.resolve()).kind
    assert finding.verdict == "ok"
    assert f"data on {kind}" in finding.found
    assert f"run on {kind}" in finding.found


def test_a_run_on_several_nodes_does_not_lie_in_a_folder_of_one(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    finding = places.mounts({}, tmp_path / "runs", several_nodes=True)
    assert finding.verdict == "warn"
    assert f"every node has its own {tmp_path}" in finding.found or "its own /tmp" in finding.found


def file_system(free_bytes: int, free_inodes: int = 10**6, inodes: int = 10**7) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_favail=free_inodes, f_files=inodes)


@pytest.mark.parametrize(
    ("status", "verdict", "advice"),
    [
        (file_system(400), "ok", ""),
        (file_system(399), "warn", "checkpoint.keep_last"),
        (file_system(99), "fail", "make room"),
        (file_system(400, free_inodes=5000), "warn", "inodes"),
        (file_system(400, free_inodes=3), "fail", "make room"),
        (file_system(400, free_inodes=0, inodes=0), "ok", ""),  # a file system that counts none
    ],
)
def test_there_is_room_for_the_checkpoints_that_will_be_kept(tmp_path: Path, status, verdict: str, advice: str):
    finding = places.room(tmp_path / "run", 100, 4, lambda path: status)
    assert finding.verdict == verdict
    assert advice in finding.advice


def test_the_write_speed_is_measured_and_nothing_stays(tmp_path: Path):
    finding = places.write_speed(tmp_path / "runs" / "one", None, 90, probe_bytes=2 * 10**6)
    assert finding.verdict == "ok"
    assert finding.found.startswith("2.0 MB on the disk in ")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_takes_longer_than_an_interrupted_run_has_is_worth_a_warning(tmp_path: Path):
    finding = places.write_speed(tmp_path, 10**15, 90, probe_bytes=10**6)
    assert finding.verdict == "warn"
    assert "checkpoint.leave_within_s" in finding.advice


def test_a_folder_that_cannot_be_written_fails():
    nobody_may_write_here = Path("/sys")
    speed = places.write_speed(nobody_may_write_here, None, 90)
    assert speed.verdict == "fail"
    assert speed.found.startswith("/sys cannot be written: ")
    assert places.run_directory(nobody_may_write_here, None).verdict == "fail"
    assert places.clock_of_files(nobody_may_write_here).found.startswith("not compared, because /sys cannot be written")


def test_a_disk_that_is_full_fails(tmp_path: Path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places.os, "fsync", full)
    finding = places.run_directory(tmp_path, None)
    assert finding.verdict == "fail"
    assert "No space left on device" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_is_missing_on_a_node_or_is_another_one_fails(tmp_path: Path):
    (tmp_path / "mark").touch()
    assert places.run_directory(tmp_path, tmp_path / "mark").verdict == "ok"
    assert "another one than rank 0's" in places.run_directory(tmp_path, tmp_path / "other mark").found
    assert "there is no" in places.run_directory(tmp_path / "run", None).found


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "said"),
    [(0, "ok", "within 1 s"), (3, "warn", "ahead of"), (-3, "warn", "behind"), (60, "fail", "60")],
)
def test_the_clock_is_compared_with_the_file_systems(tmp_path: Path, ahead_s: float, verdict: str, said: str):
    finding = places.clock_of_files(tmp_path / "run", lambda: time.time() + ahead_s)
    assert finding.verdict == verdict
    assert said in finding.found
    assert list(tmp_path.iterdir()) == []


# ---- the cluster


def test_a_controller_that_is_up_is_told(tmp_path: Path, monkeypatch):
    ping = "echo 'Slurmctld(primary) at head is DOWN'; echo 'Slurmctld(backup) at spare is UP'"
    programs(tmp_path / "bin", monkeypatch, sbatch="", srun="", squeue="", scontrol=ping)
    assert cluster.slurm(is_needed=True) == Finding("Slurm", "ok", "Slurmctld(backup) at spare is UP")


@pytest.mark.parametrize(("is_needed", "verdict"), [(True, "fail"), (False, "warn")])
def test_a_controller_that_is_down_matters_to_those_who_submit(tmp_path: Path, monkeypatch, is_needed, verdict):
    down = "echo 'Slurmctld(primary) at head is DOWN'; exit 1"
    programs(tmp_path / "bin", monkeypatch, sbatch="", srun="", squeue="", scontrol=down)
    assert cluster.slurm(is_needed=is_needed).verdict == verdict


def test_slurms_programs_are_on_path_or_named(tmp_path: Path, monkeypatch):
    programs(tmp_path / "bin", monkeypatch, sbatch="")
    assert cluster.slurm(is_needed=True).found == "not on PATH: srun, squeue, scontrol"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert cluster.slurm(is_needed=True).verdict == "fail"
    assert cluster.slurm(is_needed=False).verdict == "ok"


def test_wandb_is_connected_to_only_when_something_is_to_be_sent(monkeypatch):
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    online = WandbConfig(enable=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        there = cluster.weights_and_biases(online, {"WANDB_BASE_URL": f"http://{address}"})
    gone = cluster.weights_and_biases(online, {"WANDB_BASE_URL": f"http://{address}"})
    assert there == Finding("W&B", "ok", f"{address} can be reached from here")
    assert (gone.verdict, gone.advice) == ("warn", "set wandb.mode=offline and send later with 'pathfm wandb-sync RUN'")
    assert cluster.weights_and_biases(online, {"WANDB_MODE": "offline"}).found == "offline, nothing is sent"
    assert cluster.weights_and_biases(WandbConfig(), {}).found == "off"


# ---- the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody works who has packed data and no cluster."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    make_tiles(tmp_path, 40)
    for name in ("SLURM_STEP_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    programs(tmp_path / "bin", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[dict[str, str]]]:
    status = main(["--json", *words])
    return status, json.loads(capsys.readouterr().out)["findings"]


def test_a_machine_that_is_in_order_is_told_to_be(folder: Path, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["--config", "tiny.yaml", "train.dataset_path=Pathology:root=data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all 13 checks are well"
    assert all(len(line) <= 100 for line in lines)
    assert [line.split("  ")[1] for line in lines[1:-1] if not line.startswith("      ")] == [
        "versions", "driver", "GPU", "attention", "all-reduce", "shared memory", "data", "W&B", "mounts", "room",
        "write speed", "clock", "Slurm",
    ]  # fmt: skip
    assert sorted(folder.rglob("*")) == before


def test_an_index_longer_than_its_tar_fails(folder: Path):
    recipe = read_recipe(folder / "tiny.yaml", ["train.dataset_path=Pathology:root=data"]).recipe
    assert data(Subject(recipe), recipe) == Finding("data", "ok", "40 samples in pretrain; the index fits")
    tar = next((folder / "data").glob("*.tar"))
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    finding = data(Subject(recipe), recipe)
    assert finding.verdict == "fail"
    assert str(tar) in finding.found or tar.name in finding.found


def test_what_cannot_be_read_or_breaks_off_is_a_finding_and_the_rest_is_examined(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    status, findings = doctor(capsys, "--config", "tinny", "--profile", "slrum", "--run", "runs/one")
    assert status == 1
    assert "there is no recipe 'tinny'" in of_check("recipe", findings)["found"]
    assert "did you mean 'slurm'" in of_check("profile", findings)["advice"]
    assert "broke off" in of_check("torch", findings)["found"]
    assert of_check("write speed", findings)["verdict"] == "ok"


@pytest.mark.parametrize(
    ("gpus_per_node", "in_job", "verdict"),
    [(0, False, "ok"), (0, True, "ok"), (4, False, "warn"), (4, True, "fail")],
)
def test_a_cluster_with_gpus_wants_them_in_a_job(gpus_per_node: int, in_job: bool, verdict: str):
    assert Subject(profile=Profile(gpus_per_node=gpus_per_node), in_job=in_job).verdict_without_gpu == verdict


def test_a_recipe_for_the_cpu_wants_no_gpu():
    recipe = read_recipe(None, ["train.device=cpu"]).recipe
    assert Subject(recipe, profile=Profile(gpus_per_node=4), in_job=True).verdict_without_gpu == "ok"


def test_checks_with_torch_that_hang_are_left_behind(folder: Path, capsys, monkeypatch):
    (folder / "python").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.setattr("pathfm.jobs.doctor._SECONDS_FOR_TORCH", 0.2)
    _, findings = doctor(capsys)
    assert of_check("torch", findings)["found"].startswith("did not answer in 0.2 s")
