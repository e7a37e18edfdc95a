"""What `scontrol -o show job` really said, by the name of what it shows."""

from pathlib import Path

from pathfm.launch.scontrol import JobRecord, parse_job

_RECORDED = Path(__file__).parent / "recorded" / "scontrol.txt"


def lines(name: str) -> list[str]:
    blocks = dict(block.split("\n", 1) for block in _RECORDED.read_text(encoding="utf-8").split("\n# ")[1:])
    return [line for line in blocks[name].splitlines() if line]


def record(name: str) -> JobRecord:
    (line,) = lines(name)
    return parse_job(line)
