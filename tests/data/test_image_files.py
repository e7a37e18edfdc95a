"""Images by number, the same whether they lie in a folder, a tar or a data set."""

import pytest

from pathfm.data.image_files import distinct_stems, open_images
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import UserError


@pytest.fixture
def folder(tmp_path, tile):
    root = tmp_path / "regions"
    (root / "slide_2").mkdir(parents=True)
    for number, name in enumerate(["b.png", "slide_2/b.png", "slide_2/c.PNG"]):
        (root / name).write_bytes(tile(number))
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(tile(7))
    return root


@pytest.fixture
def tar(folder, tmp_path):
    request = PackRequest(folder, "pretrain", tmp_path / "packed")
    pack(request)
    return request.tar


def test_a_folder_its_tar_and_its_data_set_hold_the_same_images_in_the_same_order(folder, tar):
    sources = [open_images(source) for source in (str(folder), str(tar), f"Pathology:root={tar.parent}")]
    names = ["b.png", "slide_2/b.png", "slide_2/c.PNG"]
    assert sources[0].paths == names
    assert sources[1].paths == sources[2].paths == [f"regions/{name}" for name in names]
    for source in sources:
        assert [source.read_bytes(number) for number in range(3)] == [(folder / name).read_bytes() for name in names]


def test_a_subset_holds_what_its_index_lists(tar, tmp_path):
    (tmp_path / "keep.txt").write_text("c.PNG\n")
    build_index(IndexRequest(tar, tar.parent, "pretrain", "few", keep=tmp_path / "keep.txt"))
    assert open_images(f"Pathology:root={tar.parent}:subset=few").paths == ["regions/slide_2/c.PNG"]


def test_an_image_is_found_by_its_name_or_its_path(folder):
    images = open_images(str(folder))
    assert (images.number_of("c.PNG"), images.number_of("slide_2/b.png"), images.number_of("./b.png")) == (2, 1, 0)
    with pytest.raises(UserError, match=r"'b.png' is 2 images of .*; name it by its path: b.png, slide_2/b.png"):
        images.number_of("b.png")
    with pytest.raises(UserError, match=r"there is no image 'z.png' in"):
        images.number_of("z.png")


def test_the_header_alone_tells_the_size(folder):
    images = open_images(str(folder))
    size = images.size_px(0)
    assert size is not None
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:64])
    assert images.size_px(0) == size
    (folder / "b.png").write_bytes(b"no image")
    assert images.size_px(0) is None


def test_a_tar_that_is_cut_meanwhile_is_named(tar):
    images = open_images(str(tar))
    content = tar.read_bytes()
    tar.write_bytes(content[:1024])
    with pytest.raises(UserError, match=r"c.PNG in .*pretrain_dataset.tar was cut"):
        images.read_bytes(2)


def test_an_image_that_vanished_is_named(folder):
    images = open_images(str(folder))
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"cannot read .*b.png: No such file"):
        images.read_bytes(0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: str(folder / "nowhere"), "there is no folder or tar"),
        (lambda folder: str(folder / "notes.txt"), "notes.txt"),
        (lambda folder: f"Regions:root={folder}", "holds no .pt files"),
        (lambda folder: f"Pathology:root={folder}", "there is no"),
    ],
)
def test_what_holds_no_images_is_refused(folder, make, reason):
    with pytest.raises(UserError, match=reason):
        open_images(make(folder))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        open_images(str(tmp_path))


def test_names_are_stems_or_where_two_share_one_the_paths():
    assert distinct_stems(["a/x.png", "b/y.jpg"]) == ["x", "y"]
    assert distinct_stems(["a/x.png", "b/x.jpg", "./y.png"]) == ["a_x", "b_x", "y"]
    with pytest.raises(UserError, match="would share a name: a_x"):
        distinct_stems(["a/x.png", "a/x.jpg"])
