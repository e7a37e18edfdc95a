from pathfm.errors import exit_status
from pathfm.jobs.config import main


def test_the_printed_recipe_is_complete_and_holds_the_overrides(capsys):
    assert main(["vitl14", "optim.epochs=7", "augment.jitter_hue=0.05"]) == 0
    printed = capsys.readouterr().out
    assert "epochs: 7.0" in printed
    assert "jitter_hue: 0.05" in printed
    assert "jitter_brightness: 0.15" in printed  # the preset's number, written out
    assert "null" not in printed.partition("augment:")[2].partition("data:")[0]


def test_the_printed_recipe_reads_back_to_itself(capsys, tmp_path):
    main(["vitg14_reg4"])
    first = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(first)
    main([str(tmp_path / "printed.yaml")])
    assert capsys.readouterr().out == first


def test_a_mistake_is_one_line_and_status_two(capsys):
    assert exit_status(lambda: main(["vitl14", "optim.epoch=7"])) == 2
    said = capsys.readouterr().err
    assert said == "error: the command line: no key 'optim.epoch'; the nearest known key is 'optim.epochs'\n"
