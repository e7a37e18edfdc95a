"""`pathfm export`: a run's teacher, or any file of a backbone, as other libraries load it, proven by them."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from pathfm.errors import UserError
from pathfm.export.card import RunFacts, facts_of, model_card
from pathfm.export.carried import Written
from pathfm.export.files import write_ancestor, write_hub, write_safetensors
from pathfm.export.huggingface import write_huggingface
from pathfm.export.onnx import write_onnx
from pathfm.export.timm import write_timm
from pathfm.export.verify import Verdict, verify
from pathfm.files import directory_written_aside
from pathfm.jobs.extraction import student_named
from pathfm.jobs.find_run import RUNS, find_run, is_run
from pathfm.lifecycle.run import Run
from pathfm.log import start_logging
from pathfm.models.pretrained import Pretrained, load_backbone, weights_file

WRITERS: dict[str, Callable[[Path, Pretrained, int | None], Written]] = {
    "hub": write_hub,
    "timm": write_timm,
    "huggingface": write_huggingface,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "ancestor": write_ancestor,
}
_STEP = re.compile(r"teacher_(\d+)\.(?:pth|safetensors)")
_ANOTHER_SIZE = 2  # patches more on a side, where any size is promised


class Source(NamedTuple):
    weights: Path
    run: Run | None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging()
    source = _source(arguments.source, arguments.runs_dir)
    output = arguments.output or _beside(source.weights, arguments.to)
    if output.exists():
        raise UserError(f"{output} is there; remove it, or choose another --output")
    model = load_backbone(source.weights, student_named(arguments.config))
    with directory_written_aside(output) as folder:
        written = WRITERS[arguments.to](folder, model, arguments.image_size)
        verdict = _verdict(arguments, folder, model, written)
        facts = facts_of(source.run, _step_of(source)) if source.run else RunFacts()
        card = model_card(arguments.to, output.name, model, written, verdict, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(_summary(output, source, written, verdict))
    return 0


def _source(word: str, runs_dir: Path) -> Source:
    """A file or a folder of weights, or of a run its best teacher, else its newest."""
    path = Path(word).expanduser()
    if path.is_file() or weights_file(path).is_file():
        return Source(path, _run_of(path))
    if path.suffix in (".pth", ".safetensors"):
        raise UserError(f"there is no file {path}; give a run, or a file of weights")
    run = find_run(word, runs_dir)
    if (teacher := run.teacher_to_use()) is None:
        raise UserError(
            f"run {run.name} has no exported teacher in {run.exports}; it writes one at its end, "
            "and every checkpoint.export_every_steps"
        )
    return Source(teacher, run)


def _run_of(weights: Path) -> Run | None:
    """The run among whose exports the file lies."""
    run = Run(weights.absolute().parent.parent)
    return run if weights.absolute().parent.name == "exports" and is_run(run) else None


def _step_of(source: Source) -> int | None:
    """From the file's name, or for the best one from what was written into it."""
    if found := _STEP.fullmatch(source.weights.name):
        return int(found[1])
    tensors = source.weights.with_suffix(".safetensors")
    try:
        with safe_open(tensors, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _beside(weights: Path, target: str) -> Path:
    return weights.parent / f"{target}_{weights.name if weights.is_dir() else weights.stem}"


def _verdict(arguments: Namespace, folder: Path, model: Pretrained, written: Written) -> Verdict:
    if arguments.no_verify:
        return Verdict(arguments.to, (), None, "it was asked not to be (--no-verify)")
    another = written.image_size + _ANOTHER_SIZE * model.student.patch_size
    sizes = [written.image_size, another] if written.any_size else [written.image_size]
    return verify(arguments.to, folder, model.vit, sizes)


def _summary(output: Path, source: Source, written: Written, verdict: Verdict) -> str:
    lines = [
        f"{output}: from {source.weights}",
        *written.notes,
        verdict.in_words(),
        f"how to load it: {output}/README.md",
    ]
    return "\n  ".join(lines)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm export",
        description="Write the backbone of a run's teacher, or of a file of weights, as another library loads it, with "
        "a model card. That library then loads it and must give the same features, or nothing is written.",
        epilog="hub: torch.hub.load and official DINOv2 names; timm: timm.create_model; huggingface: transformers' "
        "Dinov2Model; safetensors: plain; onnx: onnxruntime; ancestor: the ancestors' teacher.pth.",
    )
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a run's directory or its name, or a file of weights")
    parser.add_argument("--to", required=True, choices=list(WRITERS))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: TO_NAME beside the weights")
    parser.add_argument(
        "--image-size", type=_pixels, metavar="PX", help="side of the images; default: for which positions were learned"
    )
    parser.add_argument(
        "--config", help="the recipe of the weights (default: recipe.yaml of their run, or their shapes)"
    )
    parser.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where runs lie (default: runs)")
    parser.add_argument("--no-verify", action="store_true", help="do not load it by the other library")
    return parser


def _pixels(text: str) -> int:
    """A type for argparse."""
    pixels = int(text)
    if pixels <= 0:
        raise ValueError(text)
    return pixels


if __name__ == "__main__":
    raise SystemExit(main())
