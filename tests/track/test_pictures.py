from pathlib import Path

from PIL import Image

from pathfm.track.pictures import draw_losses, draw_schedules


def test_losses_are_drawn_also_with_gaps_and_with_nothing(tmp_path: Path):
    lines = [{"step": s, "samples_seen": 8 * s, "total_loss": None if s == 2 else 1 / s} for s in range(1, 5)]
    for name, what in {"gap": lines, "none": []}.items():
        draw_losses(what, tmp_path / f"{name}.png", name)
        assert Image.open(tmp_path / f"{name}.png").size[1] > 100


def test_one_panel_per_schedule(tmp_path: Path):
    draw_schedules({"lr": [0, 1, 0], "momentum": [1, 1, 1]}, [0, 1, 2], tmp_path / "a.png", "two")
    draw_schedules({"lr": [0, 1, 0]}, [0, 1, 2], tmp_path / "b.png", "one")
    assert Image.open(tmp_path / "a.png").size[0] > Image.open(tmp_path / "b.png").size[0]
