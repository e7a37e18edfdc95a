from pathlib import Path

from pathfm.track.wandb_mirror.offline_files import rows_in
from tests.track.runs_to_show import RunToShow, offline_folders, show


def test_rows_are_read_over_many_blocks_up_to_where_the_file_is_torn(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 301)
    show(run)
    (folder,) = offline_folders(run.directory)
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    assert len(content) > 3 * 32_768
    assert rows_in(folder) == set(range(1, 301))
    file.write_bytes(content[: len(content) // 2])
    torn = rows_in(folder)
    assert torn == set(range(1, max(torn) + 1))
    assert 100 < max(torn) < 200
    file.write_bytes(content[:7])
    assert rows_in(folder) == set()


def test_of_another_format_nothing_is_said(tmp_path: Path):
    (tmp_path / "run-abc.wandb").write_bytes(b":W&B\xe1\xbe\x01 in another way")
    assert rows_in(tmp_path) is None
