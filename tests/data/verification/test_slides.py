import pytest

from pathfm.data.verification.slides import SlideNames
from pathfm.errors import UserError


@pytest.mark.parametrize(
    ("path", "slide"),
    [
        ("tiles/slide_07_1024_2048.png", "slide_07"),
        ("tiles/slide_07.png", "slide_07"),
        ("tiles/S1_x0512_y1024.jpg", "S1"),
        ("tiles/S1-12-3.jpg", "S1"),
        ("tiles/S1 (512,1024).jpg", "S1"),
        ("tiles/osteo_Viable_Case-4-C22-39386-26786_y512_x0.jpg", "osteo_Viable_Case-4-C22-39386-26786"),
        ("tiles/TCGA-A1-A0SB-01Z-00-DX1.jpg", "TCGA-A1-A0SB-01Z-00-DX1"),
        ("tiles/TCGA-A1-A0SB-01Z-00-DX1_20_4.jpg", "TCGA-A1-A0SB-01Z-00-DX1"),
        ("tiles/slide_07/1024_2048.png", "slide_07"),
        ("slide_07/x1024-y2048.png", "slide_07"),
        ("tiles/tile_007.png", "tile_007"),  # a number of the tile alone: no two are of one slide
        ("slide_07/tile_007.png", "slide_07"),
        ("TCGA-A1-A0SB/patch_10_20.png", "TCGA-A1-A0SB"),
        ("slide_07/S1_10_20.png", "S1"),
        ("tiles/liver.png", "liver"),
        ("007.png", "007"),
    ],
)
def test_a_slide_is_the_name_without_the_tiles_place(path, slide):
    assert SlideNames().slide_of(path) == slide


def test_a_pattern_finds_the_slide_in_the_whole_path():
    assert SlideNames(r"Case-\d+").slide_of("tiles/Case-12_P3_1.png") == "Case-12"
    assert SlideNames(r"([^/]+)/[^/]+$").slide_of("a/patient 3/1.png") == "patient 3"


@pytest.mark.parametrize(("pattern", "said"), [("(", "no regular expression"), (r"C-\d+", r"finds no slide in 'b/c")])
def test_a_pattern_that_cannot_be_used_is_one_line(pattern, said):
    with pytest.raises(UserError, match=f"^--slide '.+' [^\n]*{said}"):
        SlideNames(pattern).slide_of("b/c.png")
