import numpy as np
import pytest
import torch
from torch.nn import functional

from pathfm.batch import normalise_crops
from pathfm.evaluate.dense.fit import Examples, FitSettings, Sight, Truth, fit, look, scaled, scaled_target
from pathfm.evaluate.dense.heads import LinearHead, Regression, Segmentation, Task
from pathfm.evaluate.dense.metrics import confusion, deviations, regression_scores, segmentation_scores
from tests.evaluate.dense.small import CPU, PATCH, hills, made, sight, squares

CLASSES = ("noise", "bright", "dark")
PLENTY = 1 << 30
SETTINGS = FitSettings(epochs=20, batch_size=4, lr=1e-2)


def _trained(
    pictures: list[Truth],
    seen: Sight,
    task: Task,
    settings: FitSettings = SETTINGS,
    *,
    use_cls: bool = False,
    room: int = PLENTY,
) -> tuple[LinearHead, list[float]]:
    examples = Examples(range(len(pictures)), pictures.__getitem__, seen, task, room)
    assert list(examples.fill()) == list(range(len(pictures)))
    head = LinearHead(seen.tokens.channels, task.outputs, use_cls=use_cls, seed=settings.seed)
    losses = list(fit(head, task, examples, settings, CPU))
    assert len(losses) == settings.steps(len(examples))
    return head, losses


@pytest.mark.parametrize(("blocks", "scales", "use_cls"), [(1, (1.0,), False), (2, (1.0, 1.5), True)])
def test_a_head_finds_squares_on_noise_in_pictures_that_it_has_not_seen(blocks, scales, use_cls):
    pictures, task, seen = made(squares, 24), Segmentation(CLASSES), sight(blocks=blocks, scales=scales)
    head, losses = _trained(pictures[:16], seen, task, use_cls=use_cls)
    assert np.mean(losses[-5:]) < losses[0] / 2
    answers = [look(head, task, seen, picture.image) for picture in pictures[16:]]
    tested = zip(pictures[16:], answers, strict=True)
    found = segmentation_scores(np.stack([confusion(one.target, said, 3) for one, said in tested]), CLASSES)
    nothing = np.stack([confusion(one.target, torch.zeros_like(one.target), 3) for one in pictures[16:]])
    assert segmentation_scores(nothing, CLASSES, resamples=0)["miou"].value < 0.3
    assert found["miou"].low > 0.5


def test_a_head_finds_heights_in_pictures_that_it_has_not_seen():
    pictures, task, seen = made(hills, 24), Regression(1.0, 5.0, outputs=64), sight()
    head, _ = _trained(pictures[:16], seen, task)
    tested = pictures[16:]
    found = regression_scores(np.stack([deviations(p.target, look(head, task, seen, p.image)) for p in tested]))
    even = regression_scores(np.stack([deviations(p.target, torch.full_like(p.target, 2.8)) for p in tested]))
    assert found["delta_1"].low > 0.8 > 0.6 > even["delta_1"].value
    assert found["rmse"].value < even["rmse"].value / 2


def test_training_is_the_same_again_whether_tokens_are_kept_or_not_and_disturbs_no_other_draws():
    pictures, task, seen = made(squares, 3), Segmentation(CLASSES), sight(size=32, stride=16)
    settings = FitSettings(epochs=2, batch_size=4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    head, losses = _trained(pictures, seen, task, settings)
    assert torch.equal(torch.get_rng_state(), before)
    for room in (PLENTY, 20_000, 0):
        again, same = _trained(pictures, seen, task, settings, room=room)
        assert same == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(again.linear.weight, head.linear.weight, rtol=1e-4, atol=1e-6)
    _, others = _trained(pictures, seen, task, FitSettings(epochs=2, batch_size=4, seed=1))
    assert others != pytest.approx(losses, rel=1e-5)


def test_the_backbone_stays_as_it_is():
    seen = sight()
    vit = seen.tokens._vit
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    _trained(made(squares, 2), seen, Segmentation(CLASSES), FitSettings(epochs=2))
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert not any(parameter.requires_grad for parameter in vit.parameters())


def _direct(head: LinearHead, task: Task, seen: Sight, image: np.ndarray) -> torch.Tensor:
    """One call for one picture of whole patches."""
    pixels = normalise_crops(torch.from_numpy(image).permute(2, 0, 1)[None])
    with torch.no_grad():
        return task.maps(head(seen.tokens(pixels)), image.shape[:2])[0]


def test_a_picture_of_exactly_one_window_is_seen_as_by_a_direct_call():
    task, seen = Segmentation(CLASSES), sight(48)
    head = LinearHead(seen.tokens.channels, 3).eval()
    image = squares(0).image
    assert torch.equal(look(head, task, seen, image), _direct(head, task, seen, image).argmax(0))


def test_a_larger_picture_is_seen_as_by_a_plain_loop_over_windows():
    task, seen = Regression(1.0, 5.0, outputs=16), sight(32, 16)
    head = LinearHead(seen.tokens.channels, 16).eval()
    image = hills(0, 40, 51).image
    whole = np.pad(image, ((0, 8), (0, 13), (0, 0)), mode="reflect")
    total, times = torch.zeros(48, 64), torch.zeros(48, 64)
    for top in (0, 16):
        for left in (0, 16, 32):
            total[top : top + 32, left : left + 32] += _direct(
                head, task, seen, whole[top : top + 32, left : left + 32]
            )[0]
            times[top : top + 32, left : left + 32] += 1
    found = look(head, task, seen, image)
    assert found.shape == (40, 51)
    torch.testing.assert_close(found, (total / times)[:40, :51], rtol=1e-4, atol=1e-4)


def test_of_several_scales_probabilities_are_averaged():
    """A window of twice the picture: at scale 2 it is the picture, at scale 1 there are mirror images around it."""
    task, seen = Segmentation(CLASSES), sight(96, scales=(1.0, 2.0))
    head = LinearHead(seen.tokens.channels, 3).eval()
    image = squares(1).image
    small = _direct(head, task, seen, np.pad(image, ((0, 48), (0, 48), (0, 0)), mode="reflect"))[:, :48, :48]
    large = _direct(head, task, seen, scaled(torch.from_numpy(image).permute(2, 0, 1), 2.0).permute(1, 2, 0).numpy())
    back = functional.interpolate(large.softmax(0)[None], (48, 48), mode="bilinear")[0]
    expected = (small.softmax(0) + back) / 2
    assert torch.equal(look(head, task, seen, image), expected.argmax(0))
    assert not torch.equal(small.argmax(0), back.argmax(0))  # or it would not matter


def test_a_scaled_mask_takes_the_nearest_pixel():
    target = torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8)
    assert torch.equal(scaled_target(target, 2.0), target.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(scaled_target(target.repeat_interleave(4, 0).repeat_interleave(4, 1), 0.25), target)
    assert scaled_target(torch.zeros(48, 48), 1.5).shape == (72, 72)


def test_windows_beyond_a_picture_teach_nothing():
    picture, task, seen = squares(0, 20, 28), Segmentation(CLASSES), sight(48)
    examples = Examples([0], [picture].__getitem__, seen, task, PLENTY)
    list(examples.fill())
    assert len(examples) == 1
    assert (examples[0].target != 255).sum() == 20 * 28
    assert examples[0].patches.shape == (48, 48 // PATCH, 48 // PATCH)
