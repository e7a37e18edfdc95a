"""`python -m pathfm.track.wandb_mirror RUN`, as the trainer starts it."""

from pathfm.track.wandb_mirror.mirror import main

if __name__ == "__main__":
    raise SystemExit(main())
