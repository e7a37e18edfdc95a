"""Headers of uncompressed tars: plain ones by the thousand, odd ones one by one, and how their bytes are fetched."""
