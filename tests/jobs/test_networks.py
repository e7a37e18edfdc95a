"""A recipe's networks on a device."""

import pytest
import torch

from pathfm.dist.env import ALONE
from pathfm.errors import UserError
from pathfm.jobs.networks import fresh_state, method_of
from pathfm.recipe import changes_of_identity, read_recipe

SMALL = ["student.arch=vit_tiny", "dino.head_n_prototypes=64", "ibot.head_n_prototypes=64"]


def test_fp8_is_off_belongs_to_a_runs_identity_and_is_refused_without_a_gpu():
    default, wanted = (read_recipe(None, [*SMALL, *more]).recipe for more in ([], ["train.precision=fp8"]))
    assert changes_of_identity(default, wanted) == ["train.precision: bf16 -> fp8"]
    with pytest.raises(UserError, match=r"train.precision=fp8 does not work here \(cpu: .*; use train.precision=bf16$"):
        fresh_state(method_of(wanted, 4), wanted, ALONE, torch.device("cpu"))
