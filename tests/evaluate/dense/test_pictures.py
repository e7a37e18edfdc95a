import numpy as np
import torch

from pathfm.evaluate.dense.pictures import Seen, regression_picture, segmentation_picture, spread_by
from tests.evaluate.dense.small import hills, squares

CLASSES = ("noise", "bright", "dark")


def _seen(said: torch.Tensor, **changes) -> Seen:
    truth = squares(0)
    return Seen("one", truth.image, truth.target, said, "mIoU 1.000", **changes)


def test_errors_are_drawn_where_they_are_and_nowhere_else():
    truth = squares(0).target
    perfect = np.asarray(segmentation_picture([_seen(truth)], CLASSES))
    nothing = np.asarray(segmentation_picture([_seen(torch.zeros_like(truth))], CLASSES))
    assert perfect.shape == nothing.shape
    times = 5  # 48 px are enlarged to 240
    missed, invented = ((nothing == np.array(colour)).all(2).sum() for colour in ((0, 114, 178), (213, 94, 0)))
    key = [(perfect == np.array(colour)).all(2).sum() for colour in ((0, 114, 178), (213, 94, 0))]
    assert 0 < max(key) < 200  # in the key below alone
    assert missed - key[0] == int((truth > 0).sum()) * times**2
    assert invented == key[1]


def test_ignored_pixels_are_no_error():
    truth = squares(0)
    target = torch.full_like(truth.target, 255)
    seen = Seen("one", truth.image, target, torch.zeros_like(target), "")
    drawn = np.asarray(segmentation_picture([seen], CLASSES[:2]))
    assert (drawn == np.array((0, 114, 178))).all(2).sum() < 200


def test_numbers_are_drawn_in_the_colours_of_the_truth():
    truth = hills(0)
    unknown = truth.target.clone()
    unknown[:10] = 0
    right = Seen("one", truth.image, unknown, truth.target, "AbsRel 0.000")
    wrong = Seen("one", truth.image, unknown, truth.target * 2, "AbsRel 1.000")
    drawn_right, drawn_wrong = (np.asarray(regression_picture([seen])) for seen in (right, wrong))
    assert drawn_right.shape == drawn_wrong.shape
    assert (drawn_right == 150).all(2).sum() >= 2 * 10 * 48 * 25  # in truth and error
    errors = [drawn[:, -246:].astype(int).sum() for drawn in (drawn_right, drawn_wrong)]  # the last panel of 240 px
    assert errors[0] < errors[1]


def test_the_pictures_that_are_shown_go_from_the_best_to_the_worst():
    values = [0.1 * number for number in range(11)]
    assert spread_by(values, 3) == [10, 5, 0]
    assert spread_by(values[:2], 3) == [1, 0]
    assert spread_by([], 3) == []
