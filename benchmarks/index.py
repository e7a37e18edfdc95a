"""How fast tars are indexed: ours beside `tar -tf` and Python's tarfile in one run, warm and cold; memory; labels.

    python benchmarks/index.py --work build/bench_index [--repeats 5]

Archives are made once (7 GB) and kept. Warm: each file is read whole, then the programs take turns. Cold: each file's
pages are dropped from memory before every turn, and rates are of the whole file, beside reading it front to back.
"""

import csv
import os
import statistics
import subprocess
import sys
import tarfile
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from measuring import forget, spread, taking_turns

from pathfm.data.tar.walk import TarWalk
from pathfm.errors import exit_status
from pathfm.files import written_aside
from pathfm.log import progress

BLOCK_BYTES = 1 << 20
MEASURED_INDEX = """
import sys, time
from pathfm.jobs.index import main
begin = time.perf_counter()
status = main(sys.argv[1:])
seconds = time.perf_counter() - begin
kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.endswith("kB\\n")}
print("measured", seconds, (kilobytes["VmHWM"] - kilobytes["RssFile"]) / 1024)
sys.exit(status)
"""


@dataclass(frozen=True)
class Archive:
    """A tar to measure, as `tar -cf` writes it."""

    path: Path
    num_members: int
    mean_bytes: int

    def make(self) -> None:
        noise = os.urandom(2 * self.mean_bytes)
        with written_aside(self.path) as aside, aside.open("wb", buffering=BLOCK_BYTES) as file:
            for number in progress(range(self.num_members), f"making {self.path.name}"):
                member = tarfile.TarInfo(f"tiles/slide_{number // 1000:05}/tile_{number:07}.jpg")
                member.size = self.mean_bytes * 9 // 10 + number * 37 % (self.mean_bytes // 5)
                member.mtime, member.uname, member.gname = 1_700_000_000, "user", "group"
                begin = number % self.mean_bytes // 2
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                file.write(noise[begin : begin + member.size])
                file.write(bytes(-member.size % 512))
            file.write(bytes(10_240))


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_index"), help="where the archives lie")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    small, many, tiles, big = (
        Archive(arguments.work / f"{name}.tar", num_members, mean_bytes)
        for name, num_members, mean_bytes in (
            ("small_1e5", 10**5, 1_000),
            ("small_1e6", 10**6, 1_000),
            ("tiles_1e5", 10**5, 20_000),
            ("big_1e4", 10**4, 200_000),
        )
    )
    for archive in (small, many, tiles, big):
        if not archive.path.is_file():
            archive.make()
    print_warm((small, many, tiles, big), arguments.repeats)
    print_cold((tiles, big), arguments.repeats)
    print_index(many)
    return 0


def print_warm(archives: Sequence[Archive], repeats: int) -> None:
    print("\n| warm | tar -tf, s | tarfile, s | ours, s | of tar -tf | times as fast as tarfile |")
    print("| --- | --- | --- | --- | --- | --- |")
    for archive in archives:
        read_through(archive)
        turns = timed(archive, (list_with_tar, walk), repeats)
        ((tarfile_seconds,),) = timed(archive, (iterate_tarfile,), 1)
        tar, ours = map(statistics.median, turns)
        listed, walked = (spread(seconds, ".3f") for seconds in turns)
        ratios = f"{ours / tar:.2f} | {tarfile_seconds / ours:.1f}"
        print(f"| {archive.path.stem} | {listed} | {tarfile_seconds:.2f} | {walked} | {ratios} |")


def print_cold(archives: Sequence[Archive], repeats: int) -> None:
    print("\n| cold | read through, MB/s | tar -tf, MB/s | ours, MB/s | ours of reading through |")
    print("| --- | --- | --- | --- | --- |")
    for archive in archives:
        megabytes = archive.path.stat().st_size / 1e6
        turns = timed(archive, (read_through, list_with_tar, walk), repeats, before=partial(forget, archive.path))
        rates = [[megabytes / seconds for seconds in turn] for turn in turns]
        of_reading = statistics.median(rates[2]) / statistics.median(rates[0])
        print(f"| {archive.path.stem} | {' | '.join(spread(rate, '.0f') for rate in rates)} | {of_reading:.2f} |")


def print_index(archive: Archive) -> None:
    """The whole command: names, offsets and files written; with labels too."""
    labels = archive.path.with_suffix(".csv")
    with labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "label", "class"])
        writer.writerows([f"tile_{n:07}.jpg", n % 9, f"class {n % 9}"] for n in range(archive.num_members))
    words = ["--tarball_path", str(archive.path), "--output_root", str(archive.path.parent / "index")]
    print(f"\n| pathfm index {archive.path.stem} | s | private memory at most, MB |\n| --- | --- | --- |")
    for what, more in (("all files", []), ("with labels of a CSV", ["--csv", str(labels)])):
        command = [sys.executable, "-c", MEASURED_INDEX, *words, *more]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        _, seconds, megabytes = printed.splitlines()[-1].split()
        print(f"| {what} | {float(seconds):.2f} | {float(megabytes):.0f} |")


def timed(
    archive: Archive,
    programs: Sequence[Callable[[Archive], None]],
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of every program, turn by turn; what would warm up is warm, or is not to be."""
    contestants = {program.__name__: partial(program, archive) for program in programs}
    return list(taking_turns(contestants, repeats, warm_up=False, before=before).values())


def walk(archive: Archive) -> None:
    num_members = sum(len(members.paths) for members in TarWalk(archive.path))
    assert num_members == archive.num_members


def list_with_tar(archive: Archive) -> None:
    subprocess.run(["tar", "-tf", archive.path], stdout=subprocess.DEVNULL, check=True)


def iterate_tarfile(archive: Archive) -> None:
    with tarfile.open(archive.path, "r:") as tar:
        assert sum(1 for _ in tar) == archive.num_members


def read_through(archive: Archive) -> None:
    block = bytearray(BLOCK_BYTES)
    with archive.path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
