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
