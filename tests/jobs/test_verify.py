import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.__main__ import main
from pathfm.data.verification.findings import Check
from pathfm.data.verification.verify import Verification
from pathfm.jobs.verify import report_text
from tests.jobs.journeys import make_tiles


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_tiles(tmp_path_factory.mktemp("verify"), 12)


def test_a_whole_data_set_ends_with_status_0_and_a_report_in_json(data, tmp_path, capsys):
    assert main(["verify", f"Pathology:root={data}", "--output", str(tmp_path / "found.json")]) == 0
    assert "all is well" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["verdict"] == "ok"


def test_damage_ends_with_status_1_and_its_cases_in_json(data, tmp_path, monkeypatch, capsys):
    entries = np.load(data / "pretrain_entries.npy")
    (tmp_path / "pretrain_dataset.tar").symlink_to(data / "pretrain_dataset.tar")
    np.save(tmp_path / "pretrain_entries.npy", entries + np.array([0, 0, 8, 8], np.uint64))
    monkeypatch.chdir(tmp_path)
    text = f"Pathology:root={tmp_path}"
    assert main(["verify", text, "--decode", "none"]) == 1
    said = capsys.readouterr().out
    assert "DAMAGE" in said
    assert "no file of" in said
    found = json.loads(Path("verify.json").read_text())
    assert found["verdict"] == "damage"
    assert [check["name"] for check in found["checks"][text]] == ["index"]


def test_names_that_are_no_utf_8_are_printed_as_escapes(tmp_path, capsys):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "d\udce9j\udce0.png").write_bytes(b"no image")
    assert main(["pack", str(folder), "--name", "pretrain", "--output", str(folder)]) == 0
    assert main(["verify", f"Pathology:root={folder}", "--output", str(folder / "found.json")]) == 1
    said = capsys.readouterr().out
    assert r"d\udce9j\udce0.png (row 0): it is not an image" in said
    assert r"caf\udce9/found.json" in said


def test_findings_that_have_no_place_are_one_line(data, tmp_path, capsys):
    assert main(["verify", f"Pathology:root={data}", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: Is a directory: {tmp_path}; make room or choose another place"


def test_two_data_sets_that_are_one_are_leakage(data, tmp_path, capsys):
    again = f"Pathology:root={data}:extra={data}"
    assert main(["verify", f"Pathology:root={data}", again, "--output", str(tmp_path / "found.json")]) == 1
    assert "12 of the 12 and 12 samples read are in both" in capsys.readouterr().out


def test_region_features_are_decoded_as_such(tmp_path, capsys):
    for number in range(3):
        torch.save(torch.full((4, 8), float(number)), tmp_path / f"region_{number}.pt")
    words = ["verify", f"Regions:root={tmp_path}", "--output", str(tmp_path / "found.json")]
    assert main(words) == 0
    assert "3 files of the folder" in capsys.readouterr().out
    (tmp_path / "region_1.pt").write_bytes(b"damaged")
    assert main(words) == 1
    assert "region_1.pt (row 1): it is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Patology:root=/data"], "no data set is called 'Patology' (did you mean 'Pathology'?)"),
        (["Pathology:root=/data", "--decode", "some"], "--decode takes a number of samples, all or none, not 'some'"),
        (["Pathology:root=/data", "--decode", "²"], "--decode takes a number of samples, all or none, not '²'"),
        (["Pathology:root=/data", "--slide", "("], "--slide '(' is no regular expression"),
    ],
)
def test_a_mistyped_command_is_one_line_and_status_2(words, said, capsys):
    assert main(["verify", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_what_is_not_well_stands_out_with_its_first_cases():
    cases = tuple(f"{letter}.png (row {row}): it is empty" for row, letter in enumerate("abcd"))
    verification = Verification(
        {
            "KNN:root=/data:split=query": [
                Check("offsets", "ok", "1,204 rows in 1 tar, each the bytes of a file"),
                Check("decoding", "damage", "cohort downstream: 4 samples cannot be decoded", cases),
            ]
        }
    )
    assert report_text(verification) == (
        "KNN:root=/data:split=query\n"
        "  check     verdict  what was found\n"
        "  offsets   ok       1,204 rows in 1 tar, each the bytes of a file\n"
        "  decoding  DAMAGE   cohort downstream: 4 samples cannot be decoded\n"
        "                       a.png (row 0): it is empty\n"
        "                       b.png (row 1): it is empty\n"
        "                       c.png (row 2): it is empty\n"
        "\n"
        "DAMAGED"
    )


def test_data_are_verified_without_torch(data, tmp_path):
    code = (
        "import sys; from pathfm.__main__ import main; "
        f"main(['verify', 'Pathology:root={data}', '--output', '{tmp_path / 'found.json'}']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_split_of_knn_is_compared_with_the_other_one(golden_dir, tmp_path, capsys):
    for file in (golden_dir / "tar_npy").glob("*.npy"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "downstream_dataset.tar").symlink_to(golden_dir / "tar_npy" / "pretrain_dataset.tar")
    query, test = (f"KNN:root={tmp_path}:split={split}" for split in ("query", "test"))
    main(["verify", test, "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["checks"]) == [test, query, f"{test} and {query}"]
    assert f"{test} and {query}" in capsys.readouterr().out
