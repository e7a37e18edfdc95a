import resource
from pathlib import Path

from pathfm.track.json_lines import JsonLines


def test_lines_after_a_step_are_forgotten_and_a_half_line_is_dropped(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (5, 10, 15):
        lines.append({"step": step, "total_loss": step / 3})
    with lines.path.open("a") as file:
        file.write('{"step": 20, "tot')
    assert [line["step"] for line in lines.read()] == [5, 10, 15]
    lines.forget_after(10)
    assert [line["step"] for line in lines.read()] == [5, 10]
    assert lines.read()[0]["total_loss"] == 5 / 3
    assert lines.path.read_text().endswith("}\n")


def test_a_file_that_is_not_there_reads_as_nothing(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.forget_after(10)
    assert lines.read() == []
    assert not lines.path.exists()


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path, caplog):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, limits[1]))  # in the middle of the second line
    try:
        lines.append({"step": 2})
        lines.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("could not be written") == 2
    lines.append({"step": 4})
    assert [line["step"] for line in lines.read()] == [1, 2, 3, 4]


def test_any_file_name_can_be_written(tmp_path: Path):
    lines = JsonLines(tmp_path / "quarantine.jsonl")
    names = ["tile\udcff.png", "tile\u2028.png", "türe.png"]
    for name in names:
        lines.append({"step": 1, "file": name})
    assert [line["file"] for line in lines.read()] == names
