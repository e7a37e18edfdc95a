from pathlib import Path

from PIL import Image

from pathfm.__main__ import main
from pathfm.data.summary import CohortSummary, Summary
from pathfm.jobs.data import summary_text
from tests.jobs.journeys import make_tiles


def test_a_data_set_is_shown_as_tables_and_as_a_picture(tmp_path, monkeypatch, capsys):
    data = make_tiles(tmp_path, 12)
    monkeypatch.chdir(tmp_path)
    assert main(["data", f"Pathology:root={data}"]) == 0
    said = capsys.readouterr().out
    assert "samples  12" in said
    assert "PNG RGB 64 x 64 (12 looked at)" in said
    assert "drawn: Pathology_sheet.png" in said
    assert Image.open("Pathology_sheet.png").width > 8 * 112
    assert main(["data", f"Pathology:root={data}", "--sheet", str(tmp_path / "new" / "sheet.png")]) == 0
    assert (tmp_path / "new" / "sheet.png").is_file()


def test_regions_are_counted_and_not_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "region.pt").write_bytes(b"features")
    monkeypatch.chdir(tmp_path)
    assert main(["data", f"Regions:root={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "no readable image (1 looked at)" in said
    assert "drawn" not in said
    assert list(tmp_path.glob("*.png")) == []


def test_a_data_set_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["data", f"Pathology:root={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: there is no tar {tmp_path}")
    assert main(["data", "Pathology:root=~nobody.of.this.name/data"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no tar ~nobody.of.this.name/data/pretrain_dataset.tar")


def test_the_tables_are_readable():
    summary = Summary(
        num_samples=12_345_678,
        cohorts={
            "brca": CohortSummary(Path("/data/brca.tar"), 12_000_000, 24_100),
            "tcga_luad": CohortSummary(Path("/data/tcga_luad.tar"), 345_678, 9_949),
        },
        classes={"stroma": 12_345_670, "tumour": 8},
        sample_bytes=(512, 24_000, 1_234_567),
        total_bytes=296_296_272_000,
        num_weighed=1_000_000,
        images={"JPEG RGB 256 x 256": 250, "PNG RGBA 224 x 224": 6},
        index_command="pathfm concat --root /data --output_root /data",
    )
    assert summary_text(summary) == (
        "  samples  12,345,678\n"
        "  encoded  about 296 GB: from 512 bytes to 1.2 MB a sample, median 24.0 kB\n"
        "  images   JPEG RGB 256 x 256: 250; PNG RGBA 224 x 224: 6 (of 256 looked at)\n"
        "  index    pathfm concat --root /data --output_root /data\n"
        "\n"
        "  cohort        samples  share   median   tar\n"
        "  brca       12,000,000   97.2%  24.1 kB  /data/brca.tar\n"
        "  tcga_luad     345,678    2.8%  9.9 kB   /data/tcga_luad.tar\n"
        "\n"
        "  class      samples  share\n"
        "  stroma  12,345,670  100.0%\n"
        "  tumour           8    0.0%"
    )
