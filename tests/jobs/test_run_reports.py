import json

from pathfm.batch import Skipped
from pathfm.jobs.run_reports import Quarantine, quarantine_table
from pathfm.lifecycle.run import Run


def test_every_undecodable_sample_is_written_once_also_files_of_one_name(tmp_path):
    first = Quarantine(Run(tmp_path), 0, first=True)
    first.add(3, Skipped(17, 5, "brca", "tile.png", "cut"))
    first.add(6, Skipped(40, 905, "luad", "tile.png", "empty"))
    first.add(9, Skipped(70, 5, "brca", "tile.png", "cut"))
    resumed = Quarantine(Run(tmp_path), 3, first=True)  # the line of step 6 is forgotten, as the steps come again
    for _ in range(2):
        resumed.add(6, Skipped(40, 905, "luad", "tile.png", "empty"))
        resumed.go_back(3)
    resumed.add(6, Skipped(40, 905, "luad", "tile.png", "empty"))
    Quarantine(Run(tmp_path), 0, first=False).add(6, Skipped(1, 1, "luad", "of another rank.png", "empty"))
    lines = [json.loads(line) for line in Run(tmp_path).quarantine.read_text().splitlines()]
    assert lines == [
        {"step": 3, "position": 17, "sample": 5, "cohort": "brca", "file": "tile.png", "reason": "cut"},
        {"step": 6, "position": 40, "sample": 905, "cohort": "luad", "file": "tile.png", "reason": "empty"},
    ]


def test_the_table_names_the_worst_cohort_first_with_its_first_files():
    lines = [{"cohort": "brca", "file": "a.png", "reason": "it is empty (0 bytes)"}]
    lines += [{"cohort": "luad", "file": f"{n}.png", "reason": "cut" if n else "no image"} for n in range(1204)]
    assert quarantine_table(lines) == (
        "  cohort  undecodable  most often because     files\n"
        "  luad          1,204  cut                    0.png, 1.png, 2.png and 1,201 more\n"
        "  brca              1  it is empty (0 bytes)  a.png"
    )
