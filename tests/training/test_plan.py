import pytest

from pathfm.errors import UserError
from pathfm.ssl.config import DinoConfig, TeacherConfig
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.plan import plan_training


def plan(
    samples: int | None = 1000, ranks: int = 2, optim: OptimConfig | None = None, koleo: int | None = None, **train
):
    settings = TrainConfig(**{"batch_size_per_gpu": 32, **train})
    optim = optim or OptimConfig(epochs=10)
    return plan_training(settings, optim, TeacherConfig(), DinoConfig(koleo_group_size=koleo), ranks, samples)


def test_the_batch_of_a_recipe_is_per_gpu_until_it_is_fixed():
    assert plan().global_batch_size == 64
    assert plan(global_batch_size=16).global_batch_size == 16


def test_steps_follow_from_samples_epochs_and_batch():
    found = plan()
    assert (found.epoch_length, found.total_steps) == (15, 150)
    assert plan(epoch_length=7).total_steps == 70
    assert plan(optim=OptimConfig(total_steps=33)).total_steps == 33


def test_the_learning_rate_follows_the_scaling_rule():
    assert plan(5000, ranks=32).peak_lr == 4e-3
    assert plan(5000, ranks=8).peak_lr == 2e-3
    linear = OptimConfig(base_lr=5e-4, scaling_rule="linear_wrt_256")
    assert plan(5000, ranks=16, optim=linear).peak_lr == pytest.approx(1e-3)


def test_schedules_begin_and_end_where_the_recipe_says():
    found = plan()
    first, peak, last = (found.schedules.at(step) for step in (0, 15, 149))
    assert (first.lr, first.teacher_temp, first.momentum) == (0.0, 0.04, 0.992)
    assert first.weight_decay == pytest.approx(0.04)
    assert first.last_layer_lr == 0.0
    assert peak.lr == pytest.approx(found.peak_lr)
    assert peak.last_layer_lr == peak.lr
    assert last.teacher_temp == 0.07
    assert last.lr == pytest.approx(1e-6, abs=1e-5)
    assert last.momentum == pytest.approx(1, abs=1e-4)


def test_a_batch_larger_than_an_epoch_is_refused_with_what_fits():
    with pytest.raises(UserError, match=r"global batch of 64 is larger than an epoch of 50 samples.* to 25 or less"):
        plan(samples=50)


def test_an_unknown_epoch_length_is_refused():
    with pytest.raises(UserError, match="length of an epoch is unknown"):
        plan(samples=None)


def test_koleos_groups_are_the_recipes_rank_batch_whatever_the_ranks():
    assert plan(ranks=2).koleo_group_size == 32
    assert plan(ranks=1, global_batch_size=64).koleo_group_size == 32
    assert plan(ranks=4, global_batch_size=64, koleo=8).koleo_group_size == 8


def test_koleos_groups_that_do_not_fit_the_batch_are_refused_before_the_first_step():
    with pytest.raises(UserError, match=r"batch of 64 is not a whole number of KoLeo's groups of 48 samples"):
        plan(koleo=48)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="64 cannot be shared equally by 3 ranks"):
        plan(ranks=3, global_batch_size=64)
