import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pathfm.__main__ import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "concat_entries.py"


@pytest.mark.parametrize("flags", [("--root", "--output_root"), ("-r", "-o")])
def test_the_ancestors_script_works_from_any_folder(golden_dir, tmp_path, flags):
    root, output = flags
    words = [root, str(golden_dir / "tar_npy" / "cohorts"), output, str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recorded = np.load(golden_dir / "tar_npy" / "concatenated" / "pretrain_entries.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "pretrain_entries.npy"), recorded)


def test_the_verb_says_what_was_taken_passed_over_and_written(golden_dir, tmp_path, capsys):
    cohorts = golden_dir / "tar_npy" / "cohorts"
    for path in cohorts.iterdir():
        (tmp_path / path.name).symlink_to(path)
    np.save(tmp_path / "old_entries.npy", np.zeros((1, 4), np.uint64))
    assert main(["concat", "-r", str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 cohorts, 70 samples" in said
    assert "cohort_a  " in said
    assert "passed over old_entries.npy: there is no old.tar" in said
    assert f"wrote {tmp_path}/out/cohort_indices.npy" in said


def test_a_failure_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["concat", "--root", str(tmp_path), "--output_root", str(tmp_path), "--suffix", "train"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
