"""The command of one task: the trainer, and what starts it on a machine with several GPUs. Pure."""

from collections.abc import Sequence
from pathlib import Path

TRAINER_MODULE = "pathfm.train"


def trainer_command(python: str, config_file: Path, output_dir: Path, overrides: Sequence[str]) -> list[str]:
    """One trainer process. `-u`: a log that a person follows must not sit in a buffer."""
    files = ["--config-file", str(config_file), "--output-dir", str(output_dir)]
    return [python, "-u", "-m", TRAINER_MODULE, *files, *overrides]


def one_process_per_gpu(trainer: Sequence[str]) -> list[str]:
    """The same trainer under torch's own starter, once for every GPU that this machine lets us see."""
    python, *arguments = trainer
    # standalone: a free port, so that two runs on one machine do not meet
    return [python, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=gpu", *arguments[1:]]
