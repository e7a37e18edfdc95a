"""Where things are put together, one page per verb."""
