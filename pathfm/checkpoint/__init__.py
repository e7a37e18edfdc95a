"""Checkpoints that exist completely or not at all."""
