import json

from pathfm.batch import Skipped
from pathfm.jobs.run_reports import quarantine_of, quarantine_table
from pathfm.lifecycle.run import Run


def test_every_undecodable_sample_is_written_once_also_files_of_one_name(tmp_path):
    first = quarantine_of(Run(tmp_path), 0)
    first(3, Skipped(17, 5, "brca", "tile.png", "cut"))
    first(6, Skipped(40, 905, "luad", "tile.png", "empty"))
    first(9, Skipped(70, 5, "brca", "tile.png", "cut"))
    resumed = quarantine_of(Run(tmp_path), 3)  # the line of step 6 is forgotten, as the steps since 3 come again
    resumed(6, Skipped(40, 905, "luad", "tile.png", "empty"))
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
