import pytest

from pathfm.data.datasets import open_dataset
from pathfm.jobs.pack import main


@pytest.fixture
def tiles(shared_data):
    return shared_data / "cmu1" / "images"


def test_real_tiles_are_packed_and_indexed_in_one_command(tiles, tmp_path, capsys):
    arguments = [str(tiles), "--name", "pretrain", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "173 files packed" in said
    assert "pretrain_dataset.tar" in said
    dataset = open_dataset(f"Pathology:root={tmp_path / 'out'}")
    assert dataset.read_bytes(5) == (tiles / dataset.name_of(5)).read_bytes()
    assert main(arguments) == 0
    assert "is there" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_one_line_and_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--name", "pretrain"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no folder")
