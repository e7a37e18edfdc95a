"""Metrics as JSON lines, console, pictures and W&B."""
