"""Searches behind the patterns: row permutations (K-means, annealing) and the order of inputs within 2:4."""

__all__: list[str] = []
