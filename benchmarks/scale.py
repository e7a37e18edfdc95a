"""What n nodes give: samples/s, the share of them that is kept, and how often to save. On paper and by simulation.

    python benchmarks/scale.py --step-seconds 0.36 --batch-per-gpu 128 --nodes 1,2,4,8,16,32 --mtbp-hours 24
    python benchmarks/scale.py --measured --data ../shared/data/osteosarcoma3/images

The first prints a table in Markdown, and with --picture draws it. Whatever is not given is assumed, and listed as such.
The second asks whether it is true: it trains a small network, interrupts it at random, compares how much of its time
was kept with what is predicted, and writes that into the results.
"""

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from goodput import (
    Conditions,
    Estimate,
    best_every_steps,
    daly_interval_s,
    goodput,
    nearly_best,
    simulated_goodput,
)
from interrupted_run import measured_section
from measuring import command

from pathfm.errors import UserError, exit_status
from pathfm.files import write_text, written_aside
from pathfm.random_streams import stream

RESULTS = Path(__file__).parent / "results" / "scale.md"
MEASURED = "## Is it true? One process, interrupted at random"
_HOUR = 3600.0
_NEARLY = 0.005  # of the best goodput, which nobody would miss
_LONGEST_S = 24 * _HOUR  # between two saves: whoever is always warned need not save, but a day is enough to risk
_GRADIENT_BYTES, _GATHERED_BYTES = 4, 2  # fp32 gradients are added up, bf16 weights are gathered
_GATHERS = 3  # student forward, student backward, teacher forward


@dataclass(frozen=True)
class Assumption:
    """A number that one gives, and what stands in for it."""

    name: str
    value: float
    why: str

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"


ASSUMED = (
    Assumption("step_seconds", 0.36, "one GPU alone; ViT-L/14, batch 128, at half the peak of an H100"),
    Assumption("batch_per_gpu", 128, "as in configs/vitl14.yaml"),
    Assumption("gpus_per_node", 8, "the usual node"),
    Assumption("parameters", 400e6, "with gradients: ViT-L/14 (304 M) and two heads with 131072 prototypes"),
    Assumption("network_gbit", 200, "of a node, both ways at once"),
    Assumption("inside_gbyte", 300, "GB/s between the GPUs of a node: NVLink of an H100, as collectives see it"),
    Assumption("overlap", 0.7, "share of the exchange that is hidden behind the backward pass"),
    Assumption("checkpoint_stall", 0.5, "seconds that training loses to a save; checkpoint.md: 0.1 to 0.4 for 1.5 GB"),
    Assumption("durable_seconds", 20, "from then until a save counts"),
    Assumption("restart_seconds", 180, "from a job's start to its first new step"),
    Assumption("queue_seconds", 0, "from an interruption to the job's next start"),
    Assumption("mtbp_hours", 24, "between two preemptions of one node"),
    Assumption("notice_seconds", 0, "before a preemption; what does not suffice for a save counts as none"),
    Assumption(
        "mtbf_hours",
        5000,
        "between two losses of one node; arXiv 2407.21783, 3.3.4: 419 in 54 days of 2,048 nodes, so 6,300",
    ),
    Assumption("every_steps", 1250, "steps between saves that the best is compared with; an epoch of DINOv2's"),
)


@dataclass(frozen=True)
class Cluster:
    """What a prediction is made from, named as the options are."""

    step_seconds: float
    batch_per_gpu: float
    gpus_per_node: float
    parameters: float
    network_gbit: float
    inside_gbyte: float
    overlap: float
    checkpoint_stall: float
    durable_seconds: float
    restart_seconds: float
    queue_seconds: float
    mtbp_hours: float
    notice_seconds: float
    mtbf_hours: float
    every_steps: float
    strategy: str = "ddp"

    def step_s(self, nodes: int) -> float:
        """Of all GPUs together: what one needs, and what of the exchange is not hidden behind it."""
        exchange = exchange_s(self, nodes)
        return self.step_seconds + exchange - min(self.overlap * exchange, self.step_seconds)

    def samples_per_s(self, nodes: int) -> float:
        """While it trains."""
        return nodes * self.gpus_per_node * self.batch_per_gpu / self.step_s(nodes)

    def efficiency(self, nodes: int) -> float:
        """Beside as many GPUs that exchange nothing."""
        return self.step_seconds / self.step_s(nodes)

    def conditions(self, nodes: int) -> Conditions:
        """A job is scheduled as one: whatever befalls a node befalls it."""
        preempted, lost = (nodes / (_HOUR * hours) for hours in (self.mtbp_hours, self.mtbf_hours))
        times = (self.step_s(nodes), self.checkpoint_stall, self.durable_seconds, self.restart_seconds)
        warned = Conditions(*times, self.queue_seconds, sudden_per_s=lost, warned_per_s=preempted)
        if warned.leaving_s <= self.notice_seconds:
            return warned
        return Conditions(*times, self.queue_seconds, sudden_per_s=lost + preempted)


@dataclass(frozen=True)
class Prediction:
    """For one number of nodes, saved as often as is best."""

    nodes: int
    samples_per_s: float
    efficiency: float
    every_steps: int
    nearly: tuple[int, int]  # steps between saves that are nearly as good
    step_s: float
    daly_s: float
    formula: float
    simulated: Estimate
    formula_as_compared: float  # of `Cluster.every_steps`


def exchange_s(cluster: Cluster, nodes: int) -> float:
    """Seconds that a step's collectives take on rings through all GPUs, at the rate of their slowest link.

    An all-reduce of B bytes over n ranks moves 2 (n - 1) / n B over every link, a gather or scatter half of that. What
    it leaves out: latency, stragglers, and other jobs on the network.
    """
    gpus = int(cluster.gpus_per_node)
    gradients = _GRADIENT_BYTES * cluster.parameters
    between_nodes, inside = cluster.network_gbit * 1e9 / 8, cluster.inside_gbyte * 1e9
    of_all = between_nodes if nodes > 1 else inside
    sharded = _GATHERS * _GATHERED_BYTES * cluster.parameters + gradients
    if cluster.strategy == "fsdp":
        return _around(nodes * gpus) * sharded / of_all
    if cluster.strategy == "hybrid":
        return _around(gpus) * sharded / inside + 2 * _around(nodes) * gradients / between_nodes
    return 2 * _around(nodes * gpus) * gradients / of_all


def _around(ranks: int) -> float:
    return (ranks - 1) / ranks


def predict(cluster: Cluster, nodes: int, seed: int = 0) -> Prediction:
    run = cluster.conditions(nodes)
    most = max(1, int(_LONGEST_S / run.step_s))
    best = best_every_steps(run, most)
    return Prediction(
        nodes=nodes,
        samples_per_s=cluster.samples_per_s(nodes),
        efficiency=cluster.efficiency(nodes),
        every_steps=best,
        nearly=nearly_best(run, _NEARLY, most),
        step_s=run.step_s,
        daly_s=daly_interval_s(run.stall_s, 1 / run.sudden_per_s),
        formula=float(goodput(run, best)),
        simulated=simulated_goodput(run, best, stream(seed, nodes, "scale")),
        formula_as_compared=float(goodput(run, cluster.every_steps)),
    )


# ---- the table


def report(cluster: Cluster, predictions: Sequence[Prediction], assumed: Mapping[str, Assumption], seed: int) -> str:
    header = [
        "nodes", "GPUs", "samples/s while it trains", "scaling", "best interval, steps", "minutes", "Daly's, minutes",
        "`checkpoint.every_steps`", "nearly as good", "goodput, formula", "simulated", "samples/s kept",
        f"goodput at {cluster.every_steps:,.0f} steps",
    ]  # fmt: skip
    rows = [header, ["---"] * len(header), *(_row(cluster, prediction) for prediction in predictions)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_premises(cluster, predictions, assumed, seed)}"


def _row(cluster: Cluster, prediction: Prediction) -> list[str]:
    fewest, most = prediction.nearly
    return [
        f"{prediction.nodes}",
        f"{prediction.nodes * cluster.gpus_per_node:.0f}",
        f"{prediction.samples_per_s:,.0f}",
        f"{prediction.efficiency:.1%}",
        f"{prediction.every_steps:,}",
        f"{prediction.every_steps * prediction.step_s / 60:.2f}",
        f"{prediction.daly_s / 60:.2f}",
        f"{_rounded(prediction.every_steps)}",
        f"{fewest:,} to {most:,}",
        f"{prediction.formula:.2%}",
        f"{prediction.simulated.mean:.2%} ± {100 * prediction.simulated.half_width:.3f}",
        f"{prediction.samples_per_s * prediction.formula:,.0f}",
        f"{prediction.formula_as_compared:.2%}",
    ]


def _rounded(steps: int) -> int:
    """To two digits."""
    unit = 10 ** max(0, len(str(steps)) - 2)
    return round(steps / unit) * unit


def _premises(cluster: Cluster, predictions: Sequence[Prediction], assumed: Mapping[str, Assumption], seed: int) -> str:
    given = [
        f"{part.option[2:]} {_number(getattr(cluster, part.name))}" for part in ASSUMED if part.name not in assumed
    ]
    taken = [f"| {part.option[2:]} | {_number(part.value)} | {part.why} |" for part in assumed.values()]
    runs = [cluster.conditions(prediction.nodes) for prediction in predictions]
    needed = max(run.leaving_s for run in runs)
    is_saved = all(run.warned_per_s for run in runs)
    paragraph = (
        f"Strategy {cluster.strategy}, seed {seed}. Given: {', '.join(given) or 'nothing'}. Behind what was simulated "
        f"stands its 95 % interval; nearly as good is what costs at most {_NEARLY:.1%} of the best goodput. "
        f"A notice of {needed:.0f} s suffices to save the step that is under way: "
        + ("preemptions lose no step here." if is_saved else "here preemptions lose what is not saved.")
    )
    return "\n".join([paragraph, *(["", "| assumed | | |", "| --- | --- | --- |", *taken] if taken else [])])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


# ---- the picture


def draw(cluster: Cluster, predictions: Sequence[Prediction], path: Path) -> None:
    """Goodput over the interval for every number of nodes; samples/s over nodes. One PNG."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained", dpi=110)
    by_interval, by_nodes = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(predictions)))
    for prediction, colour in zip(predictions, colours, strict=True):
        _draw_intervals(by_interval, cluster.conditions(prediction.nodes), prediction, colour)
    _draw_nodes(by_nodes, cluster, predictions)
    _finish(by_interval, "goodput: share of wall time that is kept", "minutes of work between saves")
    _finish(by_nodes, "samples per second", "nodes")
    waits = "below it a save waits\nfor the one before"
    by_interval.axvline(cluster.durable_seconds / 60, color="#888888", linestyle=":", linewidth=1, label=waits)
    by_interval.legend(title="nodes", loc="lower left", bbox_to_anchor=(0.25, 0), alignment="left", **_KEY)
    by_nodes.legend(loc="upper left", **_KEY)
    with written_aside(path) as aside:
        FigureCanvasAgg(figure).print_png(str(aside))


_KEY: Mapping[str, Any] = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "handlelength": 1.8}


def _draw_intervals(axis: Any, run: Conditions, prediction: Prediction, colour: Any) -> None:
    minutes = np.geomspace(0.1, 120, 400)
    steps = minutes * 60 / run.step_s
    axis.plot(minutes, goodput(run, steps), color=colour, linewidth=1.4, label=f"{prediction.nodes}")
    best = prediction.every_steps * prediction.step_s / 60
    if best <= minutes[-1]:
        axis.plot(
            best, prediction.formula, "*", color=colour, markersize=11, markeredgecolor="white", clip_on=False, zorder=4
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axis.set_ylim(0, 1)


def _draw_nodes(axis: Any, cluster: Cluster, predictions: Sequence[Prediction]) -> None:
    from matplotlib.ticker import EngFormatter

    nodes = [prediction.nodes for prediction in predictions]
    alone = cluster.gpus_per_node * cluster.batch_per_gpu / cluster.step_seconds
    curves = {
        "ideal": ([count * alone for count in nodes], "#888888", "--"),
        "while it trains": ([prediction.samples_per_s for prediction in predictions], "#6b2c7e", "-"),
        "kept, best interval": ([p.samples_per_s * p.formula for p in predictions], "#e69f00", "-"),
        f"kept, every {cluster.every_steps:,.0f} steps": (
            [p.samples_per_s * p.formula_as_compared for p in predictions],
            "#009e73",
            ":",
        ),
    }
    for label, (values, colour, style) in curves.items():
        axis.plot(nodes, values, color=colour, linestyle=style, marker=".", linewidth=1.4, label=label)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep="", places=0))


def _finish(axis: Any, title: str, x_label: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.measured:
        _measure(arguments)
        return 0
    cluster, assumed = cluster_of(arguments)
    predictions = [predict(cluster, nodes, arguments.seed) for nodes in arguments.nodes]
    print(report(cluster, predictions, assumed, arguments.seed))
    if arguments.picture:
        draw(cluster, predictions, arguments.picture)
        print(f"drawn: {arguments.picture}", file=sys.stderr)
    return 0


def cluster_of(arguments: Namespace) -> tuple[Cluster, dict[str, Assumption]]:
    """And what of it nobody gave. Raises `UserError` for numbers that mean nothing."""
    assumed = {part.name: part for part in ASSUMED if getattr(arguments, part.name) is None}
    values = {part.name: part.value if part.name in assumed else getattr(arguments, part.name) for part in ASSUMED}
    may_be_zero = {
        "overlap",
        "checkpoint_stall",
        "durable_seconds",
        "restart_seconds",
        "queue_seconds",
        "notice_seconds",
    }
    for part in ASSUMED:
        value = values[part.name]
        if not (value >= 0 if part.name in may_be_zero else value > 0):
            raise UserError(
                f"{part.option} must be {'0 or more' if part.name in may_be_zero else 'above 0'}, not {value:g}"
            )
    if values["overlap"] > 1:
        raise UserError(f"--overlap is a share of the exchange, from 0 to 1, not {values['overlap']:g}")
    return Cluster(**values, strategy=arguments.strategy), assumed


def _measure(arguments: Namespace) -> None:
    if arguments.data is None:
        raise UserError("--measured needs --data: a folder of tiles to train on")
    section = measured_section(
        arguments.data, arguments.work, arguments.interruptions, arguments.mean_seconds, arguments.seed
    )
    body = f"```\n{command()}\n```\n\n{section}"
    print(body)
    before = arguments.results.read_text(encoding="utf-8") if arguments.results.is_file() else ""
    write_text(arguments.results, with_section(before, MEASURED, body))
    print(f"written: {arguments.results}", file=sys.stderr)


def with_section(text: str, heading: str, body: str) -> str:
    """The text with what stands below the heading, up to the next one of its kind, replaced; appended if it is new."""
    section = f"{heading}\n\n{body.strip()}\n"
    before, found, rest = text.partition(f"{heading}\n")
    if not found:
        return f"{text.rstrip()}\n\n{section}".lstrip()
    _, more, behind = rest.partition("\n## ")
    return f"{before}{section}" + (f"\n## {behind}" if more else "")


def _numbers_of_nodes(text: str) -> list[int]:
    counts = sorted({int(part) for part in text.split(",")})
    if counts[0] < 1:
        raise ValueError(text)
    return counts


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=_numbers_of_nodes, default=[1, 2, 4, 8, 16, 32], help="e.g. 1,2,4,8")
    parser.add_argument("--strategy", choices=("ddp", "fsdp", "hybrid"), default="ddp", help="parallel.strategy")
    for part in ASSUMED:
        parser.add_argument(part.option, type=float, metavar="X", help=f"{part.why} (assumed: {part.value:g})")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation, and of when the measured run is killed")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    measured = parser.add_argument_group("is it true?")
    measured.add_argument("--measured", action="store_true", help="train, interrupt, compare; some minutes")
    measured.add_argument("--data", type=Path, help="a folder of tiles")
    measured.add_argument("--work", type=Path, default=Path("build/scale"), help="where the runs lie; must be new")
    measured.add_argument("--interruptions", type=int, default=10, help="in the mean (10)")
    measured.add_argument("--mean-seconds", type=float, help="between two interruptions (what suits this machine)")
    measured.add_argument("--results", type=Path, default=RESULTS, help="whose section is rewritten")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: no trainer is left behind
    raise SystemExit(exit_status(main))
