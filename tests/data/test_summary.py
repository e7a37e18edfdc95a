import io

import numpy as np
import pytest
from PIL import Image

from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import KNN, PathologyFoundation, open_dataset
from pathfm.data.entries import write_class_ids
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.summary import summarise


def test_what_is_in_a_data_set_is_counted_and_weighed(tmp_path, write_tar, tile):
    contents = {f"{n}.png": tile(n) for n in range(9)} | {"cut.png": b"no image"}
    write_tar(tmp_path / "pretrain_dataset.tar", contents)
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain", command="pathfm index as typed"))
    summary = summarise(open_dataset(f"Pathology:root={tmp_path}"))
    lengths = sorted(map(len, contents.values()))
    assert summary.num_samples == summary.num_weighed == 10
    assert summary.sample_bytes == (lengths[0], int(np.median(lengths)), lengths[-1])
    assert summary.total_bytes == sum(lengths)
    assert summary.images == {"PNG RGB 8 x 8": 9, "no readable image": 1}
    assert summary.classes == {"class_0": 10}
    assert summary.index_command == "pathfm index as typed"


def test_cohorts_and_classes_are_counted_by_name(tmp_path, write_tar, tile):
    for cohort, number in (("brca", 3), ("luad", 5)):
        write_tar(tmp_path / f"{cohort}.tar", {f"{n}.png": tile(n) for n in range(number)})
        build_index(IndexRequest(tmp_path / f"{cohort}.tar", tmp_path, cohort))
    concat(ConcatRequest(tmp_path, tmp_path))
    cohorts = summarise(PathologyFoundation(tmp_path)).cohorts
    assert {name: (cohort.tar.name, cohort.num_samples) for name, cohort in cohorts.items()} == {
        "brca": ("brca.tar", 3),
        "luad": ("luad.tar", 5),
    }

    tar = write_tar(tmp_path / "downstream_dataset.tar", {f"{n}.png": tile(n) for n in range(6)})
    rows = "\n".join(f"{n}.png,{7 - 2 * (n % 3)},kind {n % 3}" for n in range(6))
    (tmp_path / "labels.csv").write_text(f"filename,label,class\n{rows}\n")
    build_index(IndexRequest(tar, tmp_path, "query", csv=tmp_path / "labels.csv"))
    assert summarise(KNN(tmp_path, "query")).classes == {"kind 2": 2, "kind 1": 2, "kind 0": 2}
    write_class_ids(tmp_path / "class-ids.npy", {3: "kind", 5: "kind", 7: "other"})
    assert list(summarise(KNN(tmp_path, "query")).classes) == ["kind (label 3)", "kind (label 5)", "other"]


def test_of_many_samples_some_are_weighed_and_the_rest_reckoned(tiles_root, monkeypatch):
    monkeypatch.setattr("pathfm.data.summary._NUM_WEIGHED", 10)
    dataset = open_dataset(f"Pathology:root={tiles_root}")
    lengths = [len(dataset.read_bytes(row)) for row in range(23)]
    summary = summarise(dataset)
    assert summary.num_weighed == 10
    assert summary.total_bytes == pytest.approx(sum(lengths), rel=0.05)


def test_what_no_run_would_decode_counts_as_no_image(tmp_path, write_tar, tile):
    program = io.BytesIO()
    Image.new("RGB", (8, 8)).save(program, "EPS")
    write_tar(tmp_path / "pretrain_dataset.tar", {"0.png": tile(0), "program.jpg": program.getvalue()})
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    assert summarise(open_dataset(f"Pathology:root={tmp_path}")).images == {"PNG RGB 8 x 8": 1, "no readable image": 1}
