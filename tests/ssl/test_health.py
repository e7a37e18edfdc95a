import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pathfm.ssl.health import Probe, Seen, effective_rank, nearest_distance
from tests.several_ranks import on_ranks
from tests.ssl.small import random_batch, small_dinov2

G, B, K, D = 2, 6, 16, 12


def seen(seed: int = 0, samples: int = B) -> Seen:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Seen(torch.softmax(2 * drawn(G, samples, K), -1), drawn(G * samples, D), drawn(G, samples, K))


def read(*parts: Seen) -> dict[str, float]:
    probe = Probe()
    for part in parts:
        probe.look(part)
    return {name.removeprefix("health/"): value.item() for name, value in probe.read().items()}


def entropy(shares: np.ndarray) -> float:
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def test_entropies_and_agreement_are_those_of_the_definitions():
    part = seen()
    found = read(part)
    targets = part.targets.double().numpy()
    answers = torch.softmax(part.student_logits.double() / 0.1, -1).numpy()
    assert found["teacher_entropy"] == pytest.approx(
        np.mean([entropy(row) for row in targets.reshape(-1, K)]), rel=1e-5
    )
    assert found["student_entropy"] == pytest.approx(
        np.mean([entropy(row) for row in answers.reshape(-1, K)]), rel=1e-4
    )
    assert found["prototype_entropy"] == pytest.approx(entropy(targets.mean((0, 1))), rel=1e-5)
    named, answered = targets.argmax(-1), answers.argmax(-1)
    assert found["agreement"] == pytest.approx(np.mean([answered[0] == named[1], answered[1] == named[0]]))


def test_one_prototype_for_all_is_no_entropy_and_all_alike_is_log_k():
    one = torch.zeros(G, B, K)
    one[..., 3] = 1
    collapsed = read(Seen(one, seen().teacher_cls, one))
    assert collapsed["prototype_entropy"] == pytest.approx(0, abs=1e-6)
    assert collapsed["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert collapsed["agreement"] == 1
    uniform = read(Seen(torch.full((G, B, K), 1 / K), seen().teacher_cls, torch.zeros(G, B, K)))
    assert uniform["prototype_entropy"] == pytest.approx(math.log(K), rel=1e-5)
    assert uniform["student_entropy"] == pytest.approx(math.log(K), rel=1e-5)


def test_the_rank_is_the_number_of_directions_that_are_used_alike():
    axes = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1)))[0]
    for used in (1, 3, 40):
        rows = axes[:used].repeat(4, 1)
        assert effective_rank(rows).item() == pytest.approx(used, rel=1e-3)
    assert effective_rank(torch.full((64, 40), 0.3)).item() == pytest.approx(1, abs=1e-3)


def test_the_rank_is_that_of_singular_values():
    rows = torch.randn(30, 20, generator=torch.Generator().manual_seed(2)) ** 3
    singular = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    expected = math.exp(entropy(singular / singular.sum()))
    assert effective_rank(rows).item() == pytest.approx(expected, rel=1e-5)
    assert effective_rank(rows.T).item() == pytest.approx(expected, rel=1e-5)


def test_features_that_are_not_finite_have_no_rank():
    assert math.isnan(effective_rank(torch.tensor([[1.0, float("nan")], [0.0, 1.0]])).item())


def test_the_nearest_distance_is_that_of_brute_force():
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    unit = functional.normalize(rows, dim=1).double()
    apart = torch.cdist(unit, unit).fill_diagonal_(9)
    assert nearest_distance(rows).item() == pytest.approx(apart.amin(1).mean().item(), rel=1e-5)
    assert nearest_distance(rows[:1]).item() == 0


def test_parts_of_a_batch_show_what_the_batch_shows():
    whole = seen(samples=2 * B)
    halves = [
        Seen(
            whole.targets[:, rows],
            whole.teacher_cls.unflatten(0, (G, -1))[:, rows].flatten(0, 1),
            whole.student_logits[:, rows],
        )
        for rows in (slice(0, B), slice(B, 2 * B))
    ]
    assert read(*halves) == pytest.approx(read(whole), rel=1e-4)


def of_this_rank() -> dict[str, float]:
    from pathfm.dist.collect import gather_rows, sum_over_ranks

    probe = Probe(sum_over_ranks, gather_rows, 2)
    probe.look(seen(torch.distributed.get_rank()))
    return {name.removeprefix("health/"): value.item() for name, value in probe.read().items()}


def test_ranks_see_the_health_of_all():
    alone = read(seen(0), seen(1))
    for found in on_ranks(2, of_this_rank):
        assert found == pytest.approx(alone, rel=1e-4)


def test_a_method_shows_its_parts_and_its_losses_stay_what_they_are():
    batch, shown = random_batch(4), []
    method = small_dinov2()
    (looked,) = method.losses_of_parts([batch], 0.05, look=shown.append)
    (unlooked,) = small_dinov2().losses_of_parts([batch], 0.05)
    assert looked.total.equal(unlooked.total)
    (part,) = shown
    assert part.targets.shape == part.student_logits.shape == (2, 4, 64)
    assert part.teacher_cls.shape == (8, 36)
    torch.testing.assert_close(part.targets.sum(-1), torch.ones(2, 4))
