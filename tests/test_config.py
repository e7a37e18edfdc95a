from pathlib import Path

import pytest
from pydantic import Field

from pathfm.config import Layer, Section, build, differences, overrides_layer, read_layer, to_yaml
from pathfm.errors import UserError


class Engine(Section):
    horsepower: int = Field(90, ge=1)
    fuel: str = "diesel"


class Car(Section):
    engine: Engine = Engine()
    doors: int = 4


def one_line(layers: list[Layer]) -> str:
    with pytest.raises(UserError) as error:
        build(Car, layers)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_later_layers_win():
    car = build(Car, [Layer("a.yaml", {"engine": {"horsepower": 100, "fuel": "gas"}}), overrides_layer(["doors=2"])])
    assert car == Car(engine=Engine(horsepower=100, fuel="gas"), doors=2)


def test_a_mistyped_key_names_the_file_and_the_nearest_key():
    line = one_line([Layer("a.yaml", {"engine": {"horsepowr": 100}}), overrides_layer([])])
    assert line == "a.yaml: no key 'engine.horsepowr'; the nearest known key is 'engine.horsepower'"


def test_a_key_in_the_wrong_group_is_pointed_to_the_right_one():
    line = one_line([overrides_layer(["fuel=gas"])])
    assert line == "the command line: no key 'fuel'; the nearest known key is 'engine.fuel'"


def test_a_wrong_type_names_key_value_and_source():
    line = one_line([Layer("a.yaml", {"doors": 4}), overrides_layer(["doors=many"])])
    assert line.startswith("the command line: doors: ")
    assert "'many'" in line


def test_a_value_out_of_range_names_the_limit():
    line = one_line([Layer("a.yaml", {"engine": {"horsepower": 0}})])
    assert line == "a.yaml: engine.horsepower: should be greater than or equal to 1, not 0"


def test_several_mistakes_are_counted():
    assert one_line([Layer("a.yaml", {"doors": "x", "wheels": 3})]).endswith("(and 1 more mistake)")


def test_an_override_value_may_hold_equals_signs():
    assert overrides_layer(["engine.fuel=Pathology:root=/data:subset=a"]).tree == {
        "engine": {"fuel": "Pathology:root=/data:subset=a"}
    }


@pytest.mark.parametrize("word", ["doors", "=4", "--doors=4"])
def test_a_word_that_is_no_override_is_refused(word: str):
    with pytest.raises(UserError, match="neither a known option nor key=value"):
        overrides_layer([word])


def test_a_file_that_is_missing_broken_or_a_list_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="there is no file"):
        read_layer(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("engine: [1, 2")
    with pytest.raises(UserError, match=r"b\.yaml is not valid YAML"):
        read_layer(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="must hold 'key: value' lines"):
        read_layer(tmp_path / "c.yaml")


def test_a_section_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Car().doors = 5


def test_yaml_reads_back_to_an_equal_section(tmp_path: Path):
    car = Car(engine=Engine(fuel="büffel: 1"), doors=3)
    (tmp_path / "car.yaml").write_text(to_yaml(car), encoding="utf-8")
    assert build(Car, [read_layer(tmp_path / "car.yaml")]) == car


def test_differences_are_listed_leaf_by_leaf():
    old, new = Car().model_dump(), Car(engine=Engine(fuel="gas")).model_dump()
    assert list(differences(old, new)) == [("engine.fuel", "diesel", "gas")]
