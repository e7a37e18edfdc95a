"""Settings: YAML and `key=value` layers merged by OmegaConf, validated by frozen pydantic sections.

Later layers win. Whatever is wrong becomes one line that names the key, the value, the file that set it
and, for a mistyped key, the nearest known one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from pathfm.errors import UserError, nearest


class Section(BaseModel):
    """Base of every group of settings: frozen, unknown keys forbidden. Lives in `config.py` beside its owner."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class Layer:
    """Settings from one place: a file or the command line."""

    source: str
    tree: dict[str, Any]


def read_layer(path: Path) -> Layer:
    """Read a YAML file. Raises `UserError` when it is missing, not YAML, or not a mapping."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines, but holds {type(tree).__name__}")
    return Layer(str(path), tree)


def find_file(name: str, directory: Path, what: str) -> Path:
    """`name` is a path, or the stem of a YAML in `directory`. Raises `UserError` with the near ones and all there are.

    `what`: what such a file is called in the message, e.g. recipe.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"there is no {what} {name}")
        return Path(name)
    if (path := directory / f"{name}.yaml").is_file():
        return path
    known = sorted(file.stem for file in directory.glob("*.yaml"))
    near = " or ".join(f"'{other}'" for other in nearest(name, known, at_most=3))
    hint = f"; did you mean {near}?" if near else ";"
    raise UserError(f"there is no {what} '{name}' in {directory}{hint} there are: {', '.join(known) or 'none'}")


def overrides_layer(overrides: Sequence[str]) -> Layer:
    """`["optim.epochs=3", ...]` as a layer. A value may itself hold '=' (data set strings do)."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(f"'{override}' is neither a known option nor key=value")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read the overrides {' '.join(overrides)}: {' '.join(str(error).split())}") from error
    return Layer("the command line", tree)


def build(model: type[SectionType], layers: Sequence[Layer]) -> SectionType:
    """Merge the layers, later over earlier, and validate them. Raises `UserError` with one line."""
    try:
        merged = OmegaConf.merge(*(OmegaConf.create(layer.tree) for layer in layers)) if layers else OmegaConf.create()
        tree = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:  # merge raises the latter two for mixed kinds
        raise UserError(f"{_sources(layers)}: {' '.join(str(error).split())}") from error
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, model, layers)) from error


def explain(error: ValidationError, model: type[BaseModel], layers: Sequence[Layer] = ()) -> str:
    """The first mistake of a validation error in one line (and how many more there are)."""
    mistakes = error.errors()
    first = min(mistakes, key=lambda mistake: mistake["type"] != "extra_forbidden")
    path = tuple(str(part) for part in first["loc"])
    key = ".".join(path)
    where = _source_of(path, layers)
    if first["type"] == "extra_forbidden":
        line = f"{where}: no key '{key}'" + _nearest(key, model)
    elif first["type"] == "missing":
        line = f"{where}: key '{key}' is required"
    else:
        line = f"{where}: {key}: {_plain_message(first['msg'])}, not {first['input']!r}"
        if first["type"] in ("value_error", "assertion_error"):  # our validators' messages name the value themselves
            line = f"{where}: " + (f"{key}: " if key else "") + _plain_message(first["msg"])
    more = len(mistakes) - 1
    return line + (f" (and {more} more mistake{'s' if more > 1 else ''})" if more else "")


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a settings tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def to_yaml(section: Section) -> str:
    """The settings as YAML that `read_layer` reads back to an equal section."""
    text: str = yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) for every leaf in which two dumped trees differ."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield prefix + key, before, after


def _nearest(key: str, model: type[BaseModel]) -> str:
    names = list(known_keys(model))
    if (same_leaf := [n for n in names if n.rpartition(".")[2] == key.rpartition(".")[2]]) and "." in key:
        candidates = same_leaf
    else:
        candidates = nearest(key, names)
    return f"; the nearest known key is '{candidates[0]}'" if candidates else ""


def _source_of(path: tuple[str, ...], layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        node: Any = layer.tree
        for part in path:
            if not isinstance(node, Mapping) or part not in node:
                break
            node = node[part]
        else:
            if path:
                return layer.source
    return _sources(layers)


def _sources(layers: Sequence[Layer]) -> str:
    """Who may have said it: every layer that says anything, but for the defaults under them all."""
    said = [layer.source for layer in layers if layer.tree]
    return " + ".join(said[1:] if len(said) > 1 else said)


def _plain_message(message: str) -> str:
    for prefix in ("Value error, ", "Assertion failed, ", "Input "):
        message = message.removeprefix(prefix)
    return message
