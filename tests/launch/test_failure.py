"""Of many ranks' logs a person is shown the one traceback that came first."""

import os
from pathlib import Path

from pathfm.launch.failure import first_failure

TRACEBACK = """\
Traceback (most recent call last):
  File "loop.py", line 7, in step
    loss = method(batch)
{error}
"""


def log(folder: Path, rank: int, text: str, closed: int = 0) -> Path:
    path = folder / f"rank_{rank}.log"
    path.write_text(text)
    os.utime(path, (closed, closed))
    return path


def test_the_rank_that_failed_first_is_shown_not_those_that_lost_it(tmp_path: Path):
    logs = [
        log(tmp_path, 0, "step 1\n" + TRACEBACK.format(error="RuntimeError: connection closed by peer"), closed=20),
        log(tmp_path, 1, "step 1\n" + TRACEBACK.format(error="ValueError: no such tile") + "and on\n", closed=10),
        log(tmp_path, 2, "step 1\nlost: rank 1\n", closed=5),
    ]
    assert first_failure(logs, tmp_path).splitlines() == [
        f"rank 1 failed first ({logs[1]}):",
        "Traceback (most recent call last):",
        '  File "loop.py", line 7, in step',
        "    loss = method(batch)",
        "ValueError: no such tile",
    ]


def test_of_several_tracebacks_in_a_log_the_first_is_the_cause(tmp_path: Path):
    text = (
        TRACEBACK.format(error="OSError: the disk")
        + "\nDuring handling of the above exception, another exception occurred:\n\n"
        + TRACEBACK.format(error="RuntimeError: later")
    )
    shown = first_failure([log(tmp_path, 0, text)], tmp_path)
    assert shown.endswith("OSError: the disk")
    assert "later" not in shown


def test_a_very_long_traceback_keeps_its_head_and_its_end(tmp_path: Path):
    frames = "".join(f'  File "deep.py", line {number}, in f\n    f()\n' for number in range(1000))
    text = f"Traceback (most recent call last):\n{frames}RecursionError: maximum depth\n"
    lines = first_failure([log(tmp_path, 0, text)], tmp_path).splitlines()
    assert lines[1:3] == ["Traceback (most recent call last):", "  ..."]
    assert lines[-1] == "RecursionError: maximum depth"
    assert len(lines) < 70


def test_a_traceback_that_was_cut_off_is_shown_as_far_as_it_goes(tmp_path: Path):
    shown = first_failure([log(tmp_path, 0, 'Traceback (most recent call last):\n  File "a.py", line 1')], tmp_path)
    assert shown.endswith('\n  File "a.py", line 1')


def test_without_a_traceback_the_last_line_for_a_person_is_shown(tmp_path: Path):
    logs = [
        log(tmp_path, 0, "step 1\n", closed=1),
        log(tmp_path, 1, "error: an older one\nerror: no data set is given\nthe end\n", closed=2),
    ]
    assert first_failure(logs, tmp_path) == f"error: no data set is given ({logs[1]})"


def test_a_lost_rank_is_told_when_nobody_knows_more(tmp_path: Path):
    logs = [log(tmp_path, 0, "lost: rank 3 (host n2) gave no sign of life for 120 s\n")]
    assert first_failure(logs, tmp_path).startswith("lost: rank 3 (host n2) gave no sign of life")


def test_nothing_at_all_says_where_to_look(tmp_path: Path):
    nothing = f"no rank left a traceback; it was killed, or never began; what was logged is in {tmp_path}"
    assert first_failure([], tmp_path) == nothing
    assert first_failure([log(tmp_path, 0, "step 1\n"), tmp_path / "rank_1.log"], tmp_path) == nothing


def test_bytes_that_are_no_text_are_no_obstacle(tmp_path: Path):
    path = tmp_path / "rank_0.log"
    path.write_bytes(b"\xff\xfe\0\n" + TRACEBACK.format(error="ValueError: \u00e9").encode("latin-1"))
    assert "ValueError: " in first_failure([path], tmp_path)
