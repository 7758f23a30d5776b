"""Ways to spend compute on one task. Imports neither of the other rooms; standard library and numpy only."""

from search.base import END, STEP, TOKENS, Engine, Sampling, Score, Search, Step, Trajectory, Until, derive

__all__ = ["END", "STEP", "TOKENS", "Engine", "Sampling", "Score", "Search", "Step", "Trajectory", "Until", "derive"]
