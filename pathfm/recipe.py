"""The whole run as one frozen tree: what to train. The same on every machine; reads the ancestors' YAML too."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from pathfm.augment.config import AugmentConfig, CropsConfig, patches_per_side, resolve
from pathfm.checkpoint.config import CheckpointConfig
from pathfm.config import Layer, Section, build, differences, find_file, overrides_layer, read_layer
from pathfm.data.config import DataConfig
from pathfm.errors import UserError
from pathfm.models.config import StudentConfig
from pathfm.parallel.config import ParallelConfig
from pathfm.ssl.config import DinoConfig, IbotConfig, MethodName, TeacherConfig
from pathfm.track.config import WandbConfig
from pathfm.training.config import OptimConfig, TrainConfig, TuneConfig

# Groups and keys that may differ when a run is continued: where the data lie (that they are the same is checked by
# content), how fast it goes, what is reported and when it gives up.
_NOT_IDENTITY = (
    "train.dataset_path",
    "data.corrupt_samples",
    "data.max_neighbours",
    "optim.max_skipped_steps",
    "optim.max_roll_backs",
    "train.micro_batch_size",
    "train.stall_after_s",
    "train.lost_after_s",
    "train.examine",
    "train.num_workers",
    "train.device",
    "train.deterministic",
    "train.log_every_steps",
    "train.output_dir",
    "student.attention",
    "student.pretrained_weights",
    "student.pretrained_allow",
    "student.block_chunks",
    "data.prefetch_batches",
    "augment.device",
    "parallel.",
    "checkpoint.",
    "tune.",
    "wandb.",
)


class Recipe(Section):
    """Every group of settings. The defaults are those of the DINOv2 family; `read_recipe` knows those of DINO."""

    method: MethodName = "dinov2"
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    dino: DinoConfig = DinoConfig()
    ibot: IbotConfig = IbotConfig()
    optim: OptimConfig = OptimConfig()
    crops: CropsConfig = CropsConfig()
    augment: AugmentConfig = AugmentConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _dino_masks_nothing(self) -> "Recipe":
        if self.method == "dino" and (self.ibot.loss_weight or self.ibot.mask_sample_probability):
            raise ValueError("method dino has no loss on masked patches; leave 'ibot' out, or take method: dinov2")
        return self

    @model_validator(mode="after")
    def _crops_are_whole_patches(self) -> "Recipe":
        for name in ("global_crops_size", "local_crops_size"):
            patches_per_side(getattr(self.crops, name), self.student.patch_size, f"crops.{name}")
        patches_per_side(self.tile_size, self.student.patch_size, "tune.tile_size")
        return self

    @model_validator(mode="after")
    def _tuning_is_of_tiles(self) -> "Recipe":
        if self.tune.is_on and self.student.feature_width is not None:
            raise ValueError("a network that reads features of regions cannot be tuned on tiles; leave 'tune' out")
        return self

    @property
    def tile_size(self) -> int:
        """Side in px at which tuning sees tiles."""
        return self.tune.tile_size or self.crops.global_crops_size


# What DINO's default recipe (arXiv 2104.14294, section 3.2, and its code) has otherwise than DINOv2's. Both have 100
# epochs, ten of warm-up, and one in which the prototypes stay.
DEFAULTS_OF_DINO = Layer(
    "the defaults of method dino",
    {
        "dino": {"norm_last_layer": True, "koleo_loss_weight": 0.0},
        "ibot": {"loss_weight": 0.0, "mask_sample_probability": 0.0},
        "student": {
            "arch": "vit_small",
            "patch_size": 16,
            "drop_path_rate": 0.1,
            "drop_path_uniform": False,
            "layerscale": 0.0,
            "interpolate_offset": 0.0,  # as the ancestor's code; the public one has DINOv2's 0.1
        },
        "teacher": {"momentum_teacher": 0.996, "teacher_temp": 0.04, "warmup_teacher_temp_pct": 0.0},
        "optim": {
            "base_lr": 5e-4,
            "scaling_rule": "linear_wrt_256",
            "clip_grad_of": "parameter",
            "patch_embed_lr_mult": 1.0,
            "layerwise_decay": 1.0,
        },
        "crops": {"global_crops_scale": [0.4, 1.0], "local_crops_scale": [0.05, 0.4]},
    },
)


@dataclass(frozen=True)
class ReadRecipe:
    """A recipe and what was translated on the way to it."""

    recipe: Recipe
    notes: tuple[str, ...]


def read_recipe(path: Path | None, overrides: Sequence[str] = ()) -> ReadRecipe:
    """Defaults < the file < the overrides. Raises `UserError`, one line, for whatever is wrong."""
    layers = [*([read_layer(path)] if path else []), overrides_layer(overrides)]
    notes: list[str] = []
    epochs = _epochs(layers)
    layers = [_translate(layer, epochs, notes) for layer in layers]
    defaults = Layer("the defaults", Recipe().model_dump(mode="json"))  # so that ${group.key} may refer to them
    of_method = [DEFAULTS_OF_DINO] if _method(layers) == "dino" else []
    return ReadRecipe(build(Recipe, [defaults, *of_method, *layers]), tuple(notes))


def written_out(recipe: Recipe) -> Recipe:
    """The same recipe with every number of its presets, so that a preset that changes one day leaves it as it was."""
    numbers = resolve(recipe.augment).model_dump()
    return recipe.model_copy(update={"augment": recipe.augment.model_copy(update=numbers)})


def find_config(name: str, directory: Path) -> Path:
    """`name` is a path, or the stem of a YAML in `directory`. Raises `UserError` with what there is."""
    return find_file(name, directory, "recipe")


def changes_of_identity(old: Recipe, new: Recipe) -> list[str]:
    """What differs between a run's recipe and the one it is continued with, and may not."""
    return [
        f"{key}: {before} -> {after}"
        for key, before, after in differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
        if not key.startswith(_NOT_IDENTITY)
    ]


# ---- the ancestors' keys. A rule takes (value, epochs) and gives (new key, new value), or a reason why the key goes.

_Rule = Callable[[Any, float], tuple[str, Any] | str]


def _same_meaning(key: str) -> _Rule:
    return lambda value, epochs: (key, value)


def _epochs_to_fraction(key: str) -> _Rule:
    """A value that is no number is handed on as it is: the new key's validation names it."""
    return lambda value, epochs: (key, value / epochs if isinstance(value, int | float) else value)


def _no_effect(reason: str, harmless: Callable[[Any], bool] = lambda value: True) -> _Rule:
    def rule(value: Any, epochs: float) -> tuple[str, Any] | str:
        if not harmless(value):
            raise UserError(reason)
        return reason

    return rule


def _is_empty(value: Any) -> bool:
    return value in (None, "", 0, [], {})


_RULES: dict[str, _Rule] = {
    "train.save_frequency": _same_meaning("checkpoint.every_epochs"),
    "train.OFFICIAL_EPOCH_LENGTH": _same_meaning("train.epoch_length"),
    "optim.warmup_epochs": _epochs_to_fraction("optim.warmup_pct"),
    "optim.freeze_last_layer_epochs": _epochs_to_fraction("optim.freeze_last_layer_pct"),
    "teacher.warmup_teacher_temp_epochs": _epochs_to_fraction("teacher.warmup_teacher_temp_pct"),
    "optim.max_iter": _same_meaning("optim.total_steps"),
    "optim.lr": _no_effect("it was always computed from optim.base_lr and the batch", _is_empty),
    "train.cache_dataset": _no_effect("tiles are read through the operating system's cache"),
    "train.saveckp_freq": _no_effect("no code ever read it; see checkpoint.every_epochs"),
    "compute_precision": _no_effect("precision is train.precision: bf16 or fp32"),
    "MODEL": _no_effect("MODEL.WEIGHTS is not read when training starts from nothing", lambda v: _is_empty(v) or
                        (isinstance(v, dict) and all(map(_is_empty, v.values())))),
    "evaluation": _no_effect("finished weights are judged by 'pathfm evaluate', running ones by tune.*"),
    "wandb.dir": _no_effect("W&B files lie in the run directory"),
    "tune.tune_every": _same_meaning("tune.tune_every_pct"),
    "tune.early_stopping.min_epoch": _epochs_to_fraction("tune.early_stopping.min_pct"),
    "tune.early_stopping.min_epoch_pct": _same_meaning("tune.early_stopping.min_pct"),
    "tune.early_stopping.min_max": _no_effect(
        "every number of tuning is the better the larger it is; set tune.early_stopping.min_max to max",
        lambda v: v in (None, "max"),
    ),
    "tune.early_stopping.patience_pct": _no_effect(
        "tune.early_stopping.patience_pct was a share of the epochs that counted tunings; give "
        "tune.early_stopping.patience, the number of tunings without an improvement", _is_empty
    ),
}  # fmt: skip


def _translate(layer: Layer, epochs: float, notes: list[str]) -> Layer:
    """The layer with old keys renamed or dropped; each gets one note."""
    tree = deepcopy(layer.tree)
    for old, rule in _RULES.items():
        *groups, name = old.split(".")
        holder = _group_at(tree, groups)
        if not isinstance(holder, dict) or name not in holder:
            continue
        result = rule(holder.pop(name), epochs)
        if isinstance(result, str):
            notes.append(f"{layer.source}: {old} is passed over: {result}")
            continue
        *new_groups, new_key = result[0].split(".")
        target = _group_at(tree, new_groups, make=True)
        if not isinstance(target, dict):
            raise UserError(f"{layer.source}: {'.'.join(new_groups)} is a group of keys, not {target!r}")
        if new_key in target:
            raise UserError(f"{layer.source}: {old} is the old name of {result[0]}; give one of them")
        target[new_key] = result[1]
        notes.append(f"{layer.source}: {old} is read as {result[0]}={result[1]}")
    return Layer(layer.source, tree)


def _group_at(tree: Any, groups: Sequence[str], *, make: bool = False) -> Any:
    """What stands at a key of several names; None where there is nothing, unless it is to be made."""
    for group in groups:
        if not isinstance(tree, dict):
            return tree if make else None
        tree = tree.setdefault(group, {}) if make else tree.get(group)
    return tree


def _method(layers: Sequence[Layer]) -> Any:
    """What the layers ask for, the last first; what cannot be read is left to the validation."""
    return next((layer.tree["method"] for layer in reversed(layers) if "method" in layer.tree), None)


def _epochs(layers: Sequence[Layer]) -> float:
    """The number of epochs that the layers ask for; what cannot be read is left to the validation."""
    for layer in reversed(layers):
        optim = layer.tree.get("optim")
        if isinstance(optim, dict) and isinstance(epochs := optim.get("epochs"), int | float) and epochs > 0:
            return epochs
    return OptimConfig().epochs
