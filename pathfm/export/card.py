"""The model card beside exported weights, written from the files of the run that made them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD
from pathfm.export.carried import Written
from pathfm.export.verify import Verdict
from pathfm.lifecycle.run import Run
from pathfm.models.pretrained import Pretrained
from pathfm.track.json_lines import JsonLines

_LIBRARIES = {"timm": "timm", "huggingface": "transformers"}  # as the hub of Hugging Face calls them
_FOLDERS = re.compile(r"[^\s:=,'\"]*/")
_NOT_SHOWN = ("wandb", "parallel", "checkpoint")  # of a recipe: they do not change the weights
_NO_RECIPE_KEYS = ("output_dir", "num_workers", "device", "pretrained_weights")


@dataclass(frozen=True)
class RunFacts:
    """What a run's files tell; None or empty where they tell nothing."""

    name: str | None = None
    step: int | None = None  # of these weights
    recipe: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int | None = None
    segments: Sequence[Mapping[str, Any]] = ()
    tunings: Sequence[Mapping[str, Any]] = ()
    best: Mapping[str, Any] = field(default_factory=dict)
    last_step: int | None = None
    samples_skipped: int | None = None


def facts_of(run: Run, step: int | None) -> RunFacts:
    """Files that are missing or damaged are passed over: the card says what is unknown."""
    metrics = JsonLines(run.metrics).read()
    last = metrics[-1] if metrics else {}
    data = _json(run.data)
    segments, best = _json(run.directory / "provenance.json"), _json(run.checkpoints / "best.json")
    return RunFacts(
        name=run.name,
        step=step,
        recipe=_recipe(run.recipe),
        num_samples=data.get("samples") if isinstance(data, dict) else None,
        segments=segments if isinstance(segments, list) else (),
        tunings=JsonLines(run.tuning).read(),
        best=best if isinstance(best, dict) else {},
        last_step=last.get("step"),
        samples_skipped=last.get("samples_skipped"),
    )


def model_card(target: str, folder: str, model: Pretrained, written: Written, verdict: Verdict, facts: RunFacts) -> str:
    """README.md. `folder`: what the folder is called."""
    parts = [
        _front_matter(target),
        f"# {facts.name or folder}\n\n{_what(model, written)}",
        _section("Load", f"{_loading(folder, written)}\n\n{_input_and_proof(model, written, verdict)}"),
        _section("Training", _bullets(_training(facts))),
        _section("Tuning", _tuning(facts)),
        _section("Not known", _bullets(_unknown(facts))),
    ]
    if facts.recipe:
        recipe = yaml.safe_dump(shown_recipe(facts.recipe), sort_keys=False)
        parts.append(_section("Recipe", f"As the run used it; folders are left out of names.\n\n```yaml\n{recipe}```"))
    return "\n\n".join(parts) + "\n"


def shown_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing of the weights, and without the folders of whoever trained them."""
    return {
        group: _without_folders(value) for group, value in recipe.items() if group not in _NOT_SHOWN and value != {}
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items() if key not in _NO_RECIPE_KEYS}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _front_matter(target: str) -> str:
    library = f"library_name: {_LIBRARIES[target]}\n" if target in _LIBRARIES else ""
    return f"---\n{library}pipeline_tag: image-feature-extraction\ntags: [pathology, histopathology, vision]\n---"


def _what(model: Pretrained, written: Written) -> str:
    vit, student = model.vit, model.student
    millions = sum(parameter.numel() for parameter in vit.parameters()) / 1e6
    reads = (
        f"reads patch features {student.feature_width} wide" if model.reads_features else f"{vit.patch_size} px patches"
    )
    registers = f", {vit.num_register_tokens} registers" if vit.num_register_tokens else ""
    side = vit.learned_grid
    return (
        f"A vision transformer for pathology: {vit.width} wide, {len(vit.blocks)} blocks, {reads}{registers}, "
        f"{millions:.1f} million parameters in fp32. Its positions were learned for {side} x {side} patches. "
        "The backbone alone: without the heads of its pretraining."
    )


def _loading(folder: str, written: Written) -> str:
    return f"```python\nFOLDER = {json.dumps(folder)}\n{written.loading}\n```"


def _input_and_proof(model: Pretrained, written: Written, verdict: Verdict) -> str:
    if model.reads_features:
        grids = f"`images`: float [B, {model.student.feature_width}, rows, columns], grids of patch features."
        return _bullets([grids, f"This export was {verdict.in_words()}.", *written.notes])
    size = (
        f"any whole number of patches, {written.image_size} px best" if written.any_size else f"{written.image_size} px"
    )
    pixels = f"RGB in 0..1, then minus {IMAGENET_MEAN}, by {IMAGENET_STD} (ImageNet's mean and standard deviation)"
    lines = [f"`images`: float [B, 3, side, side], side {size}; {pixels}.", f"This export was {verdict.in_words()}."]
    return _bullets([*lines, *written.notes])


def _training(facts: RunFacts) -> Iterator[str]:
    recipe = facts.recipe
    if recipe:
        train = recipe.get("train") or {}
        data = _without_folders(train.get("dataset_path"))
        counted = f", {facts.num_samples:,} samples" if facts.num_samples is not None else ""
        yield f"Method {recipe.get('method', 'unknown')}; data `{data}`{counted}"
        yield f"Global batch {train.get('global_batch_size') or 'unknown'}, seed {train.get('seed', 'unknown')}"
    if facts.samples_skipped:
        yield f"{facts.samples_skipped:,} samples could not be decoded and were replaced by neighbours"
    steps = f"Weights of step {facts.step:,}" if facts.step is not None else "Weights of an unknown step"
    yield steps + (f"; the run has logged up to step {facts.last_step:,}" if facts.last_step is not None else "")
    if pretrained := (recipe.get("student") or {}).get("pretrained_weights"):
        yield f"Begun from the weights `{_without_folders(pretrained)}`"
    yield from _provenance(facts.segments)


def _provenance(segments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line for neighbours that ran the same code on as many ranks."""
    told: list[tuple[str, list[int]]] = []
    for segment in segments:
        commit = f"commit {segment['commit'][:12]}" if segment.get("commit") else "an unknown commit"
        changed = " with uncommitted changes" if segment.get("diff") else ""
        versions = segment.get("versions") or {}
        of = (
            ", ".join(f"{name} {versions[name]}" for name in ("pathfm", "torch") if versions.get(name))
            or "unknown versions"
        )
        ranks = segment.get("ranks")
        words = f"{commit}{changed} ({of}) on {ranks or 'an unknown number of'} {'rank' if ranks == 1 else 'ranks'}"
        if not told or told[-1][0] != words:
            told.append((words, []))
        if segment.get("from_step") is not None:
            told[-1][1].append(segment["from_step"])
    for words, begun in told:
        yield f"Ran {words}" + (f", started at step {', '.join(f'{step:,}' for step in begun)}" if begun else "")


def _tuning(facts: RunFacts) -> str:
    if not facts.tunings:
        return "This run was not tuned: nothing in its files says how good its features are."
    best = next((line for line in facts.tunings if line.get("step") == facts.best.get("step")), None)
    lines = {"last": facts.tunings[-1], **({"best": best} if best else {})}
    metrics = sorted(
        {
            name
            for line in lines.values()
            for name in line.get("teacher") or {}
            if name.startswith(("acc_", "balanced_acc_", "auc_"))
        },
        key=_by_number,
    )
    rows = [["", "step", *metrics], ["---"] * (2 + len(metrics))]
    rows += [
        [name, f"{line.get('step'):,}", *(_number(line, metric) for metric in metrics)] for name, line in lines.items()
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    by = (
        f" The best is so by {facts.best.get('metric')} of the teacher."
        if best
        else " Which tuning is the best is unknown."
    )
    these = (
        " None of them is of these weights." if facts.step not in [line.get("step") for line in lines.values()] else ""
    )
    return (
        f"k nearest neighbours of the teacher's [CLS], with 95 % bootstrap intervals over {_how_many(lines['last'])}. "
        f"Tiles of one slide are not independent, so the true intervals are wider.{by}{these}\n\n{table}"
    )


def _unknown(facts: RunFacts) -> Iterator[str]:
    yield "Licence and terms of the weights and of the data: whoever publishes them must state both."
    yield "Tissues, stains, scanners and magnification of the data, and whether evaluation sets share patients with it."
    but = " but the tuning above" if facts.tunings else ""
    yield f"Performance on any task{but}; nothing here is validated for clinical use."
    if not facts.segments:
        yield "The code and hardware of the training: there is no provenance.json."
    if not facts.recipe:
        yield "The recipe: the file lay in no run's directory."
    elif facts.num_samples is None:
        yield "How many samples it was trained on: there is no data.json."


def _how_many(line: Mapping[str, Any]) -> str:
    test, query = line.get("test") or {}, line.get("query") or {}
    if not test.get("samples"):
        return "an unknown number of test samples"
    from_query = f", {query['samples']:,} labelled ones to vote" if query.get("samples") else ""
    return f"{test['samples']:,} test samples{from_query}"


def _number(line: Mapping[str, Any], metric: str) -> str:
    value = (line.get("teacher") or {}).get(metric)
    if value is None:
        return "-"
    interval = ((line.get("intervals") or {}).get("teacher") or {}).get(metric)
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _by_number(metric: str) -> tuple[str, list[int]]:
    kind = re.match(r"\D*", metric)
    return (kind[0] if kind else "", [int(number) for number in re.findall(r"\d+", metric)])


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _bullets(lines: Sequence[str] | Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _recipe(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
