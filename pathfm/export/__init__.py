"""Weights in the layouts that others load."""
