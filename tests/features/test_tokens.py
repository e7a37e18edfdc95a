import numpy as np
import torch
import torch.distributed as dist

from pathfm.batch import normalise_crops
from pathfm.features.tokens import main_components, token_maps, tokens_picture
from pathfm.parallel.apply import left_as_found, mesh_of, parallelise, whole
from pathfm.parallel.config import ParallelConfig
from tests.several_ranks import on_ranks
from tests.ssl.small import small_dinov2


def tiles() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 84, 84), dtype=np.uint8))


def test_attention_and_components_stand_on_the_grid_of_patches():
    vit = small_dinov2().teacher.backbone.eval()
    maps = token_maps(vit, tiles())
    assert maps.attention.shape == (3, 6, 6)
    assert maps.components.shape == (3, 6, 6, 3)
    expected = vit.last_attention(normalise_crops(tiles()))[:, :, 0, 1:].mean(1).unflatten(1, (6, 6))
    torch.testing.assert_close(maps.attention, expected)
    assert 0 <= maps.components.min() < maps.components.max() <= 1


def test_the_first_component_is_what_differs_most_between_patches():
    generator = torch.Generator().manual_seed(0)
    is_tumour = torch.rand(4, 9, generator=generator) > 0.5
    patches = 0.1 * torch.randn(4, 9, 8, generator=generator)
    patches[..., 2] += 5 * is_tumour
    first = main_components(patches)[..., 0]
    assert first[is_tumour].min() > 0.8
    assert first[~is_tumour].max() < 0.2


def test_components_do_not_turn_round_from_one_picture_to_the_next():
    patches = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(main_components(patches), main_components(patches + 1e-6), atol=1e-3, rtol=0)


def maps_of_shards() -> tuple[torch.Tensor, torch.Tensor, bool]:
    method = small_dinov2()
    teacher = method.teacher
    mesh = mesh_of(dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))
    parallelise(teacher, teacher.layers(), ParallelConfig(strategy="fsdp"), mesh, torch.float32, trained=False)
    with torch.no_grad():
        before = teacher([normalise_crops(tiles())], heads=False).cls
        with left_as_found(teacher), whole(teacher):
            maps = token_maps(teacher.backbone, tiles())
        after = teacher([normalise_crops(tiles())], heads=False).cls
    return maps.attention, maps.components, after.equal(before)


def test_ranks_that_hold_shards_see_what_one_that_holds_all_sees():
    expected = token_maps(small_dinov2().teacher.backbone.eval(), tiles())
    for attention, components, is_unharmed in on_ranks(2, maps_of_shards):
        torch.testing.assert_close(attention, expected.attention, atol=1e-5, rtol=0)
        torch.testing.assert_close(components, expected.components, atol=1e-3, rtol=0)
        assert is_unharmed


def test_the_picture_shows_tiles_attention_and_components():
    maps = token_maps(small_dinov2().teacher.backbone.eval(), tiles())
    drawn = np.asarray(tokens_picture(tiles(), maps), dtype=float)
    assert drawn.shape[1] > 3 * 2 * 144
    thirds = np.array_split(drawn[24:], 3, axis=1)
    assert all(third.std() > 10 for third in thirds)
