import os
from pathlib import Path

from PIL import Image

from pathfm.track.json_lines import JsonLines
from pathfm.track.wandb_mirror.followed import FollowedExports, FollowedLines, FollowedPictures


def test_lines_come_once_whole_and_again_when_the_file_was_replaced(tmp_path: Path):
    lines, followed = JsonLines(tmp_path / "metrics.jsonl"), FollowedLines(tmp_path / "metrics.jsonl")
    assert followed.look() == []
    for step in (1, 2, 3):
        lines.append({"step": step})
    with lines.path.open("ab") as file:
        file.write(b'{"step": 4')  # it is being written, or its writer was killed
    assert [line["step"] for line in followed.look()] == [1, 2, 3]
    assert followed.look() == []
    lines.append({"step": 5})
    assert [line["step"] for line in followed.look()] == [5]
    lines.forget_after(2)
    lines.append({"step": 3})
    assert [line["step"] for line in followed.look()] == [1, 2, 3]


def test_what_is_no_line_of_a_step_is_passed_over(tmp_path: Path):
    (tmp_path / "alarms.jsonl").write_text('{"step": null}\n[1]\n{}\n{"step": 7}\n')
    assert FollowedLines(tmp_path / "alarms.jsonl").look() == [{"step": 7}]


def test_pictures_are_of_series_with_steps_and_come_again_with_other_content(tmp_path: Path):
    def paint(name: str, grey: int) -> None:
        Image.new("L", (4, 4), grey).save(tmp_path / name)
        os.utime(tmp_path / name, (grey, grey))

    paint("tokens_00000500.png", 1)
    paint("losses.png", 1)
    followed = FollowedPictures(tmp_path)
    first = followed.look()
    assert [(one.name, one.step) for one in first] == [("losses", None), ("tokens", 500)]
    assert followed.look() == []
    paint("losses.png", 2)
    (losses,) = followed.look()
    assert (losses.name, losses.key != first[0].key) == ("losses", True)
    assert [one.key for one in FollowedPictures(tmp_path).look()] == [losses.key, first[1].key]  # as another start sees


def test_an_export_is_there_with_its_last_format_and_the_best_again_when_it_is_another(tmp_path: Path):
    followed = FollowedExports(tmp_path)
    (tmp_path / "teacher_00000010.pth").write_text("a")
    assert followed.look() == []
    (tmp_path / "teacher_00000010.safetensors").write_text("a")
    (tmp_path / "teacher_best.safetensors").write_text("a")
    assert [(one.alias, len(one.files)) for one in followed.look()] == [("00000010", 2), ("best", 1)]
    os.utime(tmp_path / "teacher_best.safetensors", (5, 5))
    assert [one.alias for one in followed.look()] == ["best"]
