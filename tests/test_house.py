"""What import-linter cannot see."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pathfm"
MATHS = [
    *sorted((PACKAGE / "models").glob("*.py")),
    *sorted((PACKAGE / "augment").glob("*.py")),
    PACKAGE / "ssl" / "losses.py",
    PACKAGE / "ssl" / "targets.py",
]


@pytest.mark.parametrize("file", MATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_maths_never_sees_a_process_group(file: Path):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in imported | attributes if name.startswith("torch.distributed")]


@pytest.mark.parametrize("folder", [path.parent for path in PACKAGE.rglob("__init__.py")], ids=lambda path: path.name)
def test_importing_a_room_changes_nothing(folder: Path):
    body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    assert [type(node).__name__ for node in body] in (["Expr"], ["Expr", "Assign"])  # its line, and the version
