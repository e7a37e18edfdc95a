from pathlib import Path

from pathfm.track.wandb_mirror.sent import Sent


def sent_by(path: Path, mode, *rows, ended=True) -> Sent:
    sent = Sent(path)
    sent.begin(mode, "folder")
    for row, shown in rows:
        sent.add(row, shown)
    if ended:
        sent.end()
    return Sent(path)


def metrics(step: int, left_out: int = 0) -> tuple[int, dict]:
    return step, {"metrics": step, "left_out": left_out}


def test_what_was_sent_is_known_to_the_next_start(tmp_path: Path):
    sent = sent_by(tmp_path / "sent.jsonl", "online", metrics(10), (11, {"tuning": ["10 run"], "picture": ["a"]}))
    assert (sent.last_row, sent.metrics_to, sent.left_out) == (11, 10, 0)
    assert sent.has("tuning", "10 run")
    assert sent.has("picture", "a")
    assert not sent.has("picture", "10 run")


def test_the_server_has_the_last_word(tmp_path: Path):
    path = tmp_path / "sent.jsonl"
    sent = sent_by(path, "online", metrics(10), (10, {"alarm": ["x"]}), metrics(20), (21, {"tuning": ["20 run"]}))
    sent.only_what_the_server_has(20)
    for again in (sent, Sent(path)):
        assert (again.last_row, again.metrics_to) == (20, 20)
        assert again.has("alarm", "x")
        assert not again.has("tuning", "20 run")
    sent.only_what_the_server_has(-1)
    assert (sent.last_row, sent.metrics_to, sent.has("alarm", "x")) == (-1, -1, False)


def test_a_server_with_more_rows_than_are_known_has_all_up_to_them(tmp_path: Path):
    sent = sent_by(tmp_path / "sent.jsonl", "online", metrics(10))
    sent.only_what_the_server_has(50)
    assert (sent.last_row, sent.metrics_to, sent.all_to) == (50, 50, 50)


def test_alarms_that_only_offline_files_have_are_sent_anew(tmp_path: Path):
    sent = sent_by(tmp_path / "sent.jsonl", "offline", metrics(10), (10, {"alarm": ["x"]}))
    sent.only_what_the_server_has(10)  # as if the offline files had been sent
    assert (sent.metrics_to, sent.has("alarm", "x")) == (10, False)


def test_an_offline_client_that_was_killed_is_asked_for_what_it_wrote(tmp_path: Path):
    path = tmp_path / "sent.jsonl"
    assert sent_by(path, "offline", metrics(10)).unfinished_folder() is None
    sent = sent_by(path, "offline", metrics(20), metrics(30), ended=False)
    assert sent.unfinished_folder() == "folder"
    sent.only_what_was_written({20})
    assert (sent.metrics_to, sent.last_row) == (20, 20)
    assert sent_by(path, "online", ended=False).unfinished_folder() is None


def test_rows_after_a_step_are_forgotten_and_where_that_is_not_possible_kept(tmp_path: Path):
    sent = sent_by(tmp_path / "sent.jsonl", "online", metrics(10), metrics(20), (20, {"alarm": ["x"]}), metrics(30))
    assert (sent.row_of(25), sent.row_of(20), sent.row_of(9)) == (20, 20, None)
    sent.begin("online", "folder")
    sent.keep_as_it_is(left_out=4)
    assert (sent.metrics_to, sent.left_out, sent.last_row) == (30, 4, 30)
    sent.forget_rows_after(10)
    assert (sent.metrics_to, sent.left_out, sent.has("alarm", "x")) == (10, 0, True)
