"""From a profile to a submitted job; never imports torch."""
