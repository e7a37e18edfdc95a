"""Crops, colours and masks: parameters are drawn from keyed streams, then applied."""
