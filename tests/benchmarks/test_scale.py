"""Samples/s of n nodes by hand, what the command says, and what it refuses."""

from pathlib import Path

import pytest
import scale
from scale import ASSUMED, MEASURED, Cluster, exchange_s, main, predict, with_section

from pathfm.errors import UserError

ALONE = Cluster(**{part.name: part.value for part in ASSUMED})


def cluster(**changed):
    return Cluster(**{**vars(ALONE), **changed})


def test_an_all_reduce_moves_twice_the_gradients_over_the_slowest_link():
    assert exchange_s(cluster(parameters=1e9, network_gbit=80, gpus_per_node=4), 2) == pytest.approx(2 * 7 / 8 * 4 / 10)
    assert exchange_s(cluster(parameters=1e9, inside_gbyte=100, gpus_per_node=4), 1) == pytest.approx(
        2 * 3 / 4 * 4 / 100
    )
    assert exchange_s(cluster(gpus_per_node=1), 1) == 0


def test_sharded_weights_are_gathered_three_times_and_gradients_scattered_once():
    sharded = cluster(parameters=1e9, network_gbit=80, gpus_per_node=4, strategy="fsdp")
    assert exchange_s(sharded, 2) == pytest.approx(7 / 8 * (3 * 2 + 4) / 10)


def test_hybrid_gathers_inside_a_node_and_adds_up_between_nodes():
    hybrid = cluster(parameters=1e9, network_gbit=80, inside_gbyte=100, gpus_per_node=4, strategy="hybrid")
    assert exchange_s(hybrid, 1) == pytest.approx(3 / 4 * 10 / 100)
    assert exchange_s(hybrid, 4) == pytest.approx(3 / 4 * 10 / 100 + 2 * 3 / 4 * 4 / 10)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hybrid"])
def test_only_what_is_not_hidden_of_the_exchange_makes_a_step_longer(strategy):
    hidden, open_, half = (cluster(strategy=strategy, overlap=overlap) for overlap in (1, 0, 0.5))
    exchange = exchange_s(hidden, 8)
    assert hidden.step_s(8) == pytest.approx(max(0.36, exchange))
    assert open_.step_s(8) == pytest.approx(0.36 + exchange)
    assert half.efficiency(8) == pytest.approx(0.36 / (0.36 + exchange / 2))


def test_no_more_can_be_hidden_than_a_step_takes():
    slow = cluster(network_gbit=1, overlap=1)
    assert slow.step_s(4) == pytest.approx(exchange_s(slow, 4))


def test_a_job_of_n_nodes_is_interrupted_n_times_as_often():
    one, eight = (ALONE.conditions(nodes).interruptions_per_s for nodes in (1, 8))
    assert eight == pytest.approx(8 * one)
    assert one == pytest.approx((1 / 24 + 1 / 5000) / 3600)


def test_a_notice_that_does_not_suffice_counts_as_none():
    needed = ALONE.conditions(4).leaving_s
    too_short, enough = (cluster(notice_seconds=needed + more).conditions(4) for more in (-1, 1))
    assert (too_short.warned_per_s, enough.warned_per_s) == (0, pytest.approx(4 / (24 * 3600)))
    assert enough.sudden_per_s == pytest.approx(4 / (5000 * 3600))


@pytest.mark.parametrize("notice", [0, 120])
@pytest.mark.parametrize("nodes", [1, 32])
def test_formula_and_simulation_agree_on_what_is_printed(nodes, notice):
    found = predict(cluster(notice_seconds=notice), nodes)
    assert abs(found.simulated.mean - found.formula) <= 1.6 * found.simulated.half_width
    assert found.formula >= found.formula_as_compared
    assert found.nearly[0] <= found.every_steps <= found.nearly[1]


def test_the_table_has_a_row_for_every_number_of_nodes_and_names_what_is_assumed(capsys):
    assert main(["--nodes", "4,1", "--mtbp-hours", "12", "--step-seconds", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert [row.split(" | ")[:2] for row in printed.splitlines()[2:4]] == [["| 1", "8"], ["| 4", "32"]]
    assert "Given: step-seconds 0.5, mtbp-hours 12." in printed
    assert "| restart-seconds | 180 |" in printed
    assert "| mtbp-hours |" not in printed


def test_the_picture_is_drawn(tmp_path, capsys):
    assert main(["--nodes", "1,2", "--picture", str(tmp_path / "scale.png")]) == 0
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert "drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step-seconds", "0"], "--step-seconds must be above 0, not 0"),
        (["--mtbp-hours", "-1"], "--mtbp-hours must be above 0, not -1"),
        (["--queue-seconds", "-1"], "--queue-seconds must be 0 or more, not -1"),
        (["--overlap", "70"], "--overlap is a share of the exchange, from 0 to 1, not 70"),
        (["--restart-seconds", "nan"], "--restart-seconds must be 0 or more, not nan"),
        (["--measured"], "--measured needs --data"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        main(options)


@pytest.mark.parametrize("nodes", ["0,1", "a", ""])
def test_nodes_are_counted_from_one(nodes, capsys):
    with pytest.raises(SystemExit):
        main(["--nodes", nodes])
    assert "--nodes" in capsys.readouterr().err


def test_a_measurement_replaces_the_one_before_and_nothing_else(tmp_path, monkeypatch, capsys):
    results = tmp_path / "scale.md"
    results.write_text(f"# Scale\n\nA table.\n\n{MEASURED}\n\nold\n\n## What follows\n\nmore\n")
    monkeypatch.setattr(scale, "measured_section", lambda *_: "new")
    assert main(["--measured", "--data", str(tmp_path), "--results", str(results)]) == 0
    text = results.read_text()
    assert text.startswith(f"# Scale\n\nA table.\n\n{MEASURED}\n\n```\n")
    assert text.endswith("new\n\n## What follows\n\nmore\n")
    assert "old" not in text


def test_a_section_that_is_not_there_comes_last():
    assert with_section("# Scale\n\nA table.\n", "## New", "body") == "# Scale\n\nA table.\n\n## New\n\nbody\n"
    assert with_section("", "## New", "body") == "## New\n\nbody\n"


def test_the_results_have_the_section_that_a_measurement_rewrites():
    assert f"\n{MEASURED}\n" in (Path(scale.__file__).parent / "results" / "scale.md").read_text()
