"""The tree that a search grows, as an engine that remembers.

`Tree` wraps an engine and a scorer: it counts tokens, keeps a budget, asks the scorer once per path, and logs every
call. The log is enough to replay the search without the engine (`Replay`), to draw the tree (`nodes`) and to export
training data (`export`). Searches neither know nor care whether the engine they are given is a tree.
Neighbour: `explore` is how callers run one search on one question.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from array import array
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

from search.base import (
    END,
    STEP,
    TOKENS,
    Alternative,
    Engine,
    Offer,
    Sampling,
    Score,
    Search,
    Step,
    Trajectory,
    Until,
    again,
    derive,
)

T = TypeVar("T")
Row = dict[str, Any]


@dataclass
class Ledger:
    """What a search cost, in tokens, calls and seconds."""

    generated: int = 0
    prefilled: int = 0  # prompt and prefix tokens that the engine computed
    cached: int = 0  # prompt and prefix tokens that it still had
    judged: int = 0  # tokens new to the scorer: what an incremental one reads
    calls: int = 0
    cancelled: int = 0  # calls cut off by the search; their tokens are not known here
    seconds: float = 0.0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass
class Record:
    """The memory that a tree and its views with other sampling settings share."""

    budget: int | None = None  # generated tokens
    ledger: Ledger = field(default_factory=Ledger)
    rows: list[Row] = field(default_factory=list)
    reserved: int = 0  # tokens that calls in flight may still generate
    known: set[int] = field(default_factory=set)  # keys of paths that the rows can rebuild
    scores: dict[tuple[int, ...], asyncio.Future[float]] = field(default_factory=dict)
    prompts: set[tuple[int, ...]] = field(default_factory=set)  # read by the scorer


@dataclass(frozen=True)
class Tree:
    """An `Engine` and a `Score` in one, with a ledger, a budget and a log.

    The budget is never exceeded: a call whose children could pass it draws fewer, in the end none. Only a binding
    budget can make a tree depend on the order in which concurrent calls return.
    """

    engine: Engine
    judge: Score | None = None
    record: Record = field(default_factory=Record)

    @property
    def sampling(self) -> Sampling:
        return self.engine.sampling

    @property
    def offers(self) -> frozenset[Offer]:
        return getattr(self.engine, "offers", frozenset({"logprobs"}))

    @property
    def ledger(self) -> Ledger:
        return self.record.ledger

    def at(self, **changes: float | int | str) -> Tree:
        return replace(self, engine=self.engine.at(**changes))

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        return self.engine.write(path, text, turn=turn)

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.decode(ids)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        room = max(1, self.sampling.max_tokens - path.length)
        most = min(room, until.tokens) if until.kind == "tokens" else room
        children: list[Trajectory] = []
        turn = 0
        while len(children) < n and (granted := min(n - len(children), self._grant(most))) > 0:
            children += await self._extend(again(path, turn), granted, until, most)
            turn += 1
        return children

    def _grant(self, most: int) -> int:
        record = self.record
        if record.budget is None:
            return 10**9
        return max(0, (record.budget - record.ledger.generated - record.reserved) // most)

    async def _extend(self, path: Trajectory, n: int, until: Until, most: int) -> list[Trajectory]:
        record, ledger = self.record, self.record.ledger
        record.reserved += n * most
        ledger.calls += 1
        try:
            children = await self.engine.extend(path, n=n, until=until)
        except asyncio.CancelledError:
            ledger.cancelled += 1
            raise
        finally:
            record.reserved -= n * most
        for child in children:
            step = _added(path, child)
            if step is not None:
                ledger.generated += len(step.ids)
                ledger.cached += step.cached
                ledger.prefilled += len(path.ids) - step.cached
        record.rows.append(_extend_row(path, until, self.sampling, children, record.known))
        return children

    def score(self, path: Trajectory) -> Awaitable[float]:
        """The scorer's word on a path, asked once for equal token ids however often it is wanted."""
        assert self.judge is not None, "a search that needs a score says so in check()"
        ids, scores = path.ids, self.record.scores
        if (asked := scores.get(ids)) is None:
            asked = scores[ids] = asyncio.ensure_future(self._score(path, ids))
        return asyncio.shield(asked)  # others may wait for it, too

    async def _score(self, path: Trajectory, ids: tuple[int, ...]) -> float:
        record, read = self.record, len(ids)
        for step in reversed(path.steps):  # back to the longest prefix that the scorer has read
            read -= len(step.ids)
            if ids[:read] in record.scores:
                break
        else:
            read = read if path.prompt in record.prompts else 0
            record.prompts.add(path.prompt)
        record.ledger.judged += len(ids) - read
        value = float(await self.judge(path))
        if math.isnan(value):
            raise ValueError(f"the scorer gave NaN for {path.text[-80:]!r}: a scorer that cannot judge must say why")
        record.rows.append({"kind": "score", "ids": content(path), "value": value})
        return value


@dataclass(frozen=True)
class Outcome:
    """The paths that a search returned, and the tree behind them."""

    paths: list[Trajectory]
    tree: Tree


async def explore(
    search: Search, root: Trajectory, engine: Engine, score: Score | None = None, *, budget: int | None = None
) -> Outcome:
    """Run one search on one question: check it first, then count what it does.

    budget: generated tokens. Cancelling this coroutine cancels what it has in flight.
    """
    if budget is not None and budget < engine.sampling.max_tokens:
        raise ValueError(
            f"budget={budget} tokens is smaller than one path (sampling.max_tokens={engine.sampling.max_tokens}): "
            "raise the budget or lower max_tokens"
        )
    search.check(engine, score)
    tree = Tree(engine, score, Record(budget))
    begun = time.perf_counter()
    try:
        paths = await search.run(root, tree, tree.score if score is not None else None)
    finally:
        tree.ledger.seconds = time.perf_counter() - begun
        for asked in tree.record.scores.values():
            asked.cancel()
    return Outcome(paths, tree)


# -- what searches are written with ---------------------------------------------------------------------------------


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order. When one fails or the caller is cancelled, the others are cancelled and awaited."""
    work = list(work)
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def spread(
    paths: Sequence[Trajectory],
    n: int,
    engine: Engine,
    score: Score | None,
    until: Until = STEP,
    expand: str = "sample",
) -> list[list[Trajectory]]:
    """Up to n distinct children of every path, each scored as soon as it is there; no barrier between paths.

    A child's value is its score, or its log-probability where there is no scorer.
    expand "sample" draws them; "top" takes the n likeliest next tokens.
    """

    async def one(path: Trajectory) -> list[Trajectory]:
        drawn = await (likeliest(path, n, engine) if expand == "top" else engine.extend(path, n=n, until=until))
        first = {child.ids: child for child in reversed(drawn)}  # of equal ones
        distinct = [child for child in drawn if first[child.ids] is child]
        if score is None:
            return [child.valued(child.logprob) for child in distinct]
        values = await together(score(child) for child in distinct)
        return [child.valued(value) for child, value in zip(distinct, values, strict=True)]

    return await together(one(path) for path in paths)


async def likeliest(path: Trajectory, n: int, engine: Engine) -> list[Trajectory]:
    """The n likeliest one-token continuations. Costs one generated token, which is thrown away."""
    drawn = await engine.at(top=n).extend(path, until=TOKENS(1))
    if not drawn or (step := _added(path, drawn[0])) is None:
        return drawn
    last = path.length + 1 >= engine.sampling.max_tokens
    children = []
    for a in sorted(step.top[0], key=lambda a: -a.logprob)[:n]:
        end = "stop" if a.ends else "length" if last else None
        children.append(path.grow(Step((a.id,), (a.logprob,), a.text), end=end, seed=derive(path.seed, "token", a.id)))
    return children


def best(paths: Iterable[Trajectory]) -> list[Trajectory]:
    """Highest value first; ties keep their order."""
    return sorted(paths, key=lambda path: -path.value)


# -- the log --------------------------------------------------------------------------------------------------------


def key(path: Trajectory) -> int:
    """Identity of a path in the log."""
    return _key(path.seed, content(path))


def content(path: Trajectory) -> int:
    """The same for paths with the same tokens, whatever their seeds: what a score belongs to."""
    return _digest(path.ids)


def _key(seed: int, content: int) -> int:
    return _digest((seed, content))


def _digest(numbers: tuple[int, ...]) -> int:
    """As `derive`, for many numbers at once."""
    digest = hashlib.blake2b(array("q", numbers).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _extend_row(
    path: Trajectory, until: Until, sampling: Sampling, children: Sequence[Trajectory], known: set[int]
) -> Row:
    row: Row = {
        "kind": "extend",
        "path": key(path),
        "until": [until.kind, until.tokens],
        "sampling": _sampling_row(sampling),
        "children": [
            {
                "path": _key(child.seed, ids := content(child)),
                "ids": ids,
                "seed": child.seed,
                "end": child.end,
                "step": None if (step := _added(path, child)) is None else _step_row(step),
            }
            for child in children
        ],
    }
    if row["path"] not in known:  # the root, or a path that the search wrote or reseeded itself
        row["whole"] = {
            "prompt": list(path.prompt),
            "seed": path.seed,
            "steps": [_step_row(step) for step in path.steps],
        }
        known.add(row["path"])
    known.update(child["path"] for child in row["children"])
    return row


def _added(path: Trajectory, child: Trajectory) -> Step | None:
    """The step that made the child; None where the path was at its limit already and only learnt that it ended."""
    return child.steps[-1] if len(child.steps) > len(path.steps) else None


def _child(path: Trajectory, row: Row) -> Trajectory:
    if row["step"] is None:
        return replace(path, end=row["end"], seed=row["seed"])
    return path.grow(_step(row["step"]), end=row["end"], seed=row["seed"])


def _step_row(step: Step) -> Row:
    row: Row = {"ids": step.ids, "logprobs": step.logprobs, "text": step.text, "sampled": step.sampled}
    for name in ("versions", "top", "cached"):
        if value := getattr(step, name):
            row[name] = value
    return row


@lru_cache(maxsize=256)
def _sampling_row(sampling: Sampling) -> Row:
    return asdict(sampling)


def _step(row: Mapping[str, Any]) -> Step:
    top = tuple(tuple(Alternative(*a) for a in position) for position in row.get("top", ()))
    versions = tuple(tuple(span) for span in row.get("versions", ()))
    fields = {**row, "ids": tuple(row["ids"]), "logprobs": tuple(row["logprobs"]), "top": top, "versions": versions}
    return Step(**fields)


@dataclass(frozen=True)
class Replay:
    """An engine that answers from a log and generates nothing; with the same search it gives the same paths.

    Where the log ends it goes on with `engine` if there is one: that is how a search resumes.
    """

    rows: Sequence[Row]
    sampling: Sampling
    engine: Engine | None = None
    offers: frozenset[Offer] = frozenset({"logprobs", "top", "arithmetic", "write"})

    def at(self, **changes: float | int | str) -> Replay:
        engine = None if self.engine is None else self.engine.at(**changes)
        return replace(self, sampling=replace(self.sampling, **changes), engine=engine)

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        if self.engine is None:
            raise ValueError("this replay has no engine, so no tokenizer to write with: pass engine=")
        return self.engine.write(path, text, turn=turn)

    def decode(self, ids: Sequence[int]) -> str:
        if self.engine is None:
            raise ValueError("this replay has no engine, so no tokenizer to read with: pass engine=")
        return self.engine.decode(ids)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        wanted = (key(path), [until.kind, until.tokens], _sampling_row(self.sampling))
        for row in self.rows:
            if row["kind"] == "extend" and (row["path"], row["until"], row["sampling"]) == wanted:
                if len(row["children"]) == n:
                    return [_child(path, child) for child in row["children"]]
        if self.engine is None:
            raise ValueError(f"the log has no call like this one (path {wanted[0]}, n={n}, until={until.kind})")
        return await self.engine.extend(path, n=n, until=until)

    async def score(self, path: Trajectory) -> float:
        for row in self.rows:
            if row["kind"] == "score" and row["ids"] == content(path):
                return row["value"]
        raise ValueError(f"the log has no score of {path.text[-80:]!r}")


def ended(rows: Iterable[Row]) -> list[Trajectory]:
    """Every path of the log that ended, whether or not the search returned it."""
    paths: dict[int, Trajectory] = {}
    for row in rows:
        if row["kind"] == "extend":
            if whole := row.get("whole"):
                steps = tuple(map(_step, whole["steps"]))
                paths[row["path"]] = Trajectory(tuple(whole["prompt"]), steps, seed=whole["seed"])
            for child in row["children"]:
                paths[child["path"]] = _child(paths[row["path"]], child)
    return [path for path in paths.values() if path.end]


def nodes(rows: Iterable[Row]) -> list[Row]:
    """The tree for a person or a viewer: one node per path, parents before children, with text, logprob and score."""
    rows = list(rows)
    scores = {row["ids"]: row["value"] for row in rows if row["kind"] == "score"}
    found: dict[int, Row] = {}

    def add(name: int, ids: int | None, parent: int | None, steps: Sequence[Row], end: str | None) -> None:
        logprob = math.fsum(lp for step in steps if step["sampled"] for lp in step["logprobs"])
        found.setdefault(
            name,
            {
                "path": name,
                "parent": parent,
                "text": "".join(step.get("text", "") for step in steps),
                "tokens": sum(len(step["ids"]) for step in steps),
                "logprob": logprob,
                "sampled": all(step["sampled"] for step in steps),
                "score": scores.get(ids),
                "end": end,
            },
        )

    for row in rows:
        if row["kind"] == "extend":
            if "whole" in row:
                add(row["path"], None, None, row["whole"]["steps"], None)
            for child in row["children"]:
                steps = [] if child["step"] is None else [child["step"]]
                add(child["path"], child["ids"], row["path"], steps, child["end"])
    return list(found.values())
