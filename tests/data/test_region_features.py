import io

import pytest
import torch

from pathfm.data.datasets import Regions
from pathfm.data.decode import DecodeError
from pathfm.data.region_features import RegionFeatures, decode_features
from pathfm.errors import UserError


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture
def regions(tmp_path):
    tensors = [torch.randn(256, 384, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for number, tensor in enumerate(tensors):
        torch.save(tensor, tmp_path / f"region_{number}.pt")
    return tmp_path, tensors


def test_features_are_read_as_they_were_saved(regions):
    folder, tensors = regions
    features = RegionFeatures(Regions(folder))
    assert (len(features), features.width) == (3, 384)
    for found, tensor in zip((features[n] for n in range(3)), tensors, strict=True):
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_kept(dtype):
    tensor = torch.ones(4, 2, dtype=dtype)
    assert decode_features(saved(tensor)).dtype == dtype


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a data file was run')",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(torch.zeros(4, 3, 2)), r"float32 \[4, 3, 2\], not float \[npatch, width\]"),
        (saved(torch.zeros(4, 3, dtype=torch.int64)), r"int64 \[4, 3\], not float"),
        (saved(torch.zeros(0, 384)), r"float32 \[0, 384\], not float"),
        (saved({"features": torch.zeros(4, 3)}), "it is a dict, not a tensor"),
        (saved(RunsCode()), "code or objects"),
        (saved([torch.zeros(4, 3), RunsCode()]), "code or objects"),
        (saved(torch.zeros(4, 3))[:200], "not a whole file of torch.save"),
        (b"", "not a whole file of torch.save"),
        (b"no tensor at all", "damaged"),
    ],
)
def test_other_content_is_refused_with_what_it_is_and_never_run(content, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_features(content)


def test_the_file_is_named(regions):
    folder, _ = regions
    (folder / "region_1.pt").write_bytes(b"damaged")
    features = RegionFeatures(Regions(folder))
    with pytest.raises(UserError, match=rf"^region_1.pt in {folder} holds no region features: .*extract it again"):
        features[1]


def test_mixed_widths_are_refused(regions):
    folder, _ = regions
    torch.save(torch.zeros(256, 192), folder / "region_2.pt")
    features = RegionFeatures(Regions(folder))
    with pytest.raises(UserError, match=r"region_2.pt .* width 192, but those of region_0.pt are 384 wide"):
        features[2]


def test_regions_may_have_different_numbers_of_patches(regions):
    folder, _ = regions
    torch.save(torch.zeros(100, 384), folder / "region_2.pt")
    assert RegionFeatures(Regions(folder))[2].shape == (100, 384)
