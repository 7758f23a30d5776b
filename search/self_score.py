"""A model as its own process judge: one token, read from the alternatives, so that the prefix cache serves it too.

The scorer for searches where no process reward model is at hand. It sees the path alone, never a reference answer.
Neighbour: `rollouts` binds trained reward models; both are a `Score`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from search.base import TOKENS, Engine, Trajectory

ASK = "Is the solution so far free of mistakes? Answer yes or no."


@dataclass(frozen=True)
class SelfScore:
    """P(yes) / (P(yes) + P(no)) for the next token after asking (Kadavath et al. 2022); 0.5 if neither is listed.

    engine: of the same or another model; offers "write" and "top". All spellings of the one-token answers count
    ("Yes", " yes"); their words may be changed for a model whose tokenizer splits them.

    A generative process reward model is a model trained to say + or - behind each step (`reasoner prm train`):
    ask="", yes="+", no="-", turn=False.

    Example:
        await explore(Beam(), root, engine, SelfScore(engine))
    """

    engine: Engine
    ask: str = ASK
    yes: str = "yes"
    no: str = "no"
    top: int = 20
    turn: bool = True  # ask as the user's next message; False: read the answer right behind the path and `ask`

    def __post_init__(self) -> None:
        missing = {"write", "top"} - set(getattr(self.engine, "offers", ()))
        if missing:
            raise ValueError(
                f"SelfScore needs an engine that offers {' and '.join(sorted(missing))}; "
                f"{type(self.engine).__name__} does not: use a verifier or a process reward model as the score"
            )

    async def __call__(self, path: Trajectory) -> float:
        asked = self.engine.write(path, self.ask, turn=self.turn)
        engine = self.engine.at(temperature=0.0, top=self.top, max_tokens=asked.length + 1)
        (answered,) = await engine.extend(asked, until=TOKENS(1))
        listed = answered.steps[-1].top[0]
        yes, no = (self._mass(listed, word) for word in (self.yes, self.no))
        return yes / (yes + no) if yes + no > 0 else 0.5

    @staticmethod
    def _mass(listed, word: str) -> float:
        return math.fsum(math.exp(a.logprob) for a in listed if a.text.strip().lower() == word.lower())
