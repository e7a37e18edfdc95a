"""The ancestors' command for `pathfm index`: a tar -> entries and file names."""

from pathfm.jobs.index import main

if __name__ == "__main__":
    raise SystemExit(main())
