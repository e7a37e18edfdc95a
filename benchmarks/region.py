"""Seconds for a 4096 px region: decoded, through the patch level, through the region level, and all in one call.

    python benchmarks/region.py --region ../shared/data/regions4096/her2st_B4_x1280_y4480_4096.jpg

Initial weights: times do not depend on them. ViT-S/16 over 256 px patches, vit4k_xs over the 16 x 16 grid (HIPT).
"""

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import command, machine, spread, taking_turns

from pathfm.data.decode import decode
from pathfm.errors import exit_status
from pathfm.hierarchical import HierarchicalModel
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig

STUDENTS = {
    "patch": StudentConfig(arch="vit_small", patch_size=16, layerscale=0.0),
    "region": StudentConfig(arch="vit4k_xs", feature_width=384, patch_size=1, layerscale=0.0),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--region", type=Path, required=True, help="an image of 4096 px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64], help="patches at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    options = parser.parse_args()
    device = torch.device(options.device)
    encoded = options.region.read_bytes()
    region = torch.from_numpy(decode(encoded)).permute(2, 0, 1).contiguous()
    ways: dict[str, Callable[[], object]] = {"decode the JPEG": lambda: decode(encoded)}
    for chunk in options.chunks:
        model = composed(chunk).to(device)
        grid = on_device(lambda model=model: model.patch_grid(region), device, options.bf16)
        ways[f"patch level, {chunk} patches at once"] = grid
        features = grid()[None]
        ways.setdefault(
            "region level", on_device(lambda model=model, x=features: model.region([x]), device, options.bf16)
        )
        whole = on_device(lambda model=model: model(region), device, options.bf16)
        ways[f"region to vector in one call, {chunk} patches at once"] = whole
    print(f"{machine()}, {name_of(device)}, {'bf16' if options.bf16 else 'fp32'}\n\n```\n{command()}\n```\n")
    print("| | seconds | regions/s |\n| --- | --- | --- |")
    for name, seconds in taking_turns(ways, options.rounds).items():
        print(f"| {name} | {spread(seconds, '.3f')} | {1 / statistics.median(seconds):.2f} |")
    print(f"\n{peak(device)}")
    return 0


def composed(chunk: int) -> HierarchicalModel:
    sides = {"patch": 224, "region": 14}
    patch, region = (
        build_backbone(STUDENTS[level], side, drop_path=False, has_mask_token=False) for level, side in sides.items()
    )
    return HierarchicalModel(patch, region, STUDENTS, chunk=chunk).eval()


def on_device(run: Callable[[], object], device: torch.device, bf16: bool) -> Callable[[], object]:
    """Until the result is there."""

    def waited() -> object:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    return waited


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"


def peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"Peak memory on the GPU: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    return f"Peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"


if __name__ == "__main__":
    sys.exit(exit_status(main))
