"""Ways to spend compute on one task. The public face of the room, and the registry of its searches by kind.

Imports neither of the other rooms; standard library and numpy only. A new search is one file with a frozen dataclass
(its knobs are the fields) and a line in SEARCHES. Installed packages add theirs through the entry-point group
`reasoner.searches`.
"""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from search.adaptive import Adaptive, allocate
from search.base import (
    END,
    STEP,
    TOKENS,
    Alternative,
    Engine,
    Sampling,
    Score,
    Search,
    Step,
    Trajectory,
    Until,
    again,
    bind,
    derive,
)
from search.beam import Beam
from search.cot import CotDecoding
from search.distinct import Distinct
from search.dvts import Dvts
from search.force import Force
from search.marginal import AtK, Estimate, at_k, estimate
from search.mcts import Mcts
from search.particle import Particle
from search.rebase import Rebase
from search.refine import Refine
from search.rejection import Rejection
from search.revise import Revise
from search.sample import BestOf, Sample
from search.self_score import SelfScore
from search.tree import Ledger, Outcome, Tree, explore

SEARCHES: dict[str, type] = {
    "sample": Sample,
    "best_of": BestOf,
    "adaptive": Adaptive,
    "distinct": Distinct,
    "beam": Beam,
    "dvts": Dvts,
    "rebase": Rebase,
    "mcts": Mcts,
    "refine": Refine,
    "particle": Particle,
    "rejection": Rejection,
    "revise": Revise,
    "force": Force,
    "cot": CotDecoding,
}


def find(kind: str) -> type:
    """The class of a search by its kind. Raises ValueError that names the nearest kind."""
    if kind in SEARCHES:
        return SEARCHES[kind]
    added = {point.name: point for point in entry_points(group="reasoner.searches")}
    if kind in added:
        return added[kind].load()
    known = sorted({*SEARCHES, *added})
    near = difflib.get_close_matches(kind, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"search {kind!r} is unknown: {hint}known: {', '.join(known)}")


__all__ = ["END", "STEP", "TOKENS", "SEARCHES", "Adaptive", "Alternative", "AtK", "Beam", "BestOf", "CotDecoding"]
__all__ += ["Distinct", "Dvts", "Engine", "Estimate", "Force", "Ledger", "Mcts", "Outcome", "Particle", "Rebase"]
__all__ += ["Refine", "Rejection", "Revise", "Sample", "Sampling", "Score", "Search", "SelfScore", "Step", "Trajectory"]
__all__ += ["Tree", "Until", "again", "allocate", "at_k", "bind", "derive", "estimate", "explore", "find"]
