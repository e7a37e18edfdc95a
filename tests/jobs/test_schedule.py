from pathlib import Path

from PIL import Image

from pathfm.jobs.schedule import main


def test_the_table_and_the_picture_cover_the_whole_run(tmp_path: Path, capsys):
    picture = tmp_path / "vitl14.png"
    assert main(["vitl14", "--gpus", "32", "--samples", "50000000", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "1,220,700 steps, 12,207 an epoch, global batch 4,096" in printed
    assert "peak lr 0.004" in printed  # 2e-3 x sqrt(4096 / 1024)
    first, last = printed.splitlines()[2], printed.splitlines()[-2]
    assert first.split() == ["0", "0.00", "0.000e+00", "0.000e+00", "0.0400", "0.99400", "0.0400"]
    assert last.split()[:3] == ["1,220,699", "100.00", "1.000e-06"]
    assert Image.open(picture).size[0] > 800


def test_an_unknown_epoch_length_is_said(tmp_path: Path, capsys):
    main(["vits14", "--output", str(tmp_path / "a.png")])
    assert "drawn for 1,250 steps an epoch" in capsys.readouterr().err
