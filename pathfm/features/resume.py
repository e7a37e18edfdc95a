"""How an extraction begins, or goes on where it was left: never mixed with another, never over what is not its own."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pathfm.errors import UserError
from pathfm.features.blocks import Blocks
from pathfm.files import remove_leftovers, write_json
from pathfm.lifecycle.run import Run
from pathfm.log import get_logger

_log = get_logger(__name__)


def begin_or_go_on(
    manifest: Path, blocks: Blocks, identity: Mapping[str, Any], before_first: Callable[[], None], stack: ExitStack
) -> list[int] | None:
    """The blocks that are missing, or None when all is done. The folder is held for as long as `stack` is open.

    `manifest`: where an extraction that is done says what it is of. `identity`: what an extraction must share with one
    that goes on with it. `before_first`: what is looked at before anything is written.
    Raises `UserError` when the folder holds another extraction, or another process has it.
    """
    folder = manifest.parent
    stack.enter_context(Run(folder).claimed())
    remove_leftovers(folder)
    remove_leftovers(blocks.folder)
    if (done := read_manifest(manifest)) is not None:
        _demand_same(done.get("identity", {}), identity, folder)
        shutil.rmtree(blocks.folder, ignore_errors=True)
        return None
    begun = read_manifest(blocks.folder / manifest.name)
    if begun is None:
        before_first()
        write_json(blocks.folder / manifest.name, identity)
    else:
        _demand_same(begun, identity, folder)
    missing = blocks.missing()
    if len(missing) < len(blocks):
        _log.info("%s: %d of %d blocks are there; going on", folder, len(blocks) - len(missing), len(blocks))
    return missing


def demand_free(manifest: Path, *files: Path) -> None:
    """Nothing that is there is written over, but by an extraction that began it."""
    if there := [path for path in files if path.exists()]:
        raise UserError(f"{there[0]} is there, and no {manifest.name} says what it is of; choose another folder")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); choose another folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no manifest of an extraction; choose another folder")
    return content


def _demand_same(begun: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    if different := [key for key in now if begun.get(key) != now[key]]:
        values = "; ".join(f"{key}: {begun.get(key)} then, {now[key]} now" for key in different[:3])
        raise UserError(f"{folder} holds another extraction ({values}); choose another folder")
