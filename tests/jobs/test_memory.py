import re
from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.jobs.memory import main

SMALL = """
student: {arch: vit4k_xs, patch_size: 14, drop_path_rate: 0.1}
dino: {head_n_prototypes: 4096, head_hidden_dim: 256}
crops: {global_crops_size: 84, local_crops_size: 42, local_crops_number: 2}
train: {batch_size_per_gpu: 8}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def test_the_table_adds_up_to_what_is_needed_and_says_whether_it_fits(recipe: str, capsys):
    assert main([recipe, "--gpus", "2", "--memory", "80", "train.micro_batch_size=4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("small: a batch of 16 on 2 GPUs, 8 on each; train.micro_batch_size=4")
    gib = {what: float(size) for size, what in re.findall(r"^ +([0-9.]+)  (.+)$", printed, re.MULTILINE)}
    peak = next(size for what, size in gib.items() if "max_memory_allocated" in what)
    parts = [size for what, size in gib.items() if "max_memory_allocated" not in what]
    assert sum(parts[: list(gib).index(next(what for what in gib if "max_memory" in what))]) == pytest.approx(
        peak, abs=0.05
    )
    assert gib["usable of 80 GB"] == 79.04
    assert "It fits." in printed
    assert "train.micro_batch_size=8 parallel.recompute=none parallel.strategy=ddp" in printed.splitlines()[-1]


def test_where_nothing_fits_one_line_says_what_came_nearest(recipe: str, capsys):
    main([recipe, "--memory", "1.1"])
    last = capsys.readouterr().out.splitlines()[-1]
    nearest = r"the smallest that was tried needs 0\.\d GiB \(train\.micro_batch_size=1 .*\)"
    assert re.fullmatch(rf"Nothing fits; {nearest}\. Take more GPUs.*", last)


def test_gpus_that_cannot_share_the_batch_are_refused(recipe: str):
    with pytest.raises(UserError, match="cannot be shared equally by 3 ranks"):
        main([recipe, "--gpus", "3", "train.global_batch_size=16"])
    with pytest.raises(UserError, match="--memory 0 is no size"):
        main([recipe, "--memory", "0"])
