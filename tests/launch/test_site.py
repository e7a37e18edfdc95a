"""A cluster is read from what its Slurm really said; the profile and the words about preemption follow from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pathfm.config import Layer, build
from pathfm.errors import UserError
from pathfm.launch.profile import Profile
from pathfm.launch.site import Site, ask, choose, preemption_in_words, profile_text, read_site

RECORDED = Path(__file__).parent / "recorded"


def recorded() -> dict[str, str]:
    """The outputs, by their command."""
    text = (RECORDED / "site.txt").read_text(encoding="utf-8")
    return dict(block.split("\n", 1) for block in text.split("\n# ")[1:])


def _site(nodes: str | None = None, **config: str) -> Site:
    """The recorded one with other nodes or other settings."""
    said = recorded()
    site = read_site(
        nodes=said["sinfo"] if nodes is None else nodes,
        partitions=said["scontrol show partition"],
        config=said["scontrol show config"],
    )
    return replace(site, config={**site.config, **config})


def _words(**config: str) -> str:
    return "\n".join(preemption_in_words(_site(**config)))


def _profile(site: Site) -> Profile:
    return build(Profile, [Layer("the text", yaml.safe_load(profile_text(site, "here")))])


def test_the_profile_is_the_recorded_one() -> None:
    assert profile_text(_site(), "pathology") == (RECORDED / "site_profile.yaml").read_text(encoding="utf-8")


def test_partitions_and_nodes_are_read() -> None:
    site = _site()
    assert site.name == "pathology"
    facts = {
        partition.name: (partition.limit_hours, partition.tier, partition.grace_s) for partition in site.partitions
    }
    assert facts == {"cpu": (168, 1, 0), "gpu": (48, 10, 0), "scavenge": (None, 1, 90), "short": (0.5, 1, 0)}
    h100 = next(group for group in site.nodes if group.features == "h100,ib")
    assert (h100.number, h100.cpus, h100.gpus, h100.gpu_type) == (2, 96, 8, "h100")


@pytest.mark.parametrize(
    ("gres", "gpus", "gpu_type"),
    [
        ("gpu:2", 2, None),
        ("gpu:a100:4(S:0-1)", 4, "a100"),
        ("nvme:1,gpu:3090:8(S:0)", 8, "3090"),
        ("gpu:a100:2,gpu:v100:6", 6, "v100"),
        ("(null)", 0, None),
    ],
)
def test_gpus_are_found_in_every_form_of_gres(gres: str, gpus: int, gpu_type: str | None) -> None:
    profile = _profile(_site(nodes=f"cpu|4|32+|128000+|{gres}|(null)\n"))
    assert (profile.partition, profile.gpus_per_node, profile.gpu_type) == ("cpu", gpus, gpu_type)
    assert profile.cpus_per_task == 32 // max(1, gpus)


def test_a_partition_that_is_down_is_not_chosen() -> None:
    site = _site()
    down = replace(site, partitions=tuple(replace(part, is_up=part.name == "short") for part in site.partitions))
    assert choose(down).partition.name == "short"
    assert _profile(down).time_limit_hours == 0.5
    with pytest.raises(UserError, match="has no partition that is up and has nodes"):
        choose(replace(site, partitions=()))


def test_without_a_limit_of_the_partition_a_job_asks_for_a_day() -> None:
    site = _site()
    scavenge = replace(site, partitions=tuple(part for part in site.partitions if part.name == "scavenge"))
    assert _profile(scavenge).time_limit_hours == 24


@pytest.mark.parametrize(
    ("config", "said", "unsaid"),
    [
        ({}, "partition scavenge goes back into the queue (PreemptMode=REQUEUE)", "partition cpu"),
        ({}, "It is told by USR2 90 s before (GraceTime is 90)", "send_user_signal"),
        ({}, "partition short is ended by Slurm (PreemptMode=CANCEL)", ""),
        ({}, "A job in partition gpu gives way to none.", ""),
        ({}, "JobRequeue=0", ""),
        ({}, "unpack such an image", ""),
        ({"SlurmctldParameters": ""}, "It is told by TERM 90 s before", "USR2 90 s"),
        ({"SlurmctldParameters": ""}, "send_user_signal is not set", ""),
        ({"SlurmctldParameters": "", "PreemptParameters": "send_user_signal"}, "It is told by USR2 90 s before", ""),
        ({"KillWait": "120 sec"}, "has to be written within 120 s", "sec"),
        ({"JobRequeue": "1", "ProctrackType": "proctrack/cgroup"}, "", "JobRequeue"),
        ({"ProctrackType": "proctrack/cgroup"}, "", "unpack"),
        ({"PreemptType": "preempt/none"}, "No job is preempted here", "A preempted job"),
        ({"PreemptType": "preempt/qos"}, "sacctmgr show qos", "higher tier"),
        ({"PreemptType": "preempt/qos"}, "GraceTime, where its QOS has none, is 90", ""),
        ({"PreemptExemptTime": "00:10:00"}, "It is safe for its first 00:10:00", ""),
    ],
)
def test_preemption_is_said_in_plain_words(config: dict[str, str], said: str, unsaid: str) -> None:
    words = _words(**config)
    assert said in words
    assert not unsaid or unsaid not in words


def test_a_stopped_job_keeps_its_gpus() -> None:
    site = _site()
    stopped = tuple(replace(part, preempt_mode="GANG,SUSPEND") for part in site.partitions)
    assert "is stopped, keeps the memory of its GPUs" in "\n".join(
        preemption_in_words(replace(site, partitions=stopped))
    )


def test_a_slurm_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^Slurm does not answer: no controller$"):
        ask(["sh", "-c", "echo no controller >&2; exit 1"])
    with pytest.raises(UserError, match=r"no-such-program is not on PATH.*login node"):
        ask(["no-such-program"])
