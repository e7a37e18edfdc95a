"""What an examination says: a finding for each check, given within a deadline, and the table that a person reads."""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import Literal

from pathfm.tables import text_table

Verdict = Literal["ok", "warn", "fail"]
_SEVERITY: tuple[Verdict, ...] = ("ok", "warn", "fail")
_COLUMNS = 100
_HEADER = ("check", "verdict", "what was found  -> what to do")


@dataclass(frozen=True)
class Finding:
    """What one check found. `advice`: what to do about it."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def examined(check: str, look: Callable[[], Finding], within_s: float = 20.0, if_silent: str = "") -> Finding:
    """Let a check look, in a thread of its own: one that raises or hangs is a finding too.

    `if_silent`: what it means, and what to do, when there is no answer in time. The thread is then left behind.
    """
    answers: Queue[Finding] = Queue()
    Thread(target=lambda: answers.put(_looked(check, look)), name=f"check of {check}", daemon=True).start()
    try:
        return answers.get(timeout=within_s)
    except Empty:
        return Finding(check, "fail", f"did not answer in {within_s:g} s" + (f": {if_silent}" if if_silent else ""))


def _looked(check: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # whatever a machine that is not in order raises
        message = " ".join(str(error).split())
        return Finding(check, "fail", f"{type(error).__name__}: {message}" if message else type(error).__name__)


def of_problem(check: str, problem: str) -> Finding:
    """A message for people, `what is wrong; what to do`, as a finding."""
    found, _, advice = problem.partition("; ")
    return Finding(check, "fail", found, advice)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict of all."""
    return max((finding.verdict for finding in findings), key=_SEVERITY.index, default="ok")


def findings_table(findings: Iterable[Finding]) -> str:
    """At most 100 columns wide, unless a single word is longer."""
    findings = list(findings)
    room = _COLUMNS - len("    ") - max((len(finding.check) for finding in findings), default=0) - len("  verdict")
    return text_table(_HEADER, [row for finding in findings for row in _rows(finding, room)])


def _rows(finding: Finding, room: int) -> list[tuple[str, str, str]]:
    lines = _wrapped(finding.found, room) or [""]
    if finding.advice:
        lines += _wrapped(f"-> {finding.advice}", room, indent="   ")
    return [(finding.check, finding.verdict, lines[0]), *(("", "", line) for line in lines[1:])]


def _wrapped(text: str, room: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
