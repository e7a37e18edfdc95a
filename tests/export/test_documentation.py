"""What docs/use-your-weights.md says is run as it stands there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.__main__ import main
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import load_backbone
from tests.features.small import saved_teacher

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "use-your-weights.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^pathfm export .+$", PAGE, re.M)
IMAGES, *SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
LIBRARIES = {"timm": "timm", "huggingface": "transformers", "hub": "torch", "onnx": "onnxruntime"}


def target_of(snippet: str) -> str:
    return re.search(r"exports/(\w+)_teacher_best", snippet)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run `mine`, a tile, and a checkout called `pathfm`."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    run = folder / "runs" / "mine"
    vit = build_backbone(StudentConfig(arch="vit4k_xs", patch_size=14), 112, drop_path=False)
    saved_teacher(run / "exports" / "teacher_best.pth", vit)
    (run / "recipe.yaml").write_text("student: {arch: vit4k_xs, patch_size: 14}\n")
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(folder / "tile.png")
    (folder / "pathfm").symlink_to(REPO)
    return folder


def test_the_page_shows_every_library_once():
    assert [target_of(snippet) for snippet in SNIPPETS] == list(LIBRARIES)
    assert sorted(shlex.split(command)[4] for command in COMMANDS) == sorted(LIBRARIES)
    assert all(len(snippet.splitlines()) <= 7 for snippet in SNIPPETS)  # imports and a blank line; five to load and run


@pytest.mark.parametrize("snippet", SNIPPETS, ids=target_of)
def test_the_commands_and_snippets_of_the_page_give_the_features_of_the_run(snippet, place, monkeypatch):
    target = target_of(snippet)
    for library in (LIBRARIES[target], *(["onnxscript"] if target == "onnx" else [])):
        pytest.importorskip(library)
    monkeypatch.chdir(place)
    command = next(command for command in COMMANDS if f"--to {target}" in command)
    assert main(shlex.split(command)[1:]) == 0
    names: dict[str, object] = {}
    with torch.no_grad():
        exec(IMAGES, names)
        exec(snippet, names)
        expected = load_backbone(Path("runs/mine/exports/teacher_best.pth")).vit([names["images"]])[0]
    for found, ours in zip((names["cls"], names["patches"]), (expected.cls, expected.patches), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), ours, atol=1e-4, rtol=0)
