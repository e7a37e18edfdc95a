"""Vision transformers and projection heads, with the official weight names."""
