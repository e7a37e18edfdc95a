"""The ancestors' command: `python -m pathfm.train --config-file F key=value ...`, alone or under torchrun."""

from pathfm.errors import exit_status
from pathfm.lifecycle.signals import take_notes

if __name__ == "__main__":
    take_notes()  # before torch is imported, which takes seconds in which a signal may come

    from pathfm.jobs.pretrain import main

    raise SystemExit(exit_status(main))
