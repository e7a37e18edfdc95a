"""Why the ranks of an attempt failed, found in their logs: the first traceback of the first rank that had one."""

from collections.abc import Sequence
from pathlib import Path

_TRACEBACK = "Traceback (most recent call last):"
_LINES = 60


def first_failure(logs: Sequence[Path], folder: Path) -> str:
    """A few lines for people. Ranks end in the order in which they failed, so the log that was closed first counts."""
    told = {log: log.read_text(encoding="utf-8", errors="replace").splitlines() for log in logs if log.exists()}
    for log in sorted(told, key=lambda log: log.stat().st_mtime_ns):
        if found := _traceback(told[log]):
            return "\n".join([f"{log.stem.replace('_', ' ')} failed first ({log}):", *found])
    for log, lines in told.items():
        if errors := [line for line in lines if line.startswith(("error: ", "lost: "))]:
            return f"{errors[-1]} ({log})"
    return f"no rank left a traceback; it was killed, or never began; what was logged is in {folder}"


def _traceback(lines: Sequence[str]) -> list[str]:
    """The first one, from its head to the line that names the error."""
    starts = [number for number, line in enumerate(lines) if _TRACEBACK in line]
    if not starts:
        return []
    block = [lines[starts[0]]]
    for line in lines[starts[0] + 1 :]:
        block.append(line)
        if line and not line.startswith((" ", "\t")):
            break
    return [block[0], "  ...", *block[-_LINES:]] if len(block) > _LINES + 1 else block
