"""What a response's length does to its reward: answers that were cut off, and answers that come close to it.

Changes groups before credit sees them; the verdicts stay as the verifier gave them. Knows no rule of credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollouts.base import Group, Rollout


@dataclass(frozen=True, slots=True)
class Length:
    """The `[length]` table of a config.

    drop_truncated: leave paths that hit `sampling.max_tokens` out of their group, since they were not wrong but cut
        off. (Where whole groups are cut off, nothing is learned from them: raise max_tokens.)
    overlong: over the last so many tokens before the limit a reward falls from 0 to -1 below the verdict's score
        (soft overlong punishment of DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13); 0: it does not.
    """

    drop_truncated: bool = False
    overlong: int = 0

    def __post_init__(self) -> None:
        if self.overlong < 0:
            raise ValueError(f"overlong = {self.overlong} must be a number of tokens, 0 for none")

    def __call__(self, groups: Sequence[Group], limit: int) -> list[Group]:
        """The groups as credit is to see them. limit: `sampling.max_tokens`."""
        return [replace(group, rollouts=tuple(self._seen(group.rollouts, limit))) for group in groups]

    def _seen(self, rollouts: Sequence[Rollout], limit: int) -> list[Rollout]:
        kept = [r for r in rollouts if not (self.drop_truncated and r.trajectory.end == "length")]
        if not self.overlong:
            return kept
        return [replace(r, bonus=-self._excess(r.trajectory.length, limit)) for r in kept]

    def _excess(self, length: int, limit: int) -> float:
        """0 up to limit - overlong tokens, 1 at the limit, straight in between."""
        return min(1.0, max(0.0, (length - (limit - self.overlong)) / self.overlong))
