"""Tests of this folder need the programs of Slurm; CI installs them, and there nothing may be skipped."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.journeys import make_tiles
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.trial import undisturbed


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    if missing := missing_programs():
        reason = f"no {', '.join(missing)} here; Debian has them as slurmctld, slurmd, slurm-client, munge"
        if os.environ.get("PATHFM_DEMAND_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def place(slurm_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set in `data`."""
    folder = tmp_path_factory.mktemp("slurm")
    make_tiles(folder)
    return folder


@pytest.fixture(scope="session")
def reference(place: Path) -> list[dict[str, Any]]:
    """What the run logs that nothing happens to."""
    return undisturbed(place / "reference", place / "data")


@pytest.fixture(scope="session")
def cluster(slurm_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Preemption requeues after ten seconds of grace."""
    with Cluster(tmp_path_factory.mktemp("cluster"), grace_s=10) as running:
        yield running
