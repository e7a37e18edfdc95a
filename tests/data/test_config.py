import pytest
from PIL import Image

from pathfm.config import build, overrides_layer
from pathfm.data.config import CorruptPolicy, DataConfig
from pathfm.errors import UserError


@pytest.mark.parametrize("policy", ["skip", "raise", "limit:0.01"])
def test_known_policies_are_accepted(policy):
    assert build(DataConfig, [overrides_layer([f"corrupt_samples={policy}"])]).corrupt_samples == policy


@pytest.mark.parametrize("policy", ["ignore", "limit", "limit:2", "limit:-0.1", "limit:many", "limit:nan"])
def test_an_unknown_policy_is_refused_with_the_known_ones(policy):
    with pytest.raises(UserError, match=f"skip, raise or limit:FRACTION .*not '{policy}'"):
        build(DataConfig, [overrides_layer([f"corrupt_samples={policy}"])])


def test_a_limit_is_judged_from_the_thousandth_sample_on():
    policy = CorruptPolicy.parse("limit:0.01")
    assert not policy.is_broken_by(num_skipped=10, num_seen=16)
    assert policy.is_broken_by(num_skipped=11, num_seen=1000)
    assert not policy.is_broken_by(num_skipped=20, num_seen=2000)
    assert not CorruptPolicy.parse("skip").is_broken_by(num_skipped=1001, num_seen=1000)
    assert CorruptPolicy.parse("raise").is_broken_by(num_skipped=1, num_seen=10**9)


def test_more_pixels_than_pillow_itself_allows_cannot_be_asked_for():
    pillows_own = 2 * Image.MAX_IMAGE_PIXELS
    assert build(DataConfig, [overrides_layer([f"max_pixels={pillows_own}"])]).max_pixels == pillows_own
    with pytest.raises(UserError, match=f"max_pixels.*{pillows_own}"):
        build(DataConfig, [overrides_layer([f"max_pixels={pillows_own + 1}"])])
