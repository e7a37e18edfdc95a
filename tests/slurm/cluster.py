"""A real Slurm cluster of two nodes on this machine, while a test needs it: no root, no service, no accounting.

Both slurmd run here under names of their own; everything they write lies in one folder, and they are ended by pid.
"""

import getpass
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
TASKS_PER_NODE = 2

_SLURM_CONF = """
ClusterName=pathfmtest
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
KillWait={kill_wait}
SlurmdTimeout=20
MailProg=/bin/true
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
{nodes}
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode={low_mode} GraceTime={grace} State=UP
PartitionName=high Nodes=n[1-2] Default=NO PriorityTier=10 PreemptMode=OFF State=UP
"""


@dataclass
class Cluster:
    """Two nodes of two tasks each. `with Cluster(folder) as cluster:`; its `environment` leads programs to it."""

    folder: Path
    grace_s: int = 0
    preempt: str = "REQUEUE"  # or CANCEL
    user_signal: bool = False  # at the beginning of the grace time
    job_requeue: bool = True
    kill_wait_s: int = 30
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._configure()
        self._start_munge()
        self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.conf)])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.states() == ["idle", "idle"], 30, self._why)
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.scontrol("-o", "show", "job").splitlines():
            if job.startswith("JobId="):
                self.run("scancel", "--signal=KILL", "--full", job.split()[0].removeprefix("JobId="))
        for name in [*self._processes][::-1]:
            self._end(name)
        _kill_all_below(self.folder)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**inherited, "SLURM_CONF": str(self.conf), "PATH": SEARCH_PATH}

    def start_node(self, node: str) -> None:
        self._start(f"slurmd.{node}", ["slurmd", "-D", "-N", node, "-f", str(self.conf)])

    def kill_node(self, node: str) -> None:
        """The daemon and all that it started, as when the power fails."""
        _kill_tree(self._processes.pop(f"slurmd.{node}").pid)
        for step in _pids_with(f"[{node}]") + _pids_with(f"SLURMD_NODENAME={node}", environment=True):
            _kill_tree(step)

    def states(self) -> list[str]:
        """Of the nodes, in their order."""
        return self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()

    def scontrol(self, *words: str) -> str:
        return self.run("scontrol", *words)

    def run(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def _configure(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(exist_ok=True)
        ports = _free_ports(3)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs=8 RealMemory=4000 Gres=gpu:{TASKS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        parameters = f"{_user_signal(slurm_version())}\n" if self.user_signal else ""
        self.conf.write_text(
            _SLURM_CONF.format(
                host=socket.gethostname(),
                controller_port=ports[0],
                user=getpass.getuser(),
                first_job=random.randrange(
                    1, 60_000
                ),  # ranks of two clusters on one machine meet at ports of their own
                folder=self.folder,
                extra=f"{parameters}JobRequeue={int(self.job_requeue)}",
                nodes=nodes,
                low_mode=self.preempt,
                grace=self.grace_s,
                kill_wait=self.kill_wait_s,
            )
        )
        devices = " ".join(f"Name=gpu File={device}\n" for device in self._devices())
        (self.folder / "gres.conf").write_text(devices)
        if slurm_version() >= (23, 11):  # which look for cgroups even where nothing uses them
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _devices(self) -> list[Path]:
        """Character devices that stand for GPUs: null devices where we may make some, else terminals."""
        made = [self.folder / f"gpu{number}" for number in range(TASKS_PER_NODE)]
        try:
            for path in made:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            return [Path(f"/dev/tty{number}") for number in range(TASKS_PER_NODE)]
        return made

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, env=self.environment)
        key.chmod(0o600)
        own = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        logs = {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        options = [f"--{name}={path}" for name, path in {**own, **logs}.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        wait_for((self.folder / "munge.socket").exists, 20, self._why)

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                words, stdout=out, stderr=out, env=self.environment, cwd=self.folder, start_new_session=True
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _why(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


def missing_programs() -> list[str]:
    """Of Slurm and munge, which Debian has as slurmctld, slurmd, slurm-client, munge."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


def slurm_version() -> tuple[int, int]:
    """Year and month, e.g. (22, 5)."""
    said = subprocess.run(["slurmctld", "-V"], env={"PATH": SEARCH_PATH}, capture_output=True, text=True, check=True)
    year, month = said.stdout.split()[-1].split(".")[:2]
    return int(year), int(month)


def wait_for(is_so: Callable[[], object], seconds: float, why: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come to pass within {seconds:g} s\n{why()}")
        time.sleep(0.1)


def _user_signal(version: tuple[int, int]) -> str:
    """The line of slurm.conf that has USR2 sent at the beginning of a preemption."""
    if version >= (24, 11):
        return "PreemptParameters=send_user_signal"
    return "SlurmctldParameters=preempt_send_user_signal"


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _pids_with(text: str, *, environment: bool = False) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / ("environ" if environment else "cmdline")).read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in words.split("\0"):
                found.append(int(entry.name))
    return found


def _kill_tree(pid: int) -> None:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        below = [int(child) for child in children.read_text().split()]
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return
    for child in below:
        _kill_tree(child)


def _kill_all_below(folder: Path) -> None:
    """Whatever a job left: its processes know the cluster by this variable."""
    for pid in _pids_with(f"SLURM_CONF={folder / 'slurm.conf'}", environment=True):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":  # a cluster to play with: python tests/slurm/cluster.py FOLDER
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with Cluster(Path(sys.argv[1]).absolute()) as playground:
        print(f"export SLURM_CONF={playground.conf}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
