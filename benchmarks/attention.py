"""Milliseconds of a block's attention, forward and backward, by every backend that works here, on 2x224 + 8x98 crops.

    python benchmarks/attention.py --batch 64        # on a GPU, samples that pass at once
    python benchmarks/attention.py --batch 2 --threads 1 --device cpu

What is timed is what a run times before it chooses: packed crops, all of them and then those that drop path leaves.
"""

import argparse
import statistics
import sys

import torch
from measuring import command, machine, spread, taking_turns

from pathfm.errors import exit_status
from pathfm.jobs.attention_choice import Work, name_of, passes, work_of
from pathfm.models.attention import candidates, what_stops
from pathfm.recipe import read_recipe

MODELS = {"ViT-S/14": "vit_small", "ViT-L/14": "vit_large"}
RATES = (0.0, 0.4)  # of drop path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64, help="samples at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--deterministic", action="store_true", help="as train.deterministic demands")
    options = parser.parse_args()
    device = torch.device(options.device, torch.cuda.current_device() if options.device == "cuda" else None)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(options.deterministic)
    on = f", {name_of(device)}" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{machine()}{on}, {options.precision}\n\n```\n{command()}\n```\n")
    print("| model | drop path | crops x tokens | backend | ms | times the fastest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in MODELS:
        for rate in RATES:
            print_rows(model, rate, work(model, rate, options.precision, options.batch, device), options.rounds)
    return 0


def work(model: str, rate: float, precision: str, batch: int, device: torch.device) -> Work:
    settings = [f"student.arch={MODELS[model]}", "student.patch_size=14", "crops.local_crops_size=98"]
    settings += [f"student.drop_path_rate={rate}", f"train.precision={precision}"]
    return work_of(read_recipe(None, settings).recipe, batch, device)


def print_rows(model: str, rate: float, work: Work, rounds: int) -> None:
    contestants, stopped = {}, {}
    for backend in candidates(work.device, work.dtype):
        if problem := what_stops(backend, work.device, work.dtype):
            stopped[backend] = problem
        else:
            contestants[backend] = passes(backend, work)
    calls = {backend: run() for backend, run in contestants.items()}
    seconds = taking_turns(contestants, rounds)
    ms = {backend: [1e3 * taken / calls[backend] for taken in seconds[backend]] for backend in seconds}
    fastest = min(statistics.median(taken) for taken in ms.values())
    about = f"{model} | {rate} | {' + '.join(f'{crops} x {tokens}' for crops, tokens in work.layout)}"
    for backend, taken in ms.items():
        print(
            f"| {about} | {backend} | {spread(taken, '.2f')} | {statistics.median(taken) / fastest:.2f} |", flush=True
        )
    for backend, problem in stopped.items():
        print(f"| {about} | {backend} | {problem} | |", flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
