import pytest

from pathfm.track.console import Console

LINE = {"step": 4, "total_loss": 2.5, "lr": 1e-4, "timing": {"seconds_per_step": 90.0, "samples_per_second": 12.3}}


def test_without_a_terminal_there_is_a_line_with_loss_speed_and_time_left(capsys):
    with Console(total_steps=100, first_step=0, speak=True) as console:
        console.step(4)
        console.summary(LINE)
        console.summary(LINE)  # within ten seconds
    assert capsys.readouterr().err == "step 4/100  loss 2.5000  lr 1.00e-04  12.3 samples/s  2h24 left\n"


@pytest.mark.parametrize("loss", [None, 1.0])
def test_the_last_step_is_always_said(capsys, loss):
    with Console(total_steps=4, first_step=0, speak=True) as console:
        console.summary({**LINE, "step": 1})
        console.summary({**LINE, "total_loss": loss})
    assert ("loss not finite" if loss is None else "loss 1.0000") in capsys.readouterr().err.splitlines()[-1]


def test_other_ranks_are_silent(capsys):
    with Console(total_steps=100, first_step=0, speak=False) as console:
        console.step(4)
        console.summary(LINE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("standing", "said"),
    [
        ({"best": None}, "; the teacher has not beaten its student yet"),
        ({"best": 0.9, "best_step": 40}, ", the best so far"),
        ({"best": 0.95, "best_step": 20}, "; the best is 0.9500, of step 20"),
        ({"best": 0.95, "best_step": 20, "patience": 5}, "; the best is 0.9500, of step 20, 2 of 5 tunings ago"),
    ],
)
def test_every_tuning_is_said_with_what_it_means(capsys, standing, said):
    early_stopping = {"metric": "auc_20", "best_step": 0, "without_improvement": 2, "patience": None, **standing}
    line = {"step": 40, "teacher": {"auc_20": 0.9}, "student": {"auc_20": 0.85}, "early_stopping": early_stopping}
    Console(total_steps=100, first_step=0, speak=True).tuning(line)
    Console(total_steps=100, first_step=0, speak=False).tuning(line)
    assert capsys.readouterr().err == f"step 40: auc_20 0.9000 (teacher) 0.8500 (student){said}\n"
