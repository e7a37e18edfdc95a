from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.errors import UserError
from pathfm.jobs.attention import main
from tests.features.small import PATCH, make_regions, patch_backbone, region_backbone, saved_teacher


@pytest.fixture
def region(tmp_path: Path) -> Path:
    return sorted(make_regions(tmp_path / "regions", 1).iterdir())[0]


def test_both_levels_are_drawn_into_the_previews_of_the_run(region, tmp_path, capsys):
    patch = saved_teacher(tmp_path / "run" / "exports" / "teacher_00000001.pth", patch_backbone())
    level = saved_teacher(tmp_path / "region.pth", region_backbone())
    options = ["--weights", str(patch), "--region-weights", str(level), "--patch-size", str(PATCH), "--device", "cpu"]
    assert main([str(region), *options]) == 0
    written = sorted((tmp_path / "run" / "previews").iterdir())
    assert [path.name for path in written] == [f"attention_{region.stem}_{name}.png" for name in ("patch", "region")]
    said = capsys.readouterr().out
    assert all(f"wrote {path}" in said for path in written)
    for path in written:
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 10


def test_weights_of_no_run_need_a_place_for_the_pictures(region, tmp_path):
    patch = saved_teacher(tmp_path / "patch.pth", patch_backbone())
    with pytest.raises(UserError, match="say by --output where the pictures are to go"):
        main([str(region), "--weights", str(patch)])


def test_what_cannot_be_drawn_is_one_line(region, tmp_path):
    patch = saved_teacher(tmp_path / "patch.pth", patch_backbone())
    options = ["--weights", str(patch), "--output", str(tmp_path / "out")]
    (tmp_path / "broken.png").write_bytes(b"no image")
    for image, reason in [
        (tmp_path / "nowhere.png", "cannot read .*nowhere.png"),
        (tmp_path / "broken.png", "broken.png cannot be decoded"),
        (region, "a region of 128x128 px is not a whole number of 256 px patches"),
    ]:
        with pytest.raises(UserError, match=reason):
            main([str(image), *options])
    assert not (tmp_path / "out").exists()
