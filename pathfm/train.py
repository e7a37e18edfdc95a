"""The ancestors' command: `python -m pathfm.train --config-file F key=value ...`, alone or under torchrun."""

from pathfm.lifecycle.signals import take_notes

if __name__ == "__main__":
    take_notes()  # before torch is imported, which takes seconds in which a signal may come

    from pathfm.dist.groups import run_rank
    from pathfm.jobs.pretrain import main

    run_rank(main)
