"""The tar + npy data layer: index, data sets, sample order, decoding, loader."""
