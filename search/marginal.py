"""Max-marginal inference: which answer has the largest total probability over all paths that reach it.

The target is m(a) = sum of p(path) over the paths whose answer is equal to a. Every estimator here turns drawn paths
into masses of answer classes; none of them multiplies votes by p (that estimates sum p^2) and none normalises by
length (that has no probabilistic meaning). Knows nothing of verifiers: `answer` and `equal` are passed in, from
the task's verifier where there is one. Neighbours: `metrics` (accuracy over tasks), `distinct` and `particle` (searches
whose paths carry `log_weight`).

Which model's marginal? Logprobs are of the policy as sampled. At temperature 1 and top_p 1 that is the model itself;
with other settings it is the marginal of the tempered model, unless `target` gives the model's own log p of each path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from search.base import Sampling, Trajectory
from search.metrics import best_of_k, maj_at_k, student_quantile, wilson

Answer = Callable[[str], str | None]
Equal = Callable[[str, str], bool]
Floats = Sequence[float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer with the largest estimated mass, and what stands behind it."""

    answer: str | None  # None: no path finished with an answer
    mass: float
    interval: tuple[float, float]  # 95%, of `mass`; cut to what the drawn paths prove
    unfinished: float  # mass of paths that hit the length limit or gave no answer
    support: tuple[Trajectory, ...]  # distinct paths with this answer, likeliest first
    ess: float  # effective sample size of the weights
    certified: bool  # the drawn paths alone prove that no answer has more mass
    caveat: str  # "" when none
    method: str
    masses: Mapping[str, float]  # of every class, named by its representative, largest first
    leaders: tuple[str, ...]  # more than one on a tie: share the credit
    unseen: float  # 1 - mass of the distinct paths drawn; NaN without logprobs


@dataclass(frozen=True, slots=True)
class AtK:
    """Expected accuracy of an estimator's answer over k of the n draws."""

    value: float
    exact: bool
    subsets: int  # how many were averaged; 0 where a closed form did it
    error: float  # of resampling alone; 0 when exact


@dataclass(frozen=True)
class Draws:
    """Paths reduced to numbers. Class `classes` stands for: no answer, or unfinished."""

    labels: np.ndarray  # (N,)
    classes: int
    keys: np.ndarray  # (N,) equal for equal token ids
    log_q: np.ndarray  # (N,) as sampled
    log_p: np.ndarray  # (N,) of the model whose marginal is wanted
    log_weight: np.ndarray  # (N,)
    weights: np.ndarray | None  # (N,) from a scorer
    slots: np.ndarray | None  # (N, classes + 1) p(answer class | reasoning of the path)
    normalise: bool

    def take(self, rows: Sequence[int]) -> Draws:
        names = ("labels", "keys", "log_q", "log_p", "log_weight", "weights", "slots")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v if v is None else v[list(rows)] for k, v in values.items()})

    def sums(self, values: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        return np.bincount(self.labels[rows], weights=values, minlength=self.classes + 1)

    def firsts(self) -> np.ndarray:
        """Row of the first draw of each distinct path."""
        return np.unique(self.keys, return_index=True)[1]


Masses = tuple[np.ndarray, np.ndarray, float]  # mass and standard error per class (the last: unfinished), ESS


# -- estimators -----------------------------------------------------------------------------------------------------


def vote(d: Draws) -> Masses:
    """Self-consistency (Wang et al. 2023). Unbiased for the model as sampled."""
    n = len(d.labels)
    mass = d.sums(np.ones(n)) / n
    return mass, np.sqrt(mass * (1 - mass) / n), float(n)


def importance(d: Draws) -> Masses:
    """w = p / q. Unbiased while q > 0 wherever p > 0: not under top_p, which loses what it cuts."""
    return _weighted(d, d.log_p - d.log_q, d.normalise)


def particle(d: Draws) -> Masses:
    """Paths of a search that weighs them, by `log_weight`, self-normalised."""
    return _weighted(d, d.log_weight, True)


def weighted(d: Draws) -> Masses:
    """Votes weighted by a scorer; all alike where it likes none. A support score, not a mass under the model."""
    assert d.weights is not None
    with np.errstate(divide="ignore"):
        return _weighted(d, np.log(d.weights) if d.weights.any() else np.zeros(len(d.weights)), True)


def best(d: Draws) -> Masses:
    """All mass on the finished path that the scorer likes most, shared on a tie: best-of-n as an estimator."""
    assert d.weights is not None
    finished = np.flatnonzero(d.labels < d.classes)
    rows = finished if len(finished) else np.arange(len(d.labels))
    rows = rows[d.weights[rows] == d.weights[rows].max()]
    return d.sums(np.full(len(rows), 1 / len(rows)), rows), np.zeros(d.classes + 1), float(len(rows))


def _weighted(d: Draws, log_w: np.ndarray, normalise: bool) -> Masses:
    n, shift = len(log_w), float(log_w.max())
    if shift == -math.inf:  # every particle died
        return np.zeros(d.classes + 1), np.zeros(d.classes + 1), 0.0
    w = np.exp(log_w - shift)
    ess = float(w.sum() ** 2 / (w**2).sum())
    if normalise:
        w /= w.sum()
        mass, square = d.sums(w), (w**2).sum()
        own = d.sums(w**2)
        return mass, np.sqrt(np.maximum(own * (1 - 2 * mass) + mass**2 * square, 0)), ess  # delta method
    w = w * math.exp(shift) / n
    mass = d.sums(w)
    return mass, np.sqrt(np.maximum(d.sums(w**2) - mass**2 / n, 0) * n / max(1, n - 1)), ess


def horvitz_thompson(d: Draws) -> Masses:
    """Each distinct path once, divided by its chance of being drawn: p / (1 - (1 - q)^N). Unbiased.

    Tends to enumeration for many draws and to the vote when every p is tiny. Standard errors: delete-one jackknife.
    """
    n, rows = len(d.labels), d.firsts()
    once = np.unique(d.keys, return_counts=True)[1] == 1
    value = _inverse_inclusion(d, rows, n)
    mass = d.sums(value, rows)
    ess = float(value.sum() ** 2 / (value**2).sum())
    if n > 1:
        fewer = _inverse_inclusion(d, rows, n - 1)
        kept = np.broadcast_to(d.sums(fewer, rows), (once.sum() + 1, d.classes + 1)).copy()
        kept[np.arange(once.sum()), d.labels[rows[once]]] -= fewer[once]  # last row: a repeated draw left out
        if d.normalise:
            kept /= np.maximum(kept.sum(1, keepdims=True), 1e-300)
        copies = np.append(np.ones(once.sum()), n - once.sum())
        centre = copies @ kept / n
        error = np.sqrt((n - 1) / n * (copies @ (kept - centre) ** 2))
    else:
        error = np.full(d.classes + 1, np.nan)
    return (mass / mass.sum() if d.normalise else mass), error, ess


def _inverse_inclusion(d: Draws, rows: np.ndarray, n: int) -> np.ndarray:
    """p / (1 - (1 - q)^n), without cancellation: q / (1 - (1 - q)^n) -> 1 / n for tiny q."""
    q = np.minimum(np.exp(d.log_q[rows]), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(q < 1e-12, 1 / n, q / -np.expm1(n * np.log1p(-q)))
    return np.exp(d.log_p[rows] - d.log_q[rows]) * share


def gumbel(d: Draws) -> Masses:
    """Paths drawn without replacement (Kool et al. 2019): log_weight = log p - log inclusion probability. Unbiased.

    Estimates of different paths are uncorrelated (Duffield et al. 2007), so variances add: w^2 (1 - inclusion).
    """
    rows = d.firsts()
    w = np.exp(d.log_weight[rows])
    inclusion = np.minimum(np.exp(d.log_p[rows] - d.log_weight[rows]), 1.0)
    mass, spread = d.sums(w, rows), w**2 * (1 - inclusion)
    ess = float(w.sum() ** 2 / (w**2).sum())
    if not d.normalise:
        return mass, np.sqrt(d.sums(spread, rows)), ess
    share, total = mass / w.sum(), w.sum()
    variance = d.sums(spread, rows) * (1 - 2 * share) + share**2 * spread.sum()
    return share, np.sqrt(np.maximum(variance, 0)) / total, ess


def rao_blackwell(d: Draws) -> Masses:
    """The answer summed out: mean over paths of p(answer | reasoning). Never more variance than the vote."""
    assert d.slots is not None
    n = len(d.slots)
    error = d.slots.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full(d.classes + 1, np.nan)
    return d.slots.mean(0), error, float(n)


def distinct_sum(d: Draws) -> Masses:
    """Sum of p over the distinct paths: a lower bound, of worth by its certificate only. Biased for few draws."""
    rows = d.firsts()
    p = np.exp(d.log_p[rows])
    return d.sums(p, rows), np.zeros(d.classes + 1), float(p.sum() ** 2 / (p**2).sum())


METHODS: dict[str, Callable[[Draws], Masses]] = {
    "vote": vote,
    "importance": importance,
    "horvitz_thompson": horvitz_thompson,
    "gumbel": gumbel,
    "rao_blackwell": rao_blackwell,
    "particle": particle,
    "prm": weighted,
    "weighted": weighted,
    "best": best,
    "distinct_sum": distinct_sum,
}
_LOGPROBS = {"importance", "horvitz_thompson", "gumbel", "distinct_sum"}
_PLAIN = {"vote", "importance", "horvitz_thompson", "rao_blackwell"}
_SCORED = {"prm", "weighted", "best"}


# -- the public face ------------------------------------------------------------------------------------------------


def last_line(text: str) -> str | None:
    """The last line that is not blank: the answer where no verifier says better."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


def estimate(
    paths: Sequence[Trajectory],
    *,
    equal: Equal | None = None,
    answer: Answer | Sequence[str | None] = last_line,
    method: str = "vote",
    target: Floats | None = None,
    weights: Floats | None = None,
    slots: Sequence[Mapping[str, float]] | None = None,
    sampling: Sampling | None = None,
    normalise: bool = False,
) -> Estimate:
    """The max-marginal answer from paths of one question.

    equal: whether two answers are the same, asked both ways (default: equal text). answer: finds the answer in a
    response, or one answer per path. target: log p of each path under the model whose marginal is wanted, where it is
    not the one sampled from. weights: scores for "prm" and "best" (default: the `value` of each path). slots: for
    "rao_blackwell", the probability of each answer given the path's reasoning (default: read from `Step.top`).
    sampling: how the paths were drawn, so that a tempered marginal is called one. normalise: masses that sum to 1, with
    less variance and a little bias.
    Raises ValueError when the paths lack what the method needs.
    """
    draws, names, classes, odd = _draws(paths, equal, answer, method, target, weights, slots, normalise)
    mass, error, ess = METHODS[method](draws)
    low, high, unseen = _bounds(paths, draws)
    own_model = target is not None or sampling is None or (sampling.temperature == 1 and sampling.top_p == 1)
    finished = mass[:-1]
    order = sorted((i for i in range(len(names)) if finished[i] > 0), key=lambda i: (-finished[i], i))
    caveats = [*_caveats(method, sampling, target, draws), *([f"equality is not transitive: {odd}"] if odd else [])]
    if not order:
        nothing = ["no path finished with an answer"]
        return Estimate(
            None, 0.0, (0.0, 1.0), float(mass[-1]), (), ess, False, "; ".join(nothing + caveats), method, {}, (), unseen
        )
    best = order[0]
    proven = _proven(low[:-1], unseen) if own_model else None
    if proven not in (None, best):
        caveats.append(f"the drawn paths prove that {names[proven]!r} has more mass")
    ends = _interval(method, mass[best], error[best], len(paths), (low[best], high[best]), unseen, own_model)
    rows = [i for i in draws.firsts() if classes[i] == best]
    return Estimate(
        answer=names[best],
        mass=float(mass[best]),
        interval=ends,
        unfinished=float(mass[-1]),
        support=tuple(paths[i] for i in sorted(rows, key=lambda i: (-np.nan_to_num(draws.log_p[i], nan=-1e9), i))),
        ess=ess,
        certified=proven == best and not odd,  # classes that are none prove nothing
        caveat="; ".join(caveats),
        method=method,
        masses={names[i]: float(finished[i]) for i in order},
        leaders=tuple(names[i] for i in order if math.isclose(finished[i], finished[best], rel_tol=1e-9)),
        unseen=unseen,
    )


def require(method: str, search: object, offers: Collection[str]) -> None:
    """Raise ValueError when the estimator cannot work on what this search returns from an engine with these offers.

    Before anything is drawn; `estimate` checks again what was.
    """
    own = search.method
    if method not in METHODS:
        raise ValueError(f"estimator {method!r} is none of {', '.join(METHODS)}")
    if method in _LOGPROBS and "logprobs" not in offers:
        raise ValueError(f"estimator {method!r} needs an engine that gives logprobs: use 'vote', or another engine")
    if method == "rao_blackwell" and ("top" not in offers or not getattr(search, "top", 0)):
        raise ValueError(
            "estimator 'rao_blackwell' needs alternatives: search.top > 0, and an engine that offers 'top'"
        )
    if method in _SCORED and own not in _SCORED:
        raise ValueError(f"estimator {method!r} needs paths with a score: use search.kind = 'best_of'")
    for kind in ("gumbel", "particle"):
        if (method == kind) != (own == kind) and method not in ("distinct_sum", *_SCORED):
            raise ValueError(f"estimator {method!r} does not fit paths that are drawn for {own!r}: leave it out")


def at_k(
    paths: Sequence[Trajectory],
    correct: Sequence[float | None] | Callable[[str], float],
    k: int,
    *,
    method: str = "vote",
    equal: Equal | None = None,
    answer: Answer | Sequence[str | None] = last_line,
    target: Floats | None = None,
    weights: Floats | None = None,
    slots: Sequence[Mapping[str, float]] | None = None,
    seed: int = 0,
    subsets: int = 2000,
) -> AtK:
    """Expected accuracy of the estimator's answer over the k-subsets of n independent draws. Ties share the credit.

    correct: whether each path was judged right (None: not judged), or a judge of answers. Exact for the vote and the
    best (closed forms) and where there are at most `subsets` subsets; else that many are drawn, by `seed`, and `exact`
    is False.
    """
    if method in ("gumbel", "particle", "distinct_sum"):
        raise ValueError(f"method={method!r} needs the whole draw: run the search with n={k} paths instead of at_k")
    draws, names, classes, _ = _draws(paths, equal, answer, method, target, weights, slots, False)
    n = len(paths)
    if not 1 <= k <= n:
        raise ValueError(f"k={k} with n={n} paths: k must lie in 1..n")
    worth = np.zeros(len(names))
    for i, name in enumerate(names):
        if callable(correct):
            worth[i] = correct(name)
        else:
            judged = [float(c) for c, label in zip(correct, classes, strict=True) if label == i and c is not None]
            worth[i] = math.fsum(judged) / len(judged) if judged else 0.0
    if method == "best":
        scores = np.where(draws.labels < len(names), draws.weights, -math.inf).tolist()  # unfinished ones last
        return AtK(best_of_k(scores, np.append(worth, 0.0)[draws.labels].tolist(), k), True, 0, 0.0)
    if method == "vote" or method in ("prm", "weighted") and not draws.weights.any():  # then all paths count alike
        counts = np.bincount(draws.labels, minlength=len(names) + 1).tolist()
        return AtK(maj_at_k(counts[:-1], worth.tolist(), k, blank=counts[-1]), True, 0, 0.0)
    exact = math.comb(n, k) <= subsets
    random = np.random.default_rng(seed)
    chosen = combinations(range(n), k) if exact else (random.choice(n, k, replace=False) for _ in range(subsets))
    values = []
    for rows in chosen:
        finished = METHODS[method](draws.take(rows))[0][:-1]
        best = finished.max(initial=0.0)
        leads = np.isclose(finished, best, rtol=1e-9, atol=0) if best > 0 else np.zeros(len(finished), bool)
        values.append(worth[leads].mean() if leads.any() else 0.0)
    error = 0.0 if exact else float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return AtK(float(np.mean(values)), exact, len(values), error)


def group(answers: Sequence[str | None], equal: Equal | None = None) -> tuple[list[int], list[str], str]:
    """Answer classes: the class of each answer (-1 for None), the name of each class, and a note on odd triples.

    Two answers are one class when `equal` says so in both directions (a verifier's equality may be asymmetric), closed
    under transitivity by union-find. A class is named by its most frequent answer, then the first in sorted order.
    """
    counts: dict[str, int] = {}
    for text in answers:
        if text is not None:
            counts[text] = counts.get(text, 0) + 1
    unique = sorted(counts, key=lambda text: (-counts[text], text))
    parent = {text: text for text in unique}

    def root(text: str) -> str:
        while parent[text] != text:
            parent[text] = text = parent[parent[text]]
        return text

    apart = []
    for left, right in combinations(unique, 2) if equal is not None else ():
        if _agree(equal, left, right) and _agree(equal, right, left):
            a, b = sorted((root(left), root(right)), key=unique.index)
            parent[b] = a
        else:
            apart.append((left, right))
    names = [text for text in unique if root(text) == text]
    index = {text: names.index(root(text)) for text in unique}
    odd = next((f"{a!r} and {b!r} are joined only through others" for a, b in apart if root(a) == root(b)), "")
    return [-1 if text is None else index[text] for text in answers], names, odd


def _agree(equal: Equal, left: str, right: str) -> bool:
    try:
        return bool(equal(left, right))
    except Exception as error:
        raise ValueError(
            f"equal({left!r}, {right!r}) raised {error!r}: give an equality that can judge any two answers, or an "
            "answer= that is None for what is no answer"
        ) from error


def _read(answer: Answer, path: Trajectory) -> str | None:
    try:
        return answer(path.text)
    except Exception as error:
        raise ValueError(f"answer({path.text!r:.80}) raised {error!r}: give None where there is no answer") from error


# -- what the public face is made of --------------------------------------------------------------------------------


def _draws(
    paths: Sequence[Trajectory],
    equal: Equal | None,
    answer: Answer | Sequence[str | None],
    method: str,
    target: Floats | None,
    weights: Floats | None,
    slots: Sequence[Mapping[str, float]] | None,
    normalise: bool,
) -> tuple[Draws, list[str], list[int], str]:
    if weights is None and method in _SCORED and all(path.value is not None for path in paths):
        weights = [path.value for path in paths]
    _check(paths, method, target, weights, slots)
    found = [_read(answer, path) for path in paths] if callable(answer) else list(answer)
    if len(found) != len(paths):
        raise ValueError(f"{len(found)} answers for {len(paths)} paths: give one for each, None where there is none")
    # Unfinished is never a vote, whatever its text seems to say.
    answers = [text if path.end == "stop" else None for path, text in zip(paths, found, strict=True)]
    if method == "rao_blackwell" and slots is None:
        slots = _slots(paths, answer)
    extra = [text for slot in slots or () for text in slot if text not in answers]
    classes, names, odd = group([*answers, *dict.fromkeys(extra)], equal)
    where = dict(zip([*answers, *dict.fromkeys(extra)], classes, strict=True))
    classes = classes[: len(paths)]
    table = None
    if slots is not None:
        table = np.zeros((len(paths), len(names) + 1))
        for i, slot in enumerate(slots):
            for text, p in slot.items():
                table[i, where[text]] += p
        table[:, -1] = np.maximum(0, 1 - table[:, :-1].sum(1))  # cut off by the limit, or among alternatives not seen
    keys: dict[tuple[int, ...], int] = {}
    log_q = np.array([path.logprob for path in paths])
    draws = Draws(
        labels=np.array([c if c >= 0 else len(names) for c in classes]),
        classes=len(names),
        keys=np.array([keys.setdefault(path.ids, len(keys)) for path in paths]),
        log_q=log_q,
        log_p=log_q if target is None else np.asarray(target, dtype=float),
        log_weight=np.array([path.log_weight for path in paths]),
        weights=None if weights is None else np.asarray(weights, dtype=float),
        slots=table,
        normalise=normalise,
    )
    return draws, names, classes, odd


def _check(
    paths: Sequence[Trajectory],
    method: str,
    target: Floats | None,
    weights: Floats | None,
    slots: Sequence[Mapping[str, float]] | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    if not paths:
        raise ValueError("no paths: a marginal needs at least one draw")
    if len({path.prompt for path in paths}) > 1:
        raise ValueError("the paths answer different prompts: estimate one question at a time")
    for name, values in (("target", target), ("weights", weights)):
        if values is not None and len(values) != len(paths):
            raise ValueError(f"{len(values)} values of {name} for {len(paths)} paths: give one for each")
    if method in _SCORED and weights is None:
        raise ValueError(f"method={method!r} needs weights=, one score per path, or paths of a search that scores them")
    if weights is not None and not all(map(math.isfinite, weights)):
        raise ValueError("weights hold NaN or infinity: leave paths out that the scorer could not judge")
    if weights is not None and method != "best" and min(weights) < 0:
        raise ValueError(f"weights go down to {min(weights)}: votes need weights of at least 0")
    if target is not None and any(math.isnan(t) or t > 1e-3 for t in target):
        raise ValueError("target holds NaN or a positive log-probability: give log p of each path in nats")
    if slots is not None and len(slots) != len(paths):
        raise ValueError(f"{len(slots)} slots for {len(paths)} paths: give one for each")
    for slot in slots or ():
        if not (all(p >= 0 for p in slot.values()) and math.fsum(slot.values()) <= 1 + 1e-6):
            raise ValueError(f"slot {dict(slot)} is no distribution: give probabilities of answers, at most 1 in all")
    if method in _LOGPROBS:
        _check_logprobs(paths, method, target)
    if method in _PLAIN and any(path.log_weight for path in paths):
        raise ValueError(
            f"method={method!r} needs paths drawn independently, and these carry weights: use the method of the search "
            "that drew them ('gumbel' after 'distinct', 'particle' after 'particle')"
        )
    if method == "gumbel" and all(path.log_weight == 0 for path in paths) and len(paths) > 1:
        raise ValueError("method='gumbel' needs paths of the search 'distinct', whose log_weight is set")


def _check_logprobs(paths: Sequence[Trajectory], method: str, target: Floats | None) -> None:
    for i, path in enumerate(paths):
        if not -math.inf < path.logprob < 1e-3:
            raise ValueError(
                f"method={method!r} needs logprobs, and path {i} has log p = {path.logprob}: "
                "ask the engine for logprobs of the sampled tokens, or use method='vote'"
            )
    distinct = {path.ids: path.logprob for path in paths}
    total = math.fsum(math.exp(lp) for lp in distinct.values())
    if total > 1.05 and target is None:
        raise ValueError(
            f"the {len(distinct)} distinct paths have total probability {total:.3g} > 1: their logprobs are missing "
            f"(0.0) or of another setting than they were drawn with; use method='vote'"
        )


def _bounds(paths: Sequence[Trajectory], d: Draws) -> tuple[np.ndarray, np.ndarray, float]:
    """What the drawn paths prove: lower and upper mass of each class, and the mass not seen."""
    low = np.zeros(d.classes + 1)
    if np.isnan(d.log_p).any():
        return low, np.ones(d.classes + 1), math.nan
    rows = sorted(d.firsts(), key=lambda i: paths[i].ids)
    # An unfinished path that another continues is already counted in it; sorted, the continuation comes right after.
    followers = [*rows[1:], None]
    pairs = zip(rows, followers, strict=True)
    rows = [i for i, j in pairs if j is None or paths[j].ids[: len(paths[i].ids)] != paths[i].ids]
    p = np.exp(d.log_p[rows])
    low = d.sums(p, np.array(rows))
    total = float(p.sum())
    if total > 1.05:  # logprobs that cannot be of one distribution prove nothing
        return np.zeros(d.classes + 1), np.ones(d.classes + 1), math.nan
    unseen = max(0.0, 1 - total)
    return low, np.minimum(1.0, low + unseen), unseen


def _proven(low: np.ndarray, unseen: float) -> int | None:
    """The class that stays ahead even if all unseen mass goes to its closest rival (or to an answer never seen)."""
    if not len(low) or math.isnan(unseen):
        return None
    order = np.argsort(-low, kind="stable")
    rival = low[order[1]] if len(low) > 1 else 0.0
    return int(order[0]) if low[order[0]] - rival > unseen + 1e-9 else None


def _interval(
    method: str, mass: float, error: float, n: int, proven: tuple[float, float], unseen: float, own_model: bool
) -> tuple[float, float]:
    low, high = proven if own_model and method not in _SCORED else (0.0, 1.0)
    if method in ("distinct_sum", "best") or n == 1:
        return float(low), float(high)
    z = student_quantile(0.975, n - 1)
    if method == "vote":
        left, right = wilson(mass, n, z)
    elif error > 0:
        left, right = mass - z * error, mass + z * error
    else:  # no spread seen says nothing about what was not drawn, unless nothing is left
        left, right = (low, high) if not unseen < 1e-9 else (mass, mass)
    left, right = max(left, low), min(right, high)
    return (float(left), float(right)) if left <= right else (float(low), float(high))


def _caveats(method: str, sampling: Sampling | None, target: Floats | None, d: Draws) -> list[str]:
    notes = []
    if method in _SCORED:
        notes.append("weighted by a scorer: a support score, not a mass under the model")
        if method != "best" and not d.weights.any():
            notes.append("all weights are 0: the paths count alike")
    if method == "distinct_sum":
        notes.append("a lower bound, biased towards likely paths: trust it only when certified")
    if method == "particle":
        notes.append("particles share ancestors: the interval is too narrow")
    if sampling is not None and sampling.top_p < 1 and target is not None:
        notes.append(f"top_p={sampling.top_p:g} never draws some paths: their mass is missing")
    elif sampling is not None and target is None and (sampling.temperature != 1 or sampling.top_p < 1):
        setting = f"temperature={sampling.temperature:g}, top_p={sampling.top_p:g}"
        notes.append(f"the marginal of the model sampled at {setting}, not of the model: draw at 1 and 1 for that")
    if method == "importance" and target is None:
        notes.append("no target given: every weight is 1, as in the vote")
    if len(d.labels) and (d.labels == d.classes).all():
        notes.append("all mass is unfinished: raise max_tokens")
    return notes


def _slots(paths: Sequence[Trajectory], answer: Answer | Sequence[str | None]) -> list[dict[str, float]]:
    """`read_slot` of each path. Raises ValueError where answers go on too often to be read from one token."""
    slots, going_on = zip(*(read_slot(path, answer) for path in paths), strict=True)
    if math.fsum(going_on) > 0.01 * len(paths):
        raise ValueError(
            "method='rao_blackwell' reads answers of one token that ends the path, but these paths go on after it with "
            f"a chance of {math.fsum(going_on) / len(paths):.2g}: pass slots=, or use method='vote'"
        )
    return list(slots)


def read_slot(path: Trajectory, answer: Answer | Sequence[str | None] = last_line) -> tuple[dict[str, float], float]:
    """p(answer | reasoning) from the alternatives at the path's answer token, and the chance that it went on after it.

    Works where every answer is one token that ends the path (else pass `slots`): each alternative there is put in its
    place and read by `answer`. Left out are those that give no answer, and those that end a line where the path's own
    token does not, or the other way round: they are of another kind. With all alternatives listed it is exact.
    """
    if not callable(answer):
        raise ValueError("method='rao_blackwell' reads alternatives by answer(text): pass a function, or slots=")
    found = answer(path.text)
    if path.end != "stop" or found is None:
        return {}, 0.0
    tokens = [(step, i) for step in path.steps for i in range(len(step.ids))]
    tail, ending = "", 0.0
    for step, i in reversed(tokens):
        if not step.top:
            break
        own = next((a.text for a in step.top[i] if a.id == step.ids[i]), None)
        if own is None:
            break
        tail = own + tail
        before = path.text[: len(path.text) - len(tail)] if tail else path.text
        if own.strip() and answer(before + own) == found:
            slot: dict[str, float] = {}
            for a in step.top[i]:
                alike = a.text.strip() and a.text.endswith("\n") == own.endswith("\n")
                text = answer(before + a.text) if alike else None
                if text is not None and text != answer(before):
                    slot[text] = slot.get(text, 0.0) + math.exp(a.logprob)
            if found in slot:  # given that the path answers here: other alternatives would have gone on reasoning
                total = math.fsum(slot.values())
                return {text: p / total for text, p in slot.items()}, -math.expm1(min(ending, 0.0))
        elif own.strip():
            break
        ending += step.logprobs[i]
    raise ValueError(
        "method='rao_blackwell' needs the alternatives at a one-token answer: draw with engine.at(top=K), "
        "or pass slots=, one mapping from answer to probability per path"
    )
