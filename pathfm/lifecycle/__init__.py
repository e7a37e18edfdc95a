"""A run's directory, its lock, its provenance and why it ended."""
