"""The ancestors' command for `pathfm concat`: the indices of cohorts -> one."""

import sys

try:
    from pathfm.jobs.concat import main
except ModuleNotFoundError as missing:
    print(
        f"error: no '{missing.name}' in this Python; run 'make env' in the checkout, then use .venv/bin/python",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
