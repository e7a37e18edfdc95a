"""Whether data sets can be trusted: rows, samples, labels, and what two of them share."""
