"""The first act of every job: each rank examines its node, and all leave together when one is unfit."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from pathfm.dist.collect import gather_lists
from pathfm.dist.groups import Team
from pathfm.errors import listed
from pathfm.files import aside_of, write_json
from pathfm.jobs.examination import devices, machine, places
from pathfm.jobs.examination.devices import SILENT_GPU, SILENT_NETWORK
from pathfm.jobs.examination.finding import Finding, Verdict, examined, findings_table
from pathfm.jobs.examination.places import SILENT_MOUNT
from pathfm.launch.attempts import attempt_of
from pathfm.lifecycle.run import Run
from pathfm.log import get_logger
from pathfm.recipe import Recipe
from pathfm.training.step import compute_dtype

_log = get_logger(__name__)
_SECONDS_FOR_A_GPU = 120
_SECONDS_FOR_A_MOUNT = 60
_SECONDS_FOR_THE_NETWORK = 120
_LOOKS_AT_THE_CLOCK = 3
Clock = Callable[[], float]


class Unfit(Exception):
    """A node failed. No `UserError`: there is nothing to mend in the run, which may start again on other nodes."""


@dataclass(frozen=True)
class Presence:
    """A rank says where it is."""

    rank: int
    node: str
    device: str  # cpu or cuda


@dataclass(frozen=True)
class Report:
    """What a rank found."""

    rank: int
    node: str
    finding: Finding


def examine(recipe: Recipe, run: Run, team: Team, clock: Clock = time.time) -> None:
    """Look at every rank's node, and warn of what is not well. All ranks call this together.

    Raises `Unfit` on all of them when one fails. In a Slurm job the attempt's `doctor.json` then names the nodes for
    the supervisor, which starts the job again without them.
    """
    if not recipe.train.examine or (team.ranks.world_size == 1 and not _is_slurm_step()):
        return
    begun = time.monotonic()
    team.watch.at(0, "examining its node")
    reports = _reports(recipe, run, team, clock)
    team.watch.at(0, "starting")
    if team.ranks.is_first:
        _say(reports, time.monotonic() - begun)
    if _of(reports, "fail"):
        if team.ranks.is_first and _is_slurm_step():
            _write(reports, attempt_of(run.directory).folder / "doctor.json")
        gather_lists([0], team.agreement_group)  # it is written now; the first rank that leaves ends all the others
        raise Unfit(_sentence(reports))


def failed_nodes(reports: Sequence[Report]) -> list[str]:
    """The nodes to do without: those that failed a check which at least half of all nodes passed.

    What most nodes fail is no fault of theirs, and others would fail it too. A node that is alone is always named.
    """
    nodes = {report.node for report in reports}
    by_check: dict[str, set[str]] = {}
    for report in _of(reports, "fail"):
        by_check.setdefault(report.finding.check, set()).add(report.node)
    named = [failed for failed in by_check.values() if len(nodes) == 1 or 2 * len(failed) <= len(nodes)]
    return sorted(set().union(*named))


def skews_s(clocks: Sequence[float]) -> list[float]:
    """How far each clock is from those that agree: 0 for these. Of two that differ nobody knows which one is wrong."""
    apart_s, middle = max(clocks) - min(clocks), median(clocks)
    is_off = [abs(clock - middle) > 0.45 * apart_s for clock in clocks]
    return [(apart_s if clock > middle else -apart_s) * off for clock, off in zip(clocks, is_off, strict=True)]


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """As Slurm calls it, where Slurm says so: its names need not be those of hosts."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def _is_slurm_step(environment: Mapping[str, str] = os.environ) -> bool:
    return "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" in environment


def _of(reports: Sequence[Report], verdict: Verdict) -> list[Report]:
    return [report for report in reports if report.finding.verdict == verdict]


def _reports(recipe: Recipe, run: Run, team: Team, clock: Clock) -> list[Report]:
    """Of all ranks, on every rank. The network is tried only when all else is well: a broken GPU would hang it."""
    me = Presence(team.ranks.rank, node_name(), team.device.type)
    mark = _marked(run) if team.ranks.is_first else None
    try:
        everyone = gather_lists([me], team.agreement_group)
        marks = gather_lists([mark] if mark else [], team.agreement_group)
        skew = skews_s(_clocks(team, clock))[me.rank]
        own = [*_of_node(recipe, run, team, everyone, marks), places.judged_skew(skew, "other ranks")]
        reports = gather_lists([Report(me.rank, me.node, finding) for finding in own], team.agreement_group)
    finally:
        if mark:
            mark.unlink(missing_ok=True)
    if team.ranks.world_size == 1 or _of(reports, "fail"):
        return reports
    network = examined("all-reduce", lambda: devices.all_reduce(team.device), _SECONDS_FOR_THE_NETWORK, SILENT_NETWORK)
    return reports + gather_lists([Report(me.rank, me.node, network)], team.agreement_group)


def _marked(run: Run) -> Path | None:
    """A file by which the other ranks know the run's directory; None where it cannot be made."""
    mark = aside_of(run.directory / "examined")

    def make() -> Finding:
        mark.touch()
        return Finding("mark", "ok", "made")

    return mark if examined("mark", make, _SECONDS_FOR_A_MOUNT).verdict == "ok" else None


def _clocks(team: Team, clock: Clock) -> list[float]:
    """Of all ranks at one moment: the best of some tries, since a rank may be held up in between."""
    tries = []
    for _ in range(_LOOKS_AT_THE_CLOCK):
        gather_lists([0], team.agreement_group)  # all leave this at about the same time
        tries.append(gather_lists([clock()], team.agreement_group))
    return min(tries, key=lambda clocks: max(clocks) - min(clocks))


def _of_node(
    recipe: Recipe, run: Run, team: Team, everyone: Sequence[Presence], marks: Sequence[Path]
) -> Iterator[Finding]:
    """What this rank looks at by itself; the first rank of a node also looks at what they share."""
    device, dtype = team.device, compute_dtype(recipe.train)
    if device.type == "cuda":
        yield examined("GPU", lambda: devices.gpu(device), _SECONDS_FOR_A_GPU, SILENT_GPU)
    elif recipe.train.device != "cpu" and (why := _why_gpu_is_due(everyone)):
        yield Finding("GPU", "fail", f"torch sees no GPU here, but {why}", "look at the driver of this node")
    yield examined(
        "attention",
        lambda: devices.attention(recipe.student.attention, device, dtype),
        _SECONDS_FOR_A_GPU,
        SILENT_GPU,
    )
    if team.ranks.local_rank == 0:
        batch_each = machine.loader_bytes(recipe, _ranks_here(everyone, team.ranks.rank))
        prefetched, mark = recipe.data.prefetch_batches, marks[0] if marks else None
        yield examined("shared memory", lambda: machine.shared_memory(batch_each, prefetched))
        yield examined(
            "run directory", lambda: places.run_directory(run.directory, mark), _SECONDS_FOR_A_MOUNT, SILENT_MOUNT
        )


def _why_gpu_is_due(everyone: Sequence[Presence]) -> str:
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES", "").strip():
        return f"CUDA_VISIBLE_DEVICES={visible}" if visible[0].isdigit() or visible.startswith("GPU") else ""
    return "other ranks train on theirs" if any(other.device == "cuda" for other in everyone) else ""


def _ranks_here(everyone: Sequence[Presence], rank: int) -> int:
    node = next(presence.node for presence in everyone if presence.rank == rank)
    return sum(presence.node == node for presence in everyone)


def _say(reports: Sequence[Report], seconds: float) -> None:
    ranks, nodes = len({report.rank for report in reports}), len({report.node for report in reports})
    heading = f"examined {_number(ranks, 'rank')} on {_number(nodes, 'node')} in {seconds:.1f} s"
    if not_well := [report for report in reports if report.finding.verdict != "ok"]:
        _log.warning("%s; not well:\n%s", heading, findings_table(_with_nodes(not_well)))
        return
    speeds = [report.finding.found for report in reports if report.finding.check == "all-reduce"]
    _log.info("%s: all well%s", heading, f", all-reduce {speeds[0]}" if speeds else "")


def _number(number: int, of: str) -> str:
    return f"{number} {of}" + ("s" if number != 1 else "")


def _with_nodes(reports: Sequence[Report]) -> list[Finding]:
    """Equal findings of several nodes as one, which says where."""
    nodes: dict[Finding, dict[str, None]] = {}
    for report in reports:
        nodes.setdefault(report.finding, {})[report.node] = None
    return [
        Finding(finding.check, finding.verdict, f"{listed(where)}: {finding.found}", finding.advice)
        for finding, where in nodes.items()
    ]


def _sentence(reports: Sequence[Report]) -> str:
    failures = [f"{finding.check} of {finding.found}" for finding in _with_nodes(_of(reports, "fail"))]
    return f"the examination before training failed: {listed(failures, at_most=3)}"


def _write(reports: Sequence[Report], path: Path) -> None:
    not_well = [report for report in reports if report.finding.verdict != "ok"]
    findings = [{"node": report.node, "rank": report.rank, **asdict(report.finding)} for report in not_well]
    try:
        write_json(path, {"failed_nodes": failed_nodes(reports), "findings": findings})
    except OSError as error:
        _log.warning("%s could not be written (%s)", path, error)
