"""What the last lines of metrics say that a person must hear of: a collapse, a divergence, waiting GPUs, broken tiles.

Nothing is remembered from one call to the next, so a resumed run judges as one that was never interrupted. Lines may
lack any key and hold nulls: what is not there is not judged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal, get_args

AlarmKind = Literal["collapse", "diverging", "data-bound", "quarantine"]
MOST_LINES = 50  # no earlier line changes an alarm

_LASTING = 5  # lines in a row: one alone may be chance, or a loader's start
_YOUNG_STEPS = (
    500  # in which a network with LayerScale grows from one answer for all samples, and its gradients with it
)
_FLAT = 0.01  # of log K
_ABOVE = 0.10  # of log K
# A rank is 1 at least, so its share is that of (rank - 1) in (what it can be - 1). Healthy small runs stand above 20 %.
_SMALL_RANK = 0.03
_NO_RANK = 0.01
_FEW_PROTOTYPES = 0.05  # of the entropy that the batch could have
_TIMES_MEDIAN = 10.0
_LINES_BEFORE = 20  # a median of fewer tells nothing
_DATA_WAIT = 0.3  # of the time
_BROKEN_NOW, _BROKEN_EVER = 0.01, 0.001  # of the samples seen: between the lines, and since the first step
_A_FEW_TILES = 10  # are no pattern yet


@dataclass(frozen=True)
class RunFacts:
    """What lines of metrics do not tell of their run."""

    log_k: float  # log of the number of prototypes of the class tokens' head: the loss of a uniform answer
    width: int  # of the features
    global_batch: int
    warmup_steps: int  # of the learning rate
    quarantine: str  # the file that names undecodable samples


@dataclass(frozen=True)
class Alarm:
    """One line that says what is wrong, with the values, and what to do."""

    kind: AlarmKind
    text: str


def alarms(lines: Sequence[Mapping[str, Any]], facts: RunFacts) -> list[Alarm]:
    """At most one of each kind. `lines` are the last ones of metrics.jsonl, the newest last; `MOST_LINES` suffice."""
    lines = lines[-MOST_LINES:]
    texts = {
        "collapse": _collapse(_lasting(lines, after_step=_childhood(facts)), facts),
        "diverging": _above_uniform(lines, facts) or _steep(lines, facts) or _passed_over(lines),
        "data-bound": _waiting(_lasting(lines)),
        "quarantine": _broken_tiles(lines, facts),
    }
    return [Alarm(kind, text) for kind in get_args(AlarmKind) if (text := texts[kind])]


def _childhood(facts: RunFacts) -> int:
    """The last step of it."""
    return max(facts.warmup_steps, _YOUNG_STEPS)


# ---- collapse


def _collapse(last: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    return _flat(last, facts) or _one_prototype(last, facts) or _one_direction(last, facts)


def _flat(last: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    """The loss alone says nothing: healthy runs begin near log K, and stay there for long with many prototypes."""
    losses, ranks = _all(map(_class_token_loss, last)), _column(last, "health/effective_rank")
    if not losses or not ranks or max(abs(loss - facts.log_k) for loss in losses) > _FLAT * facts.log_k:
        return None
    if max(ranks) > _rank_of_share(_SMALL_RANK, facts):
        return None
    return (
        f"the class-token loss is flat at log K = {facts.log_k:.2f} and the effective rank is {ranks[-1]:.3g} of "
        f"{_possible_rank(facts)}: the teacher does not tell samples apart; begin another run with a lower "
        "optim.base_lr or a longer optim.warmup_pct"
    )


def _one_prototype(last: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    entropies, possible = _column(last, "health/prototype_entropy"), min(facts.log_k, math.log(facts.global_batch))
    if not entropies or max(entropies) >= _FEW_PROTOTYPES * possible:
        return None
    return (
        f"prototype entropy is {entropies[-1]:.2g} of {possible:.2f}: the teacher gives all samples the same "
        "prototype; begin another run with train.centering=sinkhorn_knopp or a higher teacher.teacher_temp"
    )


def _one_direction(last: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    ranks = _column(last, "health/effective_rank")
    if not ranks or max(ranks) >= _rank_of_share(_NO_RANK, facts):
        return None
    return (
        f"the effective rank of the features is {ranks[-1]:.3g} of {_possible_rank(facts)}: they lie in almost one "
        "direction; begin another run with a lower optim.base_lr or a larger dino.koleo_loss_weight"
    )


def _possible_rank(facts: RunFacts) -> int:
    """Views of one sample are alike, so they count as one row."""
    return min(facts.width, facts.global_batch)


def _rank_of_share(share: float, facts: RunFacts) -> float:
    return 1 + share * (_possible_rank(facts) - 1)


# ---- diverging


def _above_uniform(lines: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    """A loss above that of a uniform answer. A small head begins there: in warm-up it must have been below before."""
    losses = _all(map(_class_token_loss, _lasting(lines)))
    limit = (1 + _ABOVE) * facts.log_k
    if not losses or min(losses) <= limit:
        return None
    before = [loss for line in lines if (loss := _class_token_loss(line)) is not None]
    if (_number(lines[-1], "step") or 0) <= facts.warmup_steps and min(before) > limit:
        return None
    return (
        f"the class-token loss is {losses[-1]:.2f}, above the {facts.log_k:.2f} of a uniform answer, for {_LASTING} "
        "lines: training diverges; begin another run with a lower optim.base_lr or a smaller optim.clip_grad"
    )


def _steep(lines: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    last = _lasting(lines, after_step=_childhood(facts))
    for key in sorted(key for key in (last[-1] if last else {}) if key.startswith("grad_norm/")):
        norms = _column(last, key)
        before = [norm for line in lines[:-_LASTING] if (norm := _number(line, key)) is not None]
        if norms and len(before) >= _LINES_BEFORE and min(norms) > _TIMES_MEDIAN * (usual := median(before)) > 0:
            return (
                f"the gradient norm of {key.removeprefix('grad_norm/')} is {norms[-1]:.3g}, {norms[-1] / usual:.0f} "
                f"times its median of {usual:.3g}, for {_LASTING} lines: training diverges; begin another run with "
                "a lower optim.base_lr or a smaller optim.clip_grad"
            )
    return None


def _passed_over(lines: Sequence[Mapping[str, Any]]) -> str | None:
    skipped = _column(_lasting(lines), "steps_skipped")
    if 2 * (number := sum(1 for steps in skipped if steps > 0)) <= _LASTING:
        return None
    return (
        f"{sum(skipped):.0f} steps in {number} of the last {_LASTING} lines had no finite loss or gradient and were "
        "passed over; see accidents/; if it lasts, begin another run with a lower optim.base_lr or train.precision=bf16"
    )


# ---- data


def _waiting(last: Sequence[Mapping[str, Any]]) -> str | None:
    timings = [timing if isinstance(timing := line.get("timing"), Mapping) else {} for line in last]
    waits, speeds = _column(timings, "data_wait_fraction"), _column(timings, "samples_per_second")
    if not waits or min(waits) <= _DATA_WAIT:
        return None
    speed = f" ({fmean(speeds):,.0f} samples/s)" if speeds else ""
    return (
        f"the GPUs wait for data {100 * fmean(waits):.0f} % of the time{speed}: raise train.num_workers and the "
        "job's CPUs, put the tars on a faster disk, or make crops on the GPU with augment.device=cuda"
    )


def _broken_tiles(lines: Sequence[Mapping[str, Any]], facts: RunFacts) -> str | None:
    counts = [
        (skipped, seen)
        for line in lines
        if (skipped := _number(line, "samples_skipped")) is not None and (seen := _number(line, "samples_seen"))
    ]
    if len(counts) < 2:
        return None
    (skipped_before, seen_before), (skipped, seen) = counts[0], counts[-1]
    new, newly_seen = skipped - skipped_before, seen - seen_before
    if skipped < _A_FEW_TILES or new <= 0 or newly_seen <= 0:
        return None
    if new > _BROKEN_NOW * newly_seen:
        share, of = new / newly_seen, f"{new:,.0f} of the last {newly_seen:,.0f} samples"
    elif skipped > _BROKEN_EVER * seen:
        share, of = skipped / seen, f"{skipped:,.0f} of the {seen:,.0f} samples so far"
    else:
        return None
    return (
        f"{of} ({100 * share:.2g} %) could not be decoded, and it goes on: {facts.quarantine} names them; examine "
        "their cohorts with pathfm verify, and stop at too many with data.corrupt_samples=limit:0.01"
    )


# ---- lines


def _lasting(lines: Sequence[Mapping[str, Any]], after_step: int = -1) -> Sequence[Mapping[str, Any]]:
    """The last few lines; nothing when there are too few, or one of them is of an earlier step."""
    last = lines[-_LASTING:]
    steps = [_number(line, "step") for line in last]
    return last if len(last) == _LASTING and all(step is not None and step > after_step for step in steps) else []


def _class_token_loss(line: Mapping[str, Any]) -> float | None:
    """The mean cross-entropy over all pairs of views: both terms are shares of it."""
    terms = _number(line, "dino_local_crops_loss"), _number(line, "dino_global_crops_loss")
    return None if terms[0] is None or terms[1] is None else terms[0] + terms[1]


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A number of every line, or nothing when one lacks it."""
    return _all(_number(line, key) for line in lines)


def _all(values: Any) -> list[float]:
    found = list(values)
    return [] if None in found else found


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
