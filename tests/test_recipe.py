from pathlib import Path

import pytest

from pathfm.config import build, read_layer, to_yaml
from pathfm.errors import UserError
from pathfm.recipe import Recipe, changes_of_identity, find_config, read_recipe, written_out

CONFIGS = Path(__file__).parents[1] / "configs"


def recipe_of(tmp_path: Path, text: str, *overrides: str):
    (tmp_path / "old.yaml").write_text(text)
    return read_recipe(tmp_path / "old.yaml", overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(path: Path, tmp_path: Path):
    read = read_recipe(path)
    assert read.notes == ()
    (tmp_path / "resolved.yaml").write_text(to_yaml(read.recipe))
    assert build(Recipe, [read_layer(tmp_path / "resolved.yaml")]) == read.recipe


def test_vitl14_is_what_the_ancestor_calls_vitl14():
    recipe = read_recipe(CONFIGS / "vitl14.yaml").recipe
    assert (recipe.student.arch, recipe.student.patch_size, recipe.student.drop_path_rate) == ("vit_large", 14, 0.4)
    assert (recipe.dino.head_n_prototypes, recipe.dino.head_bottleneck_dim) == (131072, 384)
    assert (recipe.ibot.separate_head, recipe.ibot.head_n_prototypes) == (True, 131072)
    assert (recipe.train.batch_size_per_gpu, recipe.train.centering) == (128, "sinkhorn_knopp")
    assert (recipe.teacher.momentum_teacher, recipe.optim.weight_decay_end) == (0.994, 0.2)
    assert (recipe.optim.base_lr, recipe.optim.layerwise_decay, recipe.optim.warmup_pct) == (2e-3, 1.0, 0.1)
    assert recipe.crops.local_crops_size == 98


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults():
    recipe = read_recipe(CONFIGS / "vits14.yaml", ["optim.epochs=3"]).recipe
    assert (recipe.optim.epochs, recipe.student.arch, recipe.optim.base_lr) == (3, "vit_small", 4e-3)


def test_old_keys_are_translated_with_a_note(tmp_path: Path):
    read = recipe_of(
        tmp_path,
        "train: {save_frequency: 0.1, cache_dataset: true, OFFICIAL_EPOCH_LENGTH: 1250}\n"
        "optim: {epochs: 500, warmup_epochs: 80, lr: 0.0, freeze_last_layer_epochs: 5}\n"
        "teacher: {warmup_teacher_temp_epochs: 150}\n"
        "student: {pretrained_weights: ''}\n"
        "compute_precision: {grad_scaler: true}\n"
        "tune: {tune_every: 0.5, query_dataset_path: null, knn: {nb_knn: 20},\n"
        "       early_stopping: {min_max: max, min_epoch: 100, patience: 7}}\n"
        "wandb: {dir: /home/user, tags: ['${student.arch}']}\n"
        "evaluation: {eval_period_iterations: 12500}\n",
    )
    recipe = read.recipe
    assert recipe.checkpoint.every_epochs == 0.1
    assert recipe.train.epoch_length == 1250
    assert recipe.optim.warmup_pct == pytest.approx(0.16)
    assert recipe.optim.freeze_last_layer_pct == pytest.approx(0.01)
    assert recipe.teacher.warmup_teacher_temp_pct == pytest.approx(0.3)
    assert recipe.tune.tune_every_pct == 0.5
    assert recipe.tune.knn.nb_knn == (20,)
    assert (recipe.tune.early_stopping.min_pct, recipe.tune.early_stopping.patience) == (0.2, 7)
    assert not recipe.tune.is_on
    assert recipe.student.pretrained_weights is None
    assert len(read.notes) == 13
    assert any("optim.warmup_epochs is read as optim.warmup_pct=0.16" in note for note in read.notes)


def test_epochs_on_the_command_line_count_when_old_keys_are_translated(tmp_path: Path):
    read = recipe_of(tmp_path, "optim: {epochs: 500, warmup_epochs: 10}\n", "optim.epochs=100")
    assert read.recipe.optim.warmup_pct == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tune", "says"),
    [
        ("{query_dataset_path: 'KNN:root=/d:split=query'}", "tuning needs both tune.query_dataset_path and"),
        ("{early_stopping: {enable: true}}", "tune.early_stopping.enable needs tuning in the run"),
        ("{early_stopping: {min_max: min}}", "every number of tuning is the better the larger it is"),
        ("{early_stopping: {patience_pct: 0.2}}", "give tune.early_stopping.patience, the number of tunings"),
        ("{knn: {n_per_class_list: [0]}}", r"numbers of samples per class, -1 meaning all of them, not \[0\]"),
        ("{tile_size: 100}", "tune.tile_size=100 is not a multiple of the patch size 16; use 96 or 112"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused(tmp_path: Path, tune: str, says: str):
    with pytest.raises(UserError, match=says):
        recipe_of(tmp_path, f"tune: {tune}\nstudent: {{patch_size: 16}}\n")


def test_tiles_are_seen_at_the_size_of_global_crops_unless_another_is_given(tmp_path: Path):
    assert recipe_of(tmp_path, "crops: {global_crops_size: 224}\n").recipe.tile_size == 224
    assert recipe_of(tmp_path, "tune: {tile_size: 112}\n").recipe.tile_size == 112


def test_an_old_and_a_new_name_together_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"optim\.warmup_epochs is the old name of optim\.warmup_pct"):
        recipe_of(tmp_path, "optim: {warmup_epochs: 1, warmup_pct: 0.1}\n")


def test_a_key_that_nobody_reads_is_refused():
    with pytest.raises(UserError, match=r"no key 'optim.warmup_pctt'; the nearest known key is 'optim.warmup_pct'"):
        read_recipe(CONFIGS / "vits14.yaml", ["optim.warmup_pctt=0.1"])


def test_crops_that_are_not_whole_patches_are_refused():
    with pytest.raises(
        UserError, match=r"crops\.local_crops_size=96 is not a multiple of the patch size 14; use 84 or 98"
    ):
        read_recipe(CONFIGS / "vits14.yaml", ["crops.local_crops_size=96"])


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match=r"there is no recipe 'vitl15' in .*vitl14"):
        find_config("vitl15", CONFIGS)
    assert find_config("vitl14", CONFIGS) == CONFIGS / "vitl14.yaml"
    assert find_config(str(CONFIGS / "demo.yaml"), Path("/nowhere")) == CONFIGS / "demo.yaml"


def test_speed_and_reporting_are_not_part_of_a_runs_identity():
    demo = CONFIGS / "vits14.yaml"
    old = read_recipe(demo).recipe
    faster = ["train.num_workers=7", "wandb.enable=true", "augment.device=auto", "data.max_neighbours=99"]
    assert changes_of_identity(old, read_recipe(demo, faster).recipe) == []
    changed = read_recipe(demo, ["optim.base_lr=0.1"]).recipe
    assert changes_of_identity(old, changed) == ["optim.base_lr: 0.004 -> 0.1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {warmup_epochs: ten}", r"old.yaml: optim.warmup_pct: .*'ten'"),
        ("optim: {warmup_epochs: null}", r"old.yaml: optim.warmup_pct: .*None"),
        ("train: {save_frequency: 1}\ncheckpoint: 3", r"old.yaml: checkpoint is a group of keys, not 3"),
        ("crops: [1, 2]", r"old.yaml: "),
        ("optim: {epochs: '${nope}'}", r"old.yaml: Interpolation key 'nope' not found"),
    ],
)
def test_values_of_the_wrong_kind_are_one_line_that_names_the_file(tmp_path: Path, text: str, said: str):
    with pytest.raises(UserError, match=said) as error:
        recipe_of(tmp_path, text)
    assert "\n" not in str(error.value)
    assert "the defaults" not in str(error.value)


def test_a_written_out_recipe_holds_its_presets_numbers_and_reads_as_itself():
    recipe = Recipe.model_validate({"augment": {"preset": "pathology", "blur_inverted": True, "device": "auto"}})
    written = written_out(recipe)
    assert written.augment.jitter_hue == 0.02
    assert (written.augment.blur_inverted, written.augment.device) == (True, "auto")
    assert written_out(written) == written


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "patch",
            {
                "method": "dino",
                "student.arch": "vit_small",
                "student.patch_size": 16,
                "student.drop_path_rate": 0.1,
                "dino.head_n_prototypes": 65536,
                "dino.norm_last_layer": False,
                "teacher.momentum_teacher": 0.996,
                "teacher.final_momentum_teacher": 1.0,
                "teacher.warmup_teacher_temp": 0.04,
                "teacher.teacher_temp": 0.04,
                "optim.epochs": 50,
                "optim.base_lr": 5e-4,
                "optim.scaling_rule": "linear_wrt_256",
                "optim.warmup_pct": 3 / 50,
                "optim.freeze_last_layer_pct": 1 / 50,
                "optim.weight_decay": 0.04,
                "optim.weight_decay_end": 0.4,
                "optim.clip_grad": 3.0,
                "crops.global_crops_scale": (0.4, 1.0),
                "crops.local_crops_scale": (0.05, 0.4),
                "crops.local_crops_number": 8,
                "crops.global_crops_size": 224,
                "crops.local_crops_size": 96,
            },
        ),
        (
            "region",
            {
                "method": "dino",
                "student.arch": "vit4k_xs",
                "student.feature_width": 384,
                "crops.global_crops_size": 14,
                "crops.local_crops_size": 6,
                "crops.local_crops_number": 8,
                "optim.epochs": 125,
                "optim.warmup_pct": 10 / 125,
                "optim.freeze_last_layer_pct": 1 / 125,
            },
        ),
    ],
)
def test_dinos_recipes_are_what_their_papers_and_ancestors_say(name: str, values: dict[str, object]) -> None:
    recipe = read_recipe(Path(__file__).parents[1] / "configs" / f"{name}.yaml").recipe
    for key, value in values.items():
        group, _, field = key.partition(".")
        found = getattr(getattr(recipe, group), field) if field else getattr(recipe, group)
        assert found == value, key


def test_dino_has_defaults_of_its_own_and_the_command_line_goes_before_them() -> None:
    assert read_recipe(None, ["method=dino"]).recipe.optim.base_lr == 5e-4
    assert read_recipe(None, ["method=dino", "optim.base_lr=1e-3"]).recipe.optim.base_lr == 1e-3
    assert read_recipe(None, ["method=dinov2"]).recipe == Recipe()


def test_dino_masks_nothing() -> None:
    with pytest.raises(UserError, match="method dino has no loss on masked patches"):
        read_recipe(None, ["method=dino", "ibot.loss_weight=1"])


def test_what_a_run_wrote_down_says_all_by_itself(tmp_path: Path) -> None:
    recipe = read_recipe(None, ["method=dino"]).recipe
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert read_recipe(tmp_path / "recipe.yaml").recipe == recipe
