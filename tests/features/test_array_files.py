import numpy as np
import pytest
from safetensors.numpy import load_file

from pathfm.features.array_files import FORMATS, Array, array_files, open_arrays, write_arrays


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "rows": np.arange(5),
        "wide": random.random((5, 2, 3)).astype(np.float32),
        "narrow": random.random((5, 1)).astype(np.float16),
    }


def pieces_of(array: np.ndarray) -> Array:
    return Array(array.shape, str(array.dtype), [array[:2], array[2:4], array[4:]])


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_in_pieces_is_read_as_a_whole(format, tmp_path):
    written = write_arrays(tmp_path, format, {name: pieces_of(array) for name, array in arrays().items()})
    assert len(list(written)) == 9  # it comes back after every piece
    found = open_arrays(tmp_path, format, arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert sorted(tmp_path.iterdir()) == sorted(array_files(tmp_path, format, arrays()))


def test_numpy_and_safetensors_read_them(tmp_path):
    for format in FORMATS:
        list(write_arrays(tmp_path, format, {name: pieces_of(array) for name, array in arrays().items()}))
    in_one = load_file(tmp_path / "features.safetensors")
    for name, array in arrays().items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), array)
        assert np.array_equal(in_one[name], array)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_left_in_the_middle_leaves_nothing(format, tmp_path):
    written = write_arrays(tmp_path, format, {"wide": pieces_of(arrays()["wide"])})
    next(written)
    written.close()
    assert list(tmp_path.iterdir()) == []


def test_too_few_pieces_are_a_mistake_of_ours(tmp_path):
    with pytest.raises(AssertionError):
        list(write_arrays(tmp_path, "npy", {"wide": Array((5, 2, 3), "float32", [arrays()["wide"][:4]])}))
    assert list(tmp_path.iterdir()) == []
