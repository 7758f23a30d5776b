"""A language model small enough to know everything about: a Markov chain over tokens, served as an Engine.

Marginals by dynamic programming, all paths by enumeration, so that estimators and searches can be held against exact
values. `trap()` is a chain on which greedy decoding, the likeliest path, votes weighted by p and votes by surface are
all wrong, and only the marginal over answer classes is right. Knows nothing of real models.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from search.base import END, Alternative, Ending, Offer, Sampling, Step, Trajectory, Until, derive


@dataclass(frozen=True, eq=False)
class Chain:
    """An order-1 language model. Rows of `transition` sum to 1; `end` is absorbing and ends a path.

    vocabulary: text of each token. answers: the answer that a token is, for tokens that are one.
    """

    vocabulary: tuple[str, ...]
    transition: np.ndarray  # (tokens, tokens)
    answers: Mapping[int, str]
    start: int = 0
    end: int = 1

    def __post_init__(self) -> None:
        rows = self.transition.sum(axis=1)
        if not np.allclose(rows, 1, atol=1e-12):
            raise ValueError(f"rows of the transition matrix sum to {rows.min():g}..{rows.max():g}, not to 1")

    @cached_property
    def successors(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Of each token: (next token, probability), likeliest first."""
        return tuple(
            tuple(sorted(((int(j), float(row[j])) for j in np.flatnonzero(row)), key=lambda pair: (-pair[1], pair[0])))
            for row in self.transition
        )

    def root(self, seed: int = 0) -> Trajectory:
        return Trajectory((self.start,), seed=seed)

    def answer(self, text: str) -> str | None:
        line = next((line for line in reversed(text.splitlines()) if line), None)
        return line if line in self.answers.values() else None

    def marginals(self, max_tokens: int = 10**6) -> tuple[dict[str, float], float]:
        """Exact mass of each answer by forward dynamic programming, and the mass not ended within `max_tokens`.

        A path's answer is the last answer token before the end.
        """
        surfaces = sorted(set(self.answers.values()))
        mass = {(self.start, None): 1.0}  # (token, last answer) -> probability
        done = dict.fromkeys(surfaces, 0.0)
        for _ in range(max_tokens):
            grown: dict[tuple[int, str | None], float] = {}
            for (token, last), p in mass.items():
                for after, q in self.successors[token]:
                    if after == self.end:
                        if last is not None:
                            done[last] += p * q
                    else:
                        key = (after, self.answers.get(after, last))
                        grown[key] = grown.get(key, 0.0) + p * q
            mass = grown
            if not mass:
                break
        return done, math.fsum(mass.values())

    def chance(self, worth: Callable[[str], float]) -> np.ndarray:
        """Expected worth of the answer from each token on: an exact process reward model, by one linear solve.

        For chains in which an answer token ends the path.
        """
        known = np.array([worth(self.answers[i]) if i in self.answers else 0.0 for i in range(len(self.vocabulary))])
        open_ = [i for i in range(len(known)) if i not in self.answers and i != self.end]
        p = self.transition
        solved = np.linalg.solve(np.eye(len(open_)) - p[np.ix_(open_, open_)], p[open_] @ known)
        known[open_] = solved
        return known

    def paths(self, prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
        """Every path that ends, with its log-probability. Only for chains without cycles."""
        stack = [(prefix, 0.0)]
        while stack:
            ids, logprob = stack.pop()
            for after, q in self.successors[ids[-1] if ids else self.start]:
                if after == self.end:
                    yield (*ids, after), logprob + math.log(q)
                else:
                    stack.append(((*ids, after), logprob + math.log(q)))


@dataclass(frozen=True)
class ChainEngine:
    """The chain as an Engine. Exact logprobs, all alternatives, arithmetic sampling."""

    chain: Chain
    sampling: Sampling = field(default_factory=Sampling)
    offers: frozenset[Offer] = frozenset({"logprobs", "top", "arithmetic"})

    def at(self, **changes: float | int | str) -> ChainEngine:
        return replace(self, sampling=replace(self.sampling, **changes))

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        if path.end is not None:
            raise ValueError(f"the path has ended ({path.end}): only an open path can be extended")
        codes: list[float | None] = [None] * n
        if self.sampling.arithmetic:
            shift = random.Random(derive(path.seed, "codes")).random()
            codes = [(i / n + shift) % 1 for i in range(n)]
        return [self._grow(path, i, codes[i], until) for i in range(n)]

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        raise ValueError("the toy chain has no tokenizer: it cannot write text into a path")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chain.vocabulary[i] for i in ids)

    def _grow(self, path: Trajectory, child: int, code: float | None, until: Until) -> Trajectory:
        seed = derive(path.seed, child)
        draw = random.Random(seed).random
        laws = _laws(self.chain, self.sampling.temperature, self.sampling.top_p)
        last = path.ids[-1]
        room = self.sampling.max_tokens - path.length
        if room <= 0:  # `at` lowered the limit
            return replace(path, end="length", seed=seed)
        limit = min(room, until.tokens) if until.kind == "tokens" else room
        ids: list[int] = []
        logprobs: list[float] = []
        top = []
        end: Ending | None = None
        while len(ids) < limit:
            law, sums = laws[last]
            u = draw() if code is None else code
            at = min(bisect.bisect_right(sums, u), len(law) - 1)
            token, p = law[at]
            if code is not None:  # arithmetic decoding: what is left of the code decides the next token
                below = sums[at - 1] if at else 0.0
                code = min((u - below) / p, math.nextafter(1, 0))
            if self.sampling.top:
                top.append(self._top(law, token, p))
            ids.append(token)
            logprobs.append(math.log(p))
            last = token
            if token == self.chain.end:
                end = "stop"
                break
            if until.kind == "step" and self.chain.vocabulary[token].endswith(self.sampling.step):
                break
        if end is None and len(ids) == room:
            end = "length"
        text = "".join(self.chain.vocabulary[i] for i in ids)
        cached = len(path.ids) - 1 if path.steps or child else 0  # as a perfect prefix cache would have it
        return path.grow(Step(tuple(ids), tuple(logprobs), text, top=tuple(top), cached=cached), end=end, seed=seed)

    def _top(self, law: tuple[tuple[int, float], ...], token: int, p: float) -> tuple[Alternative, ...]:
        chosen = law[: self.sampling.top]
        chosen = chosen if (token, p) in chosen else (*chosen, (token, p))
        words = self.chain.vocabulary
        return tuple(Alternative(i, math.log(q), words[i], i == self.chain.end) for i, q in chosen)


Law = tuple[tuple[tuple[int, float], ...], list[float]]


@lru_cache(maxsize=64)
def _laws(chain: Chain, temperature: float, top_p: float) -> list[Law]:
    """Per token: the tempered, truncated law of the next one, and its running sums.

    Greedy choices have no law of their own: they report the model's, and sums above 1 make the first always win.
    """
    laws = []
    for pairs in chain.successors:
        if temperature == 0:
            laws.append((pairs, [2.0] * len(pairs)))
            continue
        p = np.array([q for _, q in pairs])
        if temperature != 1:
            p = p ** (1 / temperature)
            p /= p.sum()
        if top_p < 1:
            p = np.where(np.cumsum(p) - p < top_p, p, 0)
            p /= p.sum()
        law = tuple((i, float(q)) for (i, _), q in zip(pairs, p, strict=True) if q > 0)
        laws.append((law, np.cumsum([q for _, q in law]).tolist()))
    return laws


def same_number(left: str, right: str) -> bool:
    """Equality of answers on the toy chains: $18, 18.0 and 18 are one number."""
    return float(left.strip("$")) == float(right.strip("$"))


def trap(seed: int = 0) -> Chain:
    """Answer at once (D) or reason for 2 to 6 steps on one of two branches (S, T), then answer. 54,565 paths.

    Classes: 60 has mass 0.25, {18, 18.0, $18} 0.5893, 7 has 0.1607. Greedy decoding, the likeliest path (0.22), the
    sum of squares and the likeliest surface all say 60.
    """
    surfaces = ("60", "18", "18.0", "$18", "7")
    laws = {
        "D": (0.55, 0.05, 0.15, 0.05, 0.20),
        "S": (0.05, 0.60, 0.12, 0.10, 0.13),
        "T": (0.05, 0.06, 0.15, 0.60, 0.14),
    }
    shape = np.random.default_rng(seed)
    states, longest, stop = 4, 6, 0.35
    tokens = ["?", "", "D\n", "S\n", "T\n", *surfaces]
    answer = {name: 5 + i for i, name in enumerate(surfaces)}
    middle = {}
    for branch in "ST":  # a token for each (branch, position, state): the state of the walk unrolled to order 1
        for position in range(longest):
            for state in range(states):
                middle[branch, position, state] = len(tokens)
                tokens.append(f"{branch.lower()}{position}{'abcd'[state]}\n")
    p = np.zeros((len(tokens), len(tokens)))
    p[0, [2, 3, 4]] = 0.40, 0.33, 0.27
    p[1, 1] = 1
    for name in surfaces:
        p[answer[name], 1] = 1
        p[2, answer[name]] = laws["D"][surfaces.index(name)]
    for branch in "ST":
        walk = shape.dirichlet([1.5] * states, size=states + 1)  # the last row is the first step
        for state in range(states):
            p[3 + "ST".index(branch), middle[branch, 0, state]] = walk[states, state]
        for position in range(longest):
            leave = 1.0 if position == longest - 1 else stop if position >= 1 else 0.0
            for state in range(states):
                here = middle[branch, position, state]
                for name, q in zip(surfaces, laws[branch], strict=True):
                    p[here, answer[name]] = leave * q
                for after in range(states if leave < 1 else 0):
                    p[here, middle[branch, position + 1, after]] = (1 - leave) * walk[state, after]
    return Chain(tuple(tokens), p / p.sum(axis=1, keepdims=True), {token: name for name, token in answer.items()})


def random_chain(seed: int, depth: int = 3, width: int = 3, answers: int = 4) -> Chain:
    """A small random chain: up to `depth` layers of `width` tokens, then one of `answers` answers."""
    shape = np.random.default_rng(seed)
    layers = [[2 + layer * width + i for i in range(width)] for layer in range(depth)]
    first = 2 + depth * width
    tokens = ["?", "", *(f"m{i}\n" for i in range(depth * width)), *map(str, range(answers))]
    p = np.zeros((len(tokens), len(tokens)))
    p[1, 1] = 1
    for here in range(len(tokens)):
        if here >= first:
            p[here, 1] = 1
        elif here != 1:
            layer = -1 if here == 0 else (here - 2) // width
            after = [*(layers[layer + 1] if layer + 1 < depth else []), *range(first, first + answers)]
            p[here, after] = shape.dirichlet([0.5] * len(after))
    return Chain(tuple(tokens), p / p.sum(axis=1, keepdims=True), {first + i: str(i) for i in range(answers)})
