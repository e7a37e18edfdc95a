"""What a verification says: checks with their verdicts, and the cases that they are about."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

Verdict = Literal["ok", "warning", "damage", "leakage"]
_SEVERITY: tuple[Verdict, ...] = ("ok", "warning", "damage", "leakage")
_MAX_CASES = 1000  # kept of one check; how many there are is in what is said


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    said: str  # one line for people
    cases: tuple[str, ...] = ()  # files or rows that it is about
    counts: Mapping[str, int] = field(default_factory=dict)


def first_cases(cases: Iterable[str]) -> tuple[str, ...]:
    """As many cases as a check keeps."""
    return tuple(islice(cases, _MAX_CASES))


def worst(checks: Iterable[Check]) -> Verdict:
    """The gravest verdict of all."""
    return max((check.verdict for check in checks), key=_SEVERITY.index, default="ok")
