import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pathfm.jobs.index import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "infer_entries.py"


@pytest.fixture
def golden(golden_dir, tmp_path):
    source = golden_dir / "tar_npy"
    shutil.copyfile(source / "pretrain_dataset.tar", tmp_path / "downstream_dataset.tar")
    return source, tmp_path


def words(here, *more):
    tar, out = str(here / "downstream_dataset.tar"), str(here / "out")
    return ["--tarball_path", tar, "--output_root", out, *map(str, more)]


def test_the_ancestors_script_works_from_any_folder(golden):
    source, here = golden
    more = ["--csv", source / "labels.csv", "--keep", source / "query.txt", "--prefix", "query"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words(here, *more)], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recorded = np.load(source / "query_entries.npy")
    np.testing.assert_array_equal(np.load(here / "out" / "query_entries.npy"), recorded)
    assert "70 files, 35 of them indexed" in done.stdout
    assert "class-ids.npy" in done.stdout


def test_a_python_without_the_environment_is_told_how_to_get_it(tmp_path):
    bare = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "make env" in done.stderr


@pytest.mark.parametrize("flag", ["--keep", "--restrict"])
def test_names_that_are_missing_are_status_1_unless_allowed(golden, capsys, flag):
    _, here = golden
    names = [f"lost_{n}.jpg" for n in range(12)]
    (here / "keep.txt").write_text("crcval7k_ADI-TCGA-ALPPQLSF.jpg\n" + "\n".join(names))
    arguments = words(here, "--name", "pretrain", flag, here / "keep.txt")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "12 listed names are not in the tar: lost_0.jpg" in error
    assert "lost_9.jpg and 2 more" in error
    assert main([*arguments, "--allow-missing"]) == 0
    assert np.load(here / "out" / "pretrain_entries.npy").shape == (1, 4)


def test_remove_leaves_the_rest(golden):
    source, here = golden
    assert main(words(here, "--remove", source / "query.txt", "--suffix", "rest")) == 0
    assert len(np.load(here / "out" / "entries_rest.npy")) == 35


def test_mistakes_are_one_line_and_status_2(golden, capsys):
    _, here = golden
    (here / "downstream_dataset.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    assert main(words(here)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "gzip-compressed" in error


def test_indexing_and_packing_never_import_torch():
    code = "import pathfm.jobs.index, pathfm.jobs.pack, pathfm.data.datasets, pathfm.data.order, pathfm.data.decode"
    check = f"import sys; {code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
