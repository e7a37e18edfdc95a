"""The attention of a run: the fastest that works everywhere is taken, and stays."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pathfm.dist.env import ALONE, Ranks
from pathfm.errors import UserError
from pathfm.jobs import attention_choice
from pathfm.jobs.attention_choice import Timer, Work, as_text, fastest, time_all, with_attention, work_of
from pathfm.lifecycle.run import Run
from pathfm.models.attention import Backend
from pathfm.recipe import Recipe, read_recipe
from pathfm.training.plan import plan_training
from tests.jobs.journeys import train
from tests.several_ranks import on_ranks

CPU = torch.device("cpu")
BF16 = ("student.arch=vit_small", "student.patch_size=14", "crops.local_crops_size=98", "train.precision=bf16",
        "train.batch_size_per_gpu=4", "student.drop_path_rate=0")  # fmt: skip


def timer(**ms: float) -> Timer:
    """Gives these milliseconds."""

    def timed(backends: Sequence[Backend], work: Work) -> dict[Backend, float]:
        return {backend: ms[backend] for backend in backends}

    return timed


def never(backends: Sequence[Backend], work: Work) -> dict[Backend, float]:
    raise AssertionError("nothing is to be measured")


def chosen(directory: Path, timed: Timer, *settings: str, ranks: Ranks = ALONE) -> str:
    recipe = read_recipe(None, [*BF16, *settings]).recipe
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, ranks.world_size, 1000)
    return with_attention(recipe, plan, Run(directory), ranks, CPU, timed).student.attention


def records(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "attention.json").read_text())


@pytest.mark.parametrize(
    ("ms", "choice"), [({"sdpa": 5, "sdpa_fp32": 2}, "sdpa_fp32"), ({"sdpa": 2, "sdpa_fp32": 5}, "sdpa")]
)
def test_the_fastest_is_taken(tmp_path: Path, ms: dict[str, float], choice: str) -> None:
    assert chosen(tmp_path, timer(**ms)) == choice
    (record,) = records(tmp_path)
    assert record["choice"] == choice
    assert record["forward_and_backward_ms"] == ms
    assert record["layout"] == [[8, 257], [32, 50]]


def test_of_two_that_are_as_good_as_equal_the_first_is_taken() -> None:
    assert fastest({"xformers": 1.02, "varlen": 1.0, "sdpa": 2.0}) == "xformers"
    assert fastest({"xformers": 1.06, "varlen": 1.0, "sdpa": 2.0}) == "varlen"


def test_a_later_start_keeps_the_choice_though_times_have_turned_round(tmp_path: Path) -> None:
    assert chosen(tmp_path, timer(sdpa=5, sdpa_fp32=2)) == "sdpa_fp32"
    assert chosen(tmp_path, timer(sdpa=1, sdpa_fp32=2)) == "sdpa_fp32"
    assert chosen(tmp_path, never) == "sdpa_fp32"
    assert len(records(tmp_path)) == 1


def test_another_device_is_measured_and_the_first_one_is_remembered(tmp_path: Path, monkeypatch) -> None:
    assert chosen(tmp_path, timer(sdpa=5, sdpa_fp32=2)) == "sdpa_fp32"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(attention_choice, "name_of", lambda device: "another processor")
        assert chosen(tmp_path, timer(sdpa=1, sdpa_fp32=2)) == "sdpa"
        assert chosen(tmp_path, never) == "sdpa"
    assert chosen(tmp_path, never) == "sdpa_fp32"
    assert [record["choice"] for record in records(tmp_path)] == ["sdpa_fp32", "sdpa"]


def test_another_precision_is_measured_anew(tmp_path: Path) -> None:
    assert chosen(tmp_path, timer(sdpa=5, sdpa_fp32=2)) == "sdpa_fp32"
    assert chosen(tmp_path, timer(sdpa=1, sdpa_fp32=2), "train.precision=fp16") == "sdpa"


@pytest.mark.parametrize("problem", ["its numbers differ from SDPA's", "RuntimeError: no kernel"])
def test_what_does_not_work_is_never_taken_however_fast_it_is(tmp_path: Path, monkeypatch, problem: str) -> None:
    assert chosen(tmp_path, timer(sdpa=5, sdpa_fp32=2)) == "sdpa_fp32"
    monkeypatch.setattr(
        attention_choice, "what_stops", lambda backend, *where: problem if backend == "sdpa_fp32" else None
    )
    assert chosen(tmp_path / "new", timer(sdpa=5, sdpa_fp32=2)) == "sdpa"
    assert chosen(tmp_path, timer(sdpa=5, sdpa_fp32=2)) == "sdpa"  # nor when it did work at an earlier start


def test_a_recipe_that_names_a_backend_is_obeyed_without_measuring(tmp_path: Path) -> None:
    assert chosen(tmp_path, never, "student.attention=sdpa") == "sdpa"
    assert not (tmp_path / "attention.json").exists()


def test_a_recipe_that_names_what_does_not_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student.attention=varlen does not work here"):
        chosen(tmp_path, never, "student.attention=varlen")


def test_in_fp32_on_a_cpu_there_is_nothing_to_choose(tmp_path: Path) -> None:
    assert chosen(tmp_path, never, "train.precision=fp32") == "sdpa"


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text("{")
    with pytest.raises(UserError, match=r"attention.json cannot be read .*; remove it"):
        chosen(tmp_path, never)


def test_a_run_says_what_it_took(recipe: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = train(recipe, data, run, "train.precision=bf16", "optim.total_steps=2")
    assert trained.returncode == 0, trained.stderr
    (segment,) = json.loads((run / "provenance.json").read_text())
    assert segment["attention"] == "sdpa_fp32"
    assert not (run / "attention.json").exists(), "on a CPU nothing is measured"


def choice_of_rank(directory: Path, broken_on: int | None) -> str:
    """Ranks that measure the contrary of each other."""
    rank = torch.distributed.get_rank()
    if rank == broken_on:
        attention_choice.what_stops = lambda backend, *where: "broken" if backend == "sdpa_fp32" else None
    turned = timer(sdpa=1, sdpa_fp32=2) if rank else timer(sdpa=2, sdpa_fp32=1)
    return chosen(directory, turned, ranks=Ranks(rank, 2, rank, 2))


def test_ranks_take_what_the_first_one_measured(tmp_path: Path) -> None:
    assert on_ranks(2, choice_of_rank, tmp_path, None) == ["sdpa_fp32", "sdpa_fp32"]
    assert len(records(tmp_path)) == 1


def test_what_does_not_work_on_one_rank_is_taken_by_none(tmp_path: Path) -> None:
    assert on_ranks(2, choice_of_rank, tmp_path, 1) == ["sdpa", "sdpa"]


def test_what_is_timed_is_what_drop_path_leaves_to_a_block() -> None:
    settings = ["student.drop_path_rate=0.4", "student.num_register_tokens=4"]
    assert work_of(recipe_with(*settings), 4, CPU).layout == ((4, 261), (19, 54))
    assert work_of(recipe_with("student.drop_path_rate=0.1"), 4, CPU).layout == ((8, 257), (32, 50))
    growing = work_of(recipe_with("student.drop_path_rate=0.4", "student.drop_path_uniform=false"), 4, CPU)
    assert growing.layout == ((6, 257), (25, 50))  # 0.2 on average
    assert work_of(recipe_with("crops.local_crops_number=0"), 4, CPU).layout == ((8, 257),)


def recipe_with(*settings: str) -> Recipe:
    return read_recipe(None, [*BF16, *settings]).recipe


def test_measuring_draws_no_random_numbers_and_gives_times() -> None:
    before = torch.get_rng_state()
    ms = time_all(["sdpa", "sdpa_fp32"], Work(((2, 5), (3, 4)), 2, 8, torch.bfloat16, CPU))
    assert set(ms) == {"sdpa", "sdpa_fp32"}
    assert all(taken > 0 for taken in ms.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert as_text({"sdpa": 20.0, "sdpa_fp32": 1.234}) == "sdpa_fp32 1.23 ms, sdpa 20 ms"
