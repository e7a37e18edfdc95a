"""Whether machines, folders and a cluster are fit for a run, found out before the run does."""
