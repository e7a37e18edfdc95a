"""The folders of a run: which file systems they lie on, how much room there is, how fast and how true to time."""

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pathfm.files import aside_of
from pathfm.jobs.examination.finding import Finding
from pathfm.tables import amount

_PROBE_BYTES, _BLOCK_BYTES = 64 * 10**6, 10**6
_OF_ONE_NODE = ("/tmp", "/var/tmp", "/dev/shm")
_OF_ONE_NODE_KINDS = ("tmpfs", "ramfs", "overlay")
_SKEW_WARN_S, _SKEW_FAIL_S = 1.0, 5.0
_FEW_INODES, _NO_INODES = 10_000, 100
SILENT_MOUNT = "a mount that hangs? try ls on it; a stale one needs the administrator"


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted, its type, and what it comes from."""

    point: Path
    kind: str
    source: str


def mount_of(path: Path, mountinfo: str | None = None) -> Mount:
    """The mount that an absolute path lies on. `mountinfo`: the text of /proc/self/mountinfo."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8") if mountinfo is None else mountinfo
    around = [mount for mount in map(_mount, text.splitlines()) if path.is_relative_to(mount.point)]
    return max(reversed(around), key=lambda mount: len(mount.point.parts))  # of equal ones the last is on top


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    kind, source = after.split(" ")[:2]
    return Mount(Path(_unescaped(before.split(" ")[4])), kind, _unescaped(source))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def mounts(folders: Mapping[str, Path], run_dir: Path | None, *, several_nodes: bool) -> Finding:
    """The file systems of named folders and of the run."""
    places = {**folders, **({"run": run_dir} if run_dir else {})}
    found = "; ".join(f"{name} on {_named(mount_of(existing_part(path).resolve()))}" for name, path in places.items())
    if run_dir and several_nodes and (why := _is_of_one_node(run_dir)):
        return Finding("mounts", "warn", f"{found}; {why}", "put runs on a file system that all nodes share")
    return Finding("mounts", "ok", found)


def _named(mount: Mount) -> str:
    return f"{mount.kind} {mount.point}" + (f" from {mount.source}" if ":" in mount.source else "")


def _is_of_one_node(run_dir: Path) -> str:
    """Why the other nodes will not see the run's directory, or nothing."""
    place = existing_part(run_dir).resolve()
    for folder in (*_OF_ONE_NODE, os.environ.get("TMPDIR", "")):
        if folder and place.is_relative_to(folder):
            return f"every node has its own {folder}"
    kind = mount_of(place).kind
    return f"every node has its own {kind}" if kind in _OF_ONE_NODE_KINDS else ""


def room(
    run_dir: Path,
    checkpoint_bytes: int | None,
    checkpoints_to_come: int,
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs,
) -> Finding:
    """Free bytes and inodes against the checkpoints that a run is going to keep at once."""
    status = statvfs(existing_part(run_dir))
    free = status.f_bavail * status.f_frsize
    found = f"{amount(free)}" + (f" and {amount_of_files(status.f_favail)}" if status.f_files else "") + " free"
    if checkpoint_bytes:
        to_come = "one more checkpoint" if checkpoints_to_come == 1 else f"{checkpoints_to_come} more checkpoints"
        found += f", for {to_come} of {amount(checkpoint_bytes)}"
    if free < (checkpoint_bytes or 0) or (status.f_files and status.f_favail < _NO_INODES):
        return Finding("room", "fail", found, "make room, or choose another place for runs")
    if free < (checkpoint_bytes or 0) * checkpoints_to_come:
        return Finding("room", "warn", found, "make room, or lower checkpoint.keep_last")
    if status.f_files and status.f_favail < _FEW_INODES:
        return Finding("room", "warn", found, "remove files, or ask for more inodes")
    return Finding("room", "ok", found)


def amount_of_files(number: int) -> str:
    """A rounded number of files, for people."""
    return f"{number / 1e6:,.0f} million inodes" if number >= 10**6 else f"{number:,} inodes"


def write_speed(
    run_dir: Path, checkpoint_bytes: int | None, save_within_s: float, probe_bytes: int = _PROBE_BYTES
) -> Finding:
    """Write a file, flush it to the disk and remove it. `save_within_s`: the time that an interrupted run has."""
    place = existing_part(run_dir)
    try:
        seconds = _seconds_to_write(aside_of(place / "doctor"), probe_bytes)
    except OSError as error:
        return _not_written(place, error)
    speed = probe_bytes / seconds
    found = f"{amount(probe_bytes)} on the disk in {seconds:.2f} s, {amount(round(speed))}/s"
    if not checkpoint_bytes:
        return Finding("write speed", "ok", found)
    needed_s = checkpoint_bytes / speed
    found += f"; a checkpoint takes {max(needed_s, 0.1):,.1f} s"
    if needed_s > save_within_s:
        advice = (
            f"a run that is told to leave has {save_within_s:g} s: raise checkpoint.leave_within_s and signal_lead_s"
        )
        return Finding("write speed", "warn", found, advice)
    return Finding("write speed", "ok", found)


def _not_written(place: Path, error: OSError) -> Finding:
    advice = "make it writable, or choose another place for runs"
    return Finding("write speed", "fail", f"{place} cannot be written: {error.strerror}", advice)


def _seconds_to_write(path: Path, size: int) -> float:
    block = os.urandom(_BLOCK_BYTES)
    try:
        begun = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(max(1, size // _BLOCK_BYTES)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - begun
    finally:
        path.unlink(missing_ok=True)


def run_directory(directory: Path, mark: Path | None) -> Finding:
    """The run's directory is there, can be written, and is the one in which rank 0 made `mark`."""
    if not directory.is_dir():
        return Finding("run directory", "fail", f"there is no {directory} here", "mount it on this node")
    if mark is not None and not mark.exists():
        advice = "put runs on a file system that all nodes share"
        return Finding("run directory", "fail", f"{directory} is another one than rank 0's", advice)
    try:
        _seconds_to_write(aside_of(directory / "doctor"), _BLOCK_BYTES)
    except OSError as error:
        advice = "make it writable, or choose another place for runs"
        return Finding("run directory", "fail", f"{directory} cannot be written: {error.strerror}", advice)
    return Finding("run directory", "ok", f"{directory} can be written")


def clock_of_files(run_dir: Path, clock: Callable[[], float] = time.time) -> Finding:
    """This machine's clock against that of the file system: whoever serves the files has its own."""
    place = existing_part(run_dir)
    probe = aside_of(place / "doctor-clock")
    try:
        probe.write_bytes(b"?")
        skew_s = clock() - probe.stat().st_mtime
    except OSError as error:
        return Finding("clock", "ok", f"not compared, because {place} cannot be written: {error.strerror}")
    finally:
        probe.unlink(missing_ok=True)
    return judged_skew(skew_s, "the file system's")


def judged_skew(skew_s: float, other: str) -> Finding:
    """The finding for a clock that differs from `other` by so much."""
    if abs(skew_s) <= _SKEW_WARN_S:
        return Finding("clock", "ok", f"within {_SKEW_WARN_S:g} s of {other}")
    found = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} {other}"
    return Finding(
        "clock", "fail" if abs(skew_s) > _SKEW_FAIL_S else "warn", found, "set the clock (chronyc, timedatectl)"
    )
