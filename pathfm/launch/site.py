"""A cluster as its Slurm describes it, and the profile that follows from it. Pure but for `ask`."""

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from pathfm.errors import UserError
from pathfm.launch.profile import hours
from pathfm.tables import amount, text_table

NODES = ("sinfo", "--noheader", "--exact", "--format=%R|%D|%c|%m|%G|%f")
PARTITIONS = ("scontrol", "--oneliner", "show", "partition")
CONFIG = ("scontrol", "show", "config")
_GPU = re.compile(r"gpu:(?:([^:(,]+):)?(\d+)")
_SECONDS_TO_ANSWER = 60
_HOURS_WITHOUT_LIMIT = 24.0


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that are alike. Each node's numbers."""

    partition: str
    number: int
    cpus: int
    memory_bytes: int
    gpus: int
    gpu_type: str  # empty: the site has no types
    features: str

    @property
    def gpus_in_words(self) -> str:
        return f"{self.gpus}{f' {self.gpu_type}' if self.gpu_type else ''}" if self.gpus else "-"


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    is_up: bool
    limit_hours: float | None  # None: no limit
    tier: int
    preempt_mode: str
    grace_s: int


@dataclass(frozen=True)
class Site:
    config: Mapping[str, str]
    partitions: tuple[Partition, ...]
    nodes: tuple[NodeGroup, ...]

    @property
    def name(self) -> str:
        return self.config.get("ClusterName", "cluster")

    @property
    def preempts(self) -> str:
        """What gives way to what: `partition_prio`, `qos` or `none`."""
        return self.config.get("PreemptType", "preempt/none").rpartition("/")[2]

    @property
    def warns_with_user_signal(self) -> bool:
        """At the beginning of the grace time of a preemption."""
        since_24_11 = self.config.get("PreemptParameters", "")
        before = self.config.get("SlurmctldParameters", "")
        return "send_user_signal" in f"{since_24_11},{before}"


@dataclass(frozen=True)
class Choice:
    """Where a run would go."""

    partition: Partition
    group: NodeGroup


# ---- what Slurm says


def ask_slurm() -> Site:
    """Raises `UserError` when Slurm does not answer."""
    return read_site(nodes=ask(NODES), partitions=ask(PARTITIONS), config=ask(CONFIG))


def ask(words: Sequence[str]) -> str:
    """Raises `UserError` with the command's own words."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER)
    except FileNotFoundError:
        raise UserError(f"there is no Slurm here ({words[0]} is not on PATH); do this on a login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} did not answer within {_SECONDS_TO_ANSWER} s; try again later") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"Slurm does not answer: {said}")
    return done.stdout


def read_site(*, nodes: str, partitions: str, config: str) -> Site:
    """From the outputs of `NODES`, `PARTITIONS` and `CONFIG`."""
    return Site(
        dict(_setting(line) for line in config.splitlines() if " = " in line),
        tuple(_partition(line) for line in partitions.splitlines() if line.startswith("PartitionName=")),
        tuple(_node_group(line) for line in nodes.splitlines() if line.count("|") == 5),
    )


def _setting(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key.strip(), "" if value.strip() == "(null)" else value.strip()


def _partition(line: str) -> Partition:
    fields = dict(word.partition("=")[::2] for word in line.split())
    limit = fields.get("MaxTime", "UNLIMITED")
    return Partition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        is_up=fields.get("State", "UP") == "UP",
        limit_hours=None if limit in ("UNLIMITED", "INFINITE", "NONE") else hours(limit),
        tier=int(fields.get("PriorityTier", "1")),
        preempt_mode=fields.get("PreemptMode", "OFF"),
        grace_s=int(fields.get("GraceTime", "0")),
    )


def _node_group(line: str) -> NodeGroup:
    partition, number, cpus, memory_mb, gres, features = line.strip().split("|")
    gpus = [(kind, int(count)) for kind, count in _GPU.findall(gres)]
    gpu_type, count = max(gpus, key=lambda gpu: gpu[1], default=("", 0))  # a node of two kinds: the larger half
    memory = int(memory_mb.rstrip("+")) * 2**20
    return NodeGroup(partition, int(number), int(cpus.rstrip("+")), memory, count, gpu_type, _known(features))


def _known(text: str) -> str:
    return "" if text == "(null)" else text


# ---- what follows from it


def choose(site: Site) -> Choice:
    """The default partition, or the one with most GPUs where that has none; the nodes that are most of it.

    Raises `UserError` when no partition is up and has nodes.
    """
    groups = {partition: _groups(site, partition) for partition in site.partitions if partition.is_up}
    usable = [partition for partition in groups if groups[partition]]
    if not usable:
        raise UserError(f"cluster {site.name} has no partition that is up and has nodes")
    default = [partition for partition in usable if partition.is_default]
    with_gpus = [partition for partition in usable if _num_gpus(groups[partition])]
    if default and (_num_gpus(groups[default[0]]) or not with_gpus):
        chosen = default[0]
    else:
        chosen = max(with_gpus or usable, key=lambda partition: (_num_gpus(groups[partition]), partition.tier))
    group = max(groups[chosen], key=lambda group: (group.number * group.gpus, group.number))
    return Choice(chosen, group)


def profile_text(site: Site, name: str) -> str:
    """The YAML of a profile, with what is to be known about the cluster as comments."""
    choice = choose(site)
    keys = [f"{key}: {_scalar(value)}" for key, value, _ in _keys(site, choice)]
    width = max(map(len, keys)) + 2
    lines = [f"{key:<{width}}# {why}" for key, (_, _, why) in zip(keys, _keys(site, choice), strict=True)]
    heading = [
        f"# Cluster {site.name}, as its Slurm {site.config.get('SLURM_VERSION', '')} describes itself.".replace(
            "  ", " "
        ),
        f"# Look it over, add what is not known to Slurm, and start with --profile {name}.",
        "# example.yaml shows every key in use: account, container, memory, set-up, variables.",
    ]
    partitions = ["# Partitions:", *_partition_table(site).splitlines()]
    preemption = ["# Preemption and signals:", *(f"#   {line}" for line in preemption_in_words(site))]
    blocks = [heading, lines, partitions, preemption]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks) + "\n"


def preemption_in_words(site: Site) -> list[str]:
    """What happens to a job when others need its nodes, by partition, and what the site does with signals."""
    with_gpus = [partition for partition in site.partitions if _num_gpus(_groups(site, partition))]
    by_partition = [line for partition in with_gpus or site.partitions for line in _of_partition(site, partition)]
    return [*_who_gives_way(site), *by_partition, *_of_signals(site)]


def _scalar(value: object) -> str:
    """As YAML reads it back: a GPU of the type 3090 is no number."""
    text = str(value)
    return json.dumps(text) if isinstance(value, str) and not isinstance(yaml.safe_load(text), str) else text


def _keys(site: Site, choice: Choice) -> list[tuple[str, object, str]]:
    """Key, value and reason."""
    partition, group = choice.partition, choice.group
    why = "the default partition"
    if not partition.is_default:
        default = next((other.name for other in site.partitions if other.is_default), "")
        why = f"the default partition, {default}, has no GPUs" if default else "there is no default partition"
    limit = "the partition's own limit" if partition.limit_hours else "the partition has no limit of its own"
    alike = sum(other.number for other in _groups(site, partition))
    found: list[tuple[str, object, str]] = [
        ("partition", partition.name, why),
        ("time_limit_hours", partition.limit_hours or _HOURS_WITHOUT_LIMIT, limit),
        ("gpus_per_node", group.gpus, f"one task per GPU; {group.number} of {alike} nodes are like this"),
    ]
    if group.gpu_type:
        found.append(("gpu_type", group.gpu_type, "asks for these alone"))
    shared = f"{group.cpus} cores of a node for {group.gpus} tasks" if group.gpus else "all cores of a node"
    return [*found, ("cpus_per_task", max(1, group.cpus // max(1, group.gpus)), f"{shared}{_memory_note(site)}")]


def _memory_note(site: Site) -> str:
    """Where Slurm counts memory, a job without `memory_per_node` gets the site's default, which may be little."""
    if "MEMORY" not in site.config.get("SelectTypeParameters", "").upper():
        return ""
    defaults = [f"{key}={site.config[key]}" for key in ("DefMemPerCPU", "DefMemPerNode") if site.config.get(key)]
    limited = [default for default in defaults if not default.endswith("UNLIMITED")]
    return f"; memory is {limited[0]} MB unless memory_per_node says more" if limited else ""


def _partition_table(site: Site) -> str:
    rows = []
    for partition in site.partitions:
        for group in _groups(site, partition):
            limit = f"{partition.limit_hours:g} h" if partition.limit_hours else "none"
            name = (
                f"{partition.name}{' (default)' if partition.is_default else ''}{'' if partition.is_up else ' (down)'}"
            )
            node = (group.gpus_in_words, group.cpus, amount(group.memory_bytes), group.features or "-")
            rows.append((name, group.number, *node, limit, partition.tier, _fate(site, partition)))
    header = ("partition", "nodes", "GPUs", "cores", "memory", "features", "limit", "tier", "if preempted")
    return text_table(header, rows, indent="#   ")


def _fate(site: Site, partition: Partition) -> str:
    return partition.preempt_mode.lower() if _may_be_preempted(site, partition) else "-"


def _may_be_preempted(site: Site, partition: Partition) -> bool:
    """As far as partitions tell; where QOS decides, any job may."""
    if site.preempts == "none" or partition.preempt_mode.upper() == "OFF":
        return False
    return site.preempts == "qos" or any(other.tier > partition.tier for other in site.partitions)


def _who_gives_way(site: Site) -> list[str]:
    if site.preempts == "none":
        return ["No job is preempted here (PreemptType=preempt/none)."]
    if site.preempts == "qos":
        ask_for = "sacctmgr show qos format=name,preempt,preemptmode,gracetime"
        return [f"Jobs give way to jobs of another QOS (PreemptType=preempt/qos): {ask_for}"]
    return [
        f"Jobs give way to jobs of a partition with a higher tier on their nodes (PreemptType=preempt/{site.preempts})."
    ]


def _of_partition(site: Site, partition: Partition) -> list[str]:
    if site.preempts == "none":
        return []
    if not _may_be_preempted(site, partition):
        return [f"A job in partition {partition.name} gives way to none."]
    exempt = site.config.get("PreemptExemptTime", "00:00:00")
    protected = (
        [] if exempt in ("00:00:00", "", "NONE") else [f"It is safe for its first {exempt} (PreemptExemptTime)."]
    )
    return [_becomes_of(partition), *protected, _warning(site, partition)]


def _becomes_of(partition: Partition) -> str:
    job, mode = f"A preempted job in partition {partition.name}", partition.preempt_mode.upper()
    if "SUSPEND" in mode:
        return f"{job} is stopped, keeps the memory of its GPUs, and goes on where it stood (PreemptMode={mode})."
    if "CANCEL" in mode:
        return f"{job} is ended by Slurm (PreemptMode=CANCEL); its supervisor puts it back into the queue."
    return f"{job} goes back into the queue (PreemptMode={mode}) and goes on from its last checkpoint."


def _warning(site: Site, partition: Partition) -> str:
    kill = site.config.get("KillWait", "30 sec").replace(" sec", " s")
    whose = "GraceTime, where its QOS has none," if site.preempts == "qos" else "GraceTime"
    if not partition.grace_s:
        return f"It is told and ended at once ({whose} is 0): the last checkpoint has to be written within {kill}."
    told = "USR2" if site.warns_with_user_signal else "TERM"
    return f"It is told by {told} {partition.grace_s} s before ({whose} is {partition.grace_s}): time for a checkpoint."


def _of_signals(site: Site) -> list[str]:
    kill = site.config.get("KillWait", "30 sec")
    lines = [f"Between TERM and KILL are {kill.replace(' sec', ' s')} (KillWait), also when a job is cancelled."]
    if site.preempts != "none" and not site.warns_with_user_signal:
        lines.append(
            "No user signal comes before a preemption (send_user_signal is not set); pathfm obeys TERM as well."
        )
    if site.config.get("JobRequeue") == "0":
        lines.append("Jobs are requeued only if they ask for it (JobRequeue=0); pathfm's do, with --requeue.")
    if site.config.get("ProctrackType", "").endswith("linuxproc"):
        lines.append(
            "Signals reach every process of a rank (ProctrackType=proctrack/linuxproc). A .sif that Apptainer mounts"
        )
        lines.append(
            "without setuid may die of them before it has saved: unpack such an image (apptainer build --sandbox)."
        )
    return lines


def _groups(site: Site, partition: Partition) -> list[NodeGroup]:
    return [group for group in site.nodes if group.partition == partition.name]


def _num_gpus(groups: Sequence[NodeGroup]) -> int:
    return sum(group.number * group.gpus for group in groups)
