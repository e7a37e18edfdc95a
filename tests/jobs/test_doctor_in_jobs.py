"""The first act of a job: ranks examine their nodes, and all leave together when one is unfit."""

import json
import logging
import logging.handlers
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pathfm.dist.env import Ranks
from pathfm.dist.groups import Team
from pathfm.dist.watch import Watch, WatchSettings
from pathfm.jobs.attention_choice import Work
from pathfm.jobs.examination import devices, with_torch
from pathfm.jobs.examination.devices import all_reduce, attention
from pathfm.jobs.examination.finding import Finding
from pathfm.jobs.examination.ranks import Report, Unfit, examine, failed_nodes, node_name, skews_s
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe, changes_of_identity, read_recipe
from tests.several_ranks import on_ranks

CPU = torch.device("cpu")
WITHOUT_WORKERS = ["train.num_workers=0", "train.precision=fp32"]


def team_of_this_process() -> Team:
    alone = not dist.is_initialized()
    ranks = Ranks() if alone else Ranks(dist.get_rank(), dist.get_world_size(), 0, 1)
    return Team(ranks, CPU, Watch(None, 0, 1, WatchSettings()))


def as_node(number: int, folder: Path) -> None:
    """This process is one of a Slurm step, on a node of its own."""
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": f"n{number}"}
    (folder / "logs" / "7.0").mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Scene:
    """What two ranks, each on a node of its own, are like."""

    visible_gpus: tuple[str, str] = ("", "")
    ahead_s: tuple[float, float] = (0, 0)
    settings: tuple[str, ...] = ()


SCENES = {
    "well": Scene(),
    "a GPU is missing": Scene(visible_gpus=("", "0")),
    "a clock is a little off": Scene(ahead_s=(0, 3)),
    "a clock is far off": Scene(ahead_s=(0, 3600)),
    "nobody looks": Scene(("", "0"), (0, 3600), ("train.examine=false",)),
}
Outcome = tuple[str, str]  # what an examination raised, and what it logged


def play(place: Path) -> dict[str, Outcome]:
    """Every scene on this rank, each in a folder of its own."""
    return {name: examined(place / name, scene) for name, scene in SCENES.items()}


def examined(folder: Path, scene: Scene) -> Outcome:
    rank = dist.get_rank()
    as_node(rank, folder)
    os.environ["CUDA_VISIBLE_DEVICES"] = scene.visible_gpus[rank]
    recipe = read_recipe(None, [*WITHOUT_WORKERS, *scene.settings]).recipe
    error = ""
    with logged() as messages:
        try:
            examine(recipe, Run(folder), team_of_this_process(), lambda: time.time() + scene.ahead_s[rank])
        except Unfit as unfit:
            error = str(unfit)
    return error, "\n".join(messages)


@contextmanager
def logged() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("pathfm"), logging.handlers.BufferingHandler(1000)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    messages: list[str] = []
    yield messages
    messages += [record.getMessage() for record in handler.buffer]
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def outcomes(place: Path) -> dict[str, tuple[Outcome, Outcome]]:
    first, other = on_ranks(2, play, place)
    return {name: (first[name], other[name]) for name in SCENES}


def doctor_json(place: Path, scene: str) -> Path:
    return place / scene / "logs" / "7.0" / "doctor.json"


def test_ranks_that_are_well_say_so_in_one_line(outcomes, place: Path):
    (first, said), (other, unsaid) = outcomes["well"]
    assert first == other == unsaid == ""
    assert said.startswith("examined 2 ranks on 2 nodes in ")
    assert ": all well, all-reduce " in said
    assert "\n" not in said
    assert [path.name for path in (place / "well").rglob("*")] == ["logs", "7.0"]


def test_one_failing_node_ends_all_ranks_and_is_named(outcomes, place: Path):
    (first, said), (other, _) = outcomes["a GPU is missing"]
    assert first == other
    assert "GPU of n1: torch sees no GPU here, but CUDA_VISIBLE_DEVICES=0" in first
    assert "GPU    fail     n1: torch sees no GPU" in said
    told = json.loads(doctor_json(place, "a GPU is missing").read_text())
    assert told["failed_nodes"] == ["n1"]
    assert [(finding["node"], finding["check"]) for finding in told["findings"]] == [("n1", "GPU")]


def test_a_clock_that_is_a_little_off_is_told_and_stops_nothing(outcomes, place: Path):
    (first, said), (other, _) = outcomes["a clock is a little off"]
    assert first == other == ""
    assert "clock  warn" in said
    assert not doctor_json(place, "a clock is a little off").exists()


def test_clocks_far_apart_end_the_job_but_of_two_none_is_named(outcomes, place: Path):
    (first, _), (other, _) = outcomes["a clock is far off"]
    assert first == other != ""
    assert json.loads(doctor_json(place, "a clock is far off").read_text())["failed_nodes"] == []


def test_train_examine_false_looks_at_nothing(outcomes):
    assert outcomes["nobody looks"] == (("", ""), ("", ""))


def test_a_process_alone_is_examined_in_a_slurm_job_only(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    recipe = read_recipe(None, WITHOUT_WORKERS).recipe
    examine(recipe, Run(tmp_path / "missing"), team_of_this_process())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    with pytest.raises(Unfit, match=r"n5: there is no .*missing here"):
        examine(recipe, Run(tmp_path / "missing"), team_of_this_process())
    told = json.loads((tmp_path / "missing" / "logs" / "7.0" / "doctor.json").read_text())
    assert told["failed_nodes"] == ["n5"]


def test_what_most_nodes_fail_is_no_fault_of_theirs():
    def reports(check: str, number: int, failing: set[int]) -> list[Report]:
        verdicts = ["fail" if node in failing else "ok" for node in range(number)]
        return [Report(rank, f"n{rank}", Finding(check, verdict, "")) for rank, verdict in enumerate(verdicts)]

    assert failed_nodes(reports("GPU", 3, {1})) == ["n1"]
    assert failed_nodes(reports("GPU", 3, {0, 1, 2})) == []
    assert failed_nodes(reports("GPU", 3, {0, 1})) == []
    assert failed_nodes(reports("GPU", 1, {0})) == ["n0"]
    assert failed_nodes([*reports("GPU", 4, {1}), *reports("clock", 4, {3}), *reports("attention", 4, set())]) == [
        "n1",
        "n3",
    ]


@pytest.mark.parametrize(
    ("clocks", "skews"),
    [
        ([7.0], [0]),
        ([0, 6], [-6, 6]),
        ([0, 0, 6], [0, 0, 6]),
        ([0, -9, 0, 0], [0, -9, 0, 0]),
        ([1, 1, 1], [0, 0, 0]),
    ],
)
def test_the_clock_that_differs_from_most_is_the_one_that_is_off(clocks: list[float], skews: list[float]):
    assert skews_s(clocks) == skews


def test_a_node_is_called_as_slurm_calls_it():
    assert node_name({"SLURMD_NODENAME": "gpu-03"}) == "gpu-03"
    assert node_name({}) != ""


def test_examining_is_no_part_of_a_runs_identity():
    assert changes_of_identity(Recipe(), read_recipe(None, ["train.examine=false"]).recipe) == []


# ---- devices


def test_sdpa_works_on_a_cpu_and_xformers_is_missed_only_where_it_was_asked_for():
    assert attention("auto", CPU, torch.bfloat16).verdict == "ok"
    asked = attention("xformers", CPU, torch.float32)
    assert asked.verdict == "fail"
    assert "xformers does not" in asked.found
    assert "student.attention=auto" in asked.advice


def test_the_ways_to_compute_attention_that_work_are_named_and_the_fastest_with_its_time():
    work = Work(((1, 5), (2, 3)), 2, 8, torch.bfloat16, CPU)
    found = attention("auto", CPU, torch.bfloat16, work).found
    assert found.startswith("sdpa_fp32 and sdpa work on cpu in bfloat16, the fastest is sdpa")
    assert re.search(r"\(sdpa\S* [\d.]+ ms, sdpa\S* [\d.]+ ms\)", found)


def test_a_gpu_for_which_nothing_but_sdpa_works_is_warned_of(monkeypatch):
    monkeypatch.setattr(devices, "candidates", lambda device, dtype: ("xformers", "varlen", "sdpa"))
    finding = attention("auto", CPU, torch.bfloat16)
    assert finding.verdict == "warn"
    assert finding.found.startswith("sdpa works on cpu in bfloat16; xformers does not: ")
    assert "; varlen does not: " in finding.found


def test_an_attention_that_computes_wrong_numbers_fails(monkeypatch):
    monkeypatch.setattr("pathfm.jobs.examination.devices.attend", lambda query, *others: query)
    assert attention("auto", CPU, torch.float32).verdict == "fail"


def reduced() -> tuple[str, str]:
    finding = all_reduce(CPU)
    return finding.verdict, finding.found


def test_an_all_reduce_tells_its_speed_and_its_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for verdict, found in on_ranks(2, reduced):
        assert verdict == "ok"
        assert found.endswith("B/s by gloo over lo")


def test_the_size_of_a_checkpoint_is_counted_without_making_one():
    tiny = ["student.arch=vit_tiny", "dino.head_n_prototypes=64", "crops.global_crops_size=48",
            "crops.local_crops_size=32"]  # fmt: skip
    size = with_torch.checkpoint_bytes(read_recipe(None, tiny).recipe)
    bigger = with_torch.checkpoint_bytes(read_recipe(None, [*tiny, "dino.head_n_prototypes=1064"]).recipe)
    assert bigger - size == 16 * 1000 * (256 + 1)  # directions and lengths
