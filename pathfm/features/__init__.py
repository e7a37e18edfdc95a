"""A frozen backbone's features of a data set."""
