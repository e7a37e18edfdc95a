"""Judge backbones, or tune a run beside the job that trains it: `python launchers/evaluate.py --help`."""

import sys

try:
    from pathfm.errors import exit_status
    from pathfm.jobs.submit_evaluation import main
except ModuleNotFoundError as missing:
    print(
        f"error: no '{missing.name}' in this Python; run 'make env' in the checkout, then use .venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(exit_status(main))
