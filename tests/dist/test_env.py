import pytest

from pathfm.dist.env import Ranks, ranks_from_environment
from pathfm.dist.rendezvous import rendezvous_url


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, Ranks(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(5, 8, 1)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"},
            Ranks(3, 4, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Ranks(0, 1, 0)),  # the batch script, not a task
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
            Ranks(1, 2, 1),
        ),
    ],
)
def test_ranks_come_from_torchrun_or_slurm_or_this_process_is_alone(environment, ranks):
    assert ranks_from_environment(environment) == ranks


@pytest.fixture
def slurm(monkeypatch):
    environment = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu-[07-08],fat3",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return environment


def test_slurm_ranks_meet_at_the_first_node_on_a_port_of_their_job_and_restart(slurm):
    url = rendezvous_url(Ranks(1, 4), slurm, resolves=lambda name: True)
    again = rendezvous_url(Ranks(0, 4), {**slurm, "SLURM_RESTART_COUNT": "1"}, resolves=lambda name: True)
    assert url.startswith("tcp://gpu-07:")
    assert again.startswith("tcp://gpu-07:")
    assert url != again


def test_an_address_serves_where_the_name_does_not_resolve(slurm):
    assert rendezvous_url(Ranks(1, 4), slurm, resolves=lambda name: False).startswith("tcp://10.0.0.9:")


def test_torchrun_brings_its_own_address(slurm):
    assert rendezvous_url(Ranks(1, 4), {**slurm, "MASTER_ADDR": "host"}) == "env://"
