"""A process that shows a run's files to W&B: what is new, what was sent, the client, and how it all ends."""
