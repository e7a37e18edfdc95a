"""Settings of the backbone."""

import pytest

from pathfm.config import Layer, build
from pathfm.errors import UserError
from pathfm.models.config import StudentConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [("arch", "vit_huge"), ("drop_path_rate", 1.0), ("patch_size", 0), ("ffn_layer", "relu"), ("attention", "flash")],
)
def test_a_value_that_means_nothing_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        build(StudentConfig, [Layer("recipe.yaml", {key: value})])
