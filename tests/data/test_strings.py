import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.data.strings import parse_dataset_string
from pathfm.errors import UserError

values = st.text(st.characters(exclude_characters="\\"), min_size=1).filter(lambda text: text == text.strip())


@given(values, values)
def test_values_may_hold_anything_when_colons_are_escaped(root, subset):
    text = "Pathology:root={}:subset={}".format(*(value.replace(":", r"\:") for value in (root, subset)))
    parsed = parse_dataset_string(text)
    assert parsed.options == {"root": root, "subset": subset}
    assert str(parsed) == text


def test_the_ancestors_strings_are_read():
    parsed = parse_dataset_string("Pathology:root=/root/data:extra=/root/data:subset=train")
    assert parsed.name == "Pathology"
    assert parsed.options == {"root": "/root/data", "extra": "/root/data", "subset": "train"}


def test_a_value_may_hold_an_equals_sign():
    assert parse_dataset_string("Pathology:root=/a=b").options == {"root": "/a=b"}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("PathologyFoundation:root=/a:extra=/b:subset=c", {"root": "/a", "extra": "/b", "subset": "c"}),
        ("KNN:root=/a:split=query", {"root": "/a", "split": "query"}),
        ("KNN:split=test:root=/a:extra=/b:subset=c", {"split": "test", "root": "/a", "extra": "/b", "subset": "c"}),
        ("Regions:root=/a:extra=/b:subset=c", {"root": "/a", "extra": "/b", "subset": "c"}),
    ],
)
def test_every_data_set_has_its_keys_and_extra_is_never_needed(text, options):
    assert parse_dataset_string(text).options == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("KNN:root=/a", r"KNN needs split=...; found root"),
        ("Regions:root=/a:split=test", "Regions takes root, extra, subset, not 'split'"),
        ("Knn:root=/a:split=test", "did you mean 'KNN'"),
        ("PathologyFundation:root=/a", "did you mean 'PathologyFoundation'"),
        ("", r"no data set is called ''; known: Pathology"),
        ("Patology:root=/a", r"called 'Patology' \(did you mean 'Pathology'\?\)"),
        ("pathology:root=/a", r"did you mean 'Pathology'"),
        ("Pathology:rot=/a", r"takes root, extra, subset, not 'rot' \(did you mean 'root'\?\)"),
        ("Pathology:root=/a:split=query", "not 'split'"),
        ("Pathology:root=C:/a", r"not '/a'.*a ':' inside a value is written"),
        ("Pathology:root=", "'root' has no value"),
        ("Pathology:root", "'root' has no value"),
        ("Pathology:root=/a:root=/b", r"given twice \('/a' and '/b'\)"),
        ("Pathology:extra=/a", r"needs root=...; found extra"),
        ("Pathology", r"needs root=...; found no keys"),
    ],
)
def test_mistakes_say_what_was_expected_and_found(text, message):
    with pytest.raises(UserError, match=message):
        parse_dataset_string(text)
