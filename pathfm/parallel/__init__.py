"""How a network is spread over ranks, recomputed and compiled, from outside the network."""
