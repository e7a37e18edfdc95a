"""`pathfm memory NAME [key=value ...]`: what a run takes of each GPU's memory, and settings with which it fits."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.memory_forecast import GIB, HEADROOM, Forecast, Found, Room
from pathfm.recipe import find_config, read_recipe
from pathfm.tables import text_table


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("pathfm memory", description="Forecast a run's memory, and propose settings that fit.")
    parser.add_argument("config", help="a recipe's name in configs/, or a path")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the run (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="of which a node has so many (8)")
    parser.add_argument("--memory", type=float, default=80, metavar="GB", help="of a GPU, as it is called (80)")
    arguments = parse_with_overrides(parser, argv)
    path = find_config(arguments.config, CONFIGS)
    read = read_recipe(path, arguments.overrides)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    room = Room(arguments.memory, arguments.gpus)
    with Forecast(read.recipe, arguments.gpus, arguments.gpus_per_node) as forecast:
        given = Found(forecast.setting, forecast.peak(forecast.setting))
        print(_in_words(path.stem, forecast, given, room), flush=True)
        print(_proposed(forecast.proposals(room), forecast))
    return 0


def _in_words(name: str, forecast: Forecast, given: Found, room: Room) -> str:
    peak, setting, batch = given.peak, given.setting, forecast.plan.global_batch_size
    lines = [(kind, num_bytes) for kind, num_bytes in peak.bytes_of.items() if num_bytes >= GIB / 200]
    small = peak.total_bytes - sum(num_bytes for _, num_bytes in lines)
    rows = [
        *lines,
        ("all else", small),
        ("at the peak of a step: forecast of torch.cuda.max_memory_allocated", peak.total_bytes),
        (f"headroom of {HEADROOM:.0%}: gaps between allocations, workspaces", int(HEADROOM * peak.total_bytes)),
        (f"not counted by torch, assumed: CUDA context{' and NCCL' * (room.gpus > 1)}", room.uncounted_bytes),
        (f"usable of a GPU of {room.gigabytes:g} GB", room.usable_bytes),
    ]
    where = f"{forecast.gpus} GPUs" if forecast.gpus > 1 else "1 GPU"
    parts = f" in parts of {setting.micro_batch}" if setting.micro_batch < forecast.rank_batch else ""
    return "\n".join(
        [
            f"{name} on {where}: a batch of {batch:,}, {forecast.rank_batch:,} on each{parts}; {setting.words()}",
            text_table(("GiB", "of each GPU"), [(f"{num_bytes / GIB:6.2f}", what) for what, num_bytes in rows]),
            "It fits." if room.fits(peak) else "It does not fit.",
        ]
    )


def _proposed(proposals: Sequence[Found], forecast: Forecast) -> str:
    if not proposals:
        setting, peak = min(forecast.known.items(), key=lambda known: known[1].total_bytes)
        return (
            f"Nothing fits; the smallest that was tried takes {peak.total_bytes / GIB:.1f} GiB ({setting.words()}). "
            "Take more GPUs, or a smaller network or head."
        )
    rows = [(f"{one.peak.total_bytes / GIB:6.2f}", one.setting.words()) for one in proposals]
    return "\n".join(
        ["These fit, the fastest first; none changes what is trained:", text_table(("GiB", "settings"), rows)]
    )
