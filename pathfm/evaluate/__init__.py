"""What features are worth: kNN and metrics."""
