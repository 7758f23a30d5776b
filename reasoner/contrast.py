"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476): a step takes further batches until enough groups teach.

Knows no engine and no credit rule. Neighbours: `rollouts.feed` gives the batches, `train.steps` calls this.
"""

from __future__ import annotations

from collections.abc import Callable

from rollouts.base import Group
from rollouts.feed import Batch


def until_contrast(take: Callable[[], Batch], wanted: int, rounds: int) -> Batch:
    """One batch made of those taken: more than one, `rounds` more at most, while less than `wanted` groups disagree.

    Nothing is thrown away: groups that agree are in it, to be counted, and credit finds nothing to learn from them.
    """
    batch = take()
    for _ in range(rounds):
        if sum(map(disagrees, batch.groups)) >= wanted:
            break
        batch = _joined(batch, take())
    return batch


def disagrees(group: Group) -> bool:
    """Whether the scores of a group differ: what every rule that compares paths learns from."""
    return len({r.verdict.score for r in group.scored}) > 1


def _joined(first: Batch, second: Batch) -> Batch:
    return Batch(
        groups=first.groups + second.groups,
        lags=first.lags + second.lags,
        dropped={**first.dropped, **second.dropped},
        generate_s=first.generate_s + second.generate_s,
        in_flight=second.in_flight,
    )
