"""`pathfm memory NAME [key=value ...]`: what a run takes of each GPU's memory, and settings with which it fits."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from pathfm.errors import UserError
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.memory_forecast import GIB, HEADROOM, Forecast, usable_bytes
from pathfm.recipe import find_config, read_recipe
from pathfm.tables import text_table

_SMALLEST_SHOWN = GIB // 200


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
    if arguments.memory <= 1:
        raise UserError(f"--memory {arguments.memory:g} is no size of a GPU; give it in GB, as in --memory 80")
    with Forecast(read.recipe, arguments.gpus, arguments.gpus_per_node) as forecast:
        print(_in_words(path.stem, forecast, arguments.memory), flush=True)
        print(_proposed(forecast, arguments.memory))
    return 0


def _in_words(name: str, forecast: Forecast, gigabytes: float) -> str:
    found = forecast.found(forecast.setting)
    shown = [(what, num_bytes) for what, num_bytes in found.peak.bytes_of.items() if num_bytes >= _SMALLEST_SHOWN]
    rows = [
        *shown,
        ("all else", found.peak.total_bytes - sum(num_bytes for _, num_bytes in shown)),
        ("the peak of a step: forecast of torch.cuda.max_memory_allocated", found.peak.total_bytes),
        (f"headroom, {HEADROOM:.0%}: gaps between allocations, workspaces", found.headroom_bytes),
        ("making the next step's crops on the GPU, of tiles of 256 px", found.cropping_bytes),
        (f"assumed: CUDA context{' and NCCL' * (forecast.gpus > 1)}", found.context_bytes),
        ("needed", found.needed_bytes),
        (f"usable of {gigabytes:g} GB", usable_bytes(gigabytes)),
    ]
    where = f"{forecast.gpus} GPUs, {forecast.rank_batch:,} on each" if forecast.gpus > 1 else "1 GPU"
    return "\n".join(
        [
            f"{name}: a batch of {forecast.plan.global_batch_size:,} on {where}; {found.setting.words()}",
            text_table(("GiB", "of each GPU"), [(f"{num_bytes / GIB:6.2f}", what) for what, num_bytes in rows]),
            "It fits." if found.fits(gigabytes) else "It does not fit.",
        ]
    )


def _proposed(forecast: Forecast, gigabytes: float) -> str:
    proposals = forecast.proposals(gigabytes)
    if not proposals:
        smallest = min(forecast.known.values(), key=lambda found: found.needed_bytes)
        return (
            f"Nothing fits; the smallest that was tried needs {smallest.needed_bytes / GIB:.1f} GiB "
            f"({smallest.setting.words()}). Take more GPUs, or a smaller network, head or crops."
        )
    slower = "  (below KoLeo's group: everything is seen twice)"
    rows = [
        (f"{one.needed_bytes / GIB:6.2f}", f"{one.setting.words()}{slower if forecast.sees_twice(one.setting) else ''}")
        for one in proposals
    ]
    return "\n".join(
        [
            "These fit, the fastest first; none changes what is trained:",
            text_table(("GiB", "to be added to the command"), rows),
        ]
    )
