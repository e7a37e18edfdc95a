from pathfm import log


def test_progress_passes_every_item_on(capsys):
    assert list(log.progress(range(5), "counting")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_progress_in_a_file_says_how_much_is_done(capsys, monkeypatch):
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_LINES", 0.0)
    list(log.progress(["a", "b"], "reading", total=40.0, unit="MB", done=lambda item: {"a": 10.0, "b": 40.0}[item]))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" MB")[0] for line in lines] == ["reading: 10 of 40", "reading: 40 of 40"]
