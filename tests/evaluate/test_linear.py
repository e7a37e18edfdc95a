"""The heads of a grid are what plain SGD makes of each alone, and the best is chosen by what was held out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from pathfm.evaluate.linear import LinearSettings, _batches, fit_linear_probe, train_heads
from pathfm.random_streams import stream

FEW = LinearSettings(learning_rates=(1e-3, 0.05, 0.5), steps=60, batch_size=16)


def _blobs(number: int, seed: int, noise: float = 1.0, width: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    centres = np.random.default_rng(0).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, number)
    features = centres[labels] + noise * rng.normal(size=(number, width))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_every_head_learns_what_torchs_sgd_with_a_cosine_would_teach_it_alone():
    features, labels = _blobs(50, seed=1)
    heads = train_heads(features, labels, 3, FEW.learning_rates, FEW, seed=4)
    for number, rate in enumerate(FEW.learning_rates):
        layer = nn.Linear(6, 3)
        layer.weight.data = torch.from_numpy(stream(4, 0, "linear head").normal(0.0, 0.01, (3, 6))).float()
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 16 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FEW.steps)
        for rows in _batches(50, FEW, seed=4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(heads.weight[number], layer.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias[number], layer.bias.data, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [5, 16, 50])
def test_batches_are_full_and_pass_over_all_samples_before_any_comes_again(number: int):
    rows = torch.cat(list(_batches(number, FEW, seed=0)))
    assert len(rows) == FEW.steps * FEW.batch_size
    for epoch in rows[: len(rows) // number * number].view(-1, number):
        assert epoch.sort().values.tolist() == list(range(number))


def test_the_same_seed_gives_the_same_bits_and_no_global_random_number_is_drawn():
    features, labels = _blobs(50, seed=1)
    before = torch.get_rng_state()
    one, again, other = (train_heads(features, labels, 3, [0.1], FEW, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.weight, again.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.get_rng_state().equal(before)


def test_features_that_tell_the_classes_are_chosen_over_those_that_do_not():
    features, labels = _blobs(200, seed=1, noise=0.5)
    noise = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    held_out = torch.arange(200) % 5 == 0
    probe = fit_linear_probe({"noise": noise, "told": features}, labels, held_out, 3, FEW, seed=0)
    assert probe.choice.features == "told"
    assert probe.choice.balanced_acc > 0.9
    test, truth = _blobs(300, seed=2, noise=0.5)
    probabilities = probe.probabilities({"told": test})
    assert probabilities.sum(1).allclose(torch.ones(300))
    assert (probabilities.argmax(1) == truth).float().mean() > 0.9


def test_the_chosen_head_learns_from_the_held_out_samples_too():
    features, labels = _blobs(60, seed=1)
    held_out = torch.arange(60) < 12
    probe = fit_linear_probe({"cls": features}, labels, held_out, 3, FEW, seed=0)
    alone = train_heads(features, labels, 3, [probe.choice.learning_rate], FEW, seed=0)
    assert torch.equal(probe.heads.weight, alone.weight)


def test_a_head_that_diverges_is_never_chosen():
    features, labels = _blobs(60, seed=1)
    settings = LinearSettings(learning_rates=(1e38, 0.1), steps=20, batch_size=16)
    probe = fit_linear_probe({"cls": features}, labels, torch.arange(60) < 12, 3, settings, seed=0)
    assert probe.choice.learning_rate == 0.1


def test_a_long_training_comes_to_what_scikit_learn_finds():
    features, labels = _blobs(300, seed=1, noise=2.0)
    settings = LinearSettings(steps=3000, batch_size=300)
    heads = train_heads(features, labels, 3, [1.0], settings, seed=0)
    model = LogisticRegression(C=1e6, max_iter=5000, tol=1e-8).fit(features.numpy(), labels.numpy())
    found = heads.logits(features)[0].softmax(-1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(features.numpy()), atol=1e-2)
