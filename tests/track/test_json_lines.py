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
