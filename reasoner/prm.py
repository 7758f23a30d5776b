"""Process reward models: how likely a solution is still right after each of its steps.

Two kinds, each a checkpoint folder with a `prm.json` beside the weights:
- generative: a causal language model that says + or - behind a step. One forward pass over a path judges all its steps,
  for nothing is written between them; an engine serves it to a search, one token a step (`score.kind = "prm"`). It goes
  on learning to say right steps itself, so that the same pass tells how much each step surprises it: where a model's
  prediction is complete in its last layer only, no later token can read there what it would have said.
- implicit (Yuan et al. 2024, arXiv:2412.01981): beta x the log-ratio of an outcome-trained model to its reference.

Knows no engine. Neighbours: `step_labels.py` makes the rows it trains on;
`credit.Process` turns its values into advantages.

Shapes: B paths, L tokens (padded on the right), V vocabulary.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reasoner.credit import Decode
from reasoner.model import load, save
from reasoner.step_labels import Row, judged_at
from rollouts.base import Group
from rollouts.score import SIGN_ALONE, ProcessModel, mixed, odds

ROWS = 128  # paths of one forward pass
YES, NO = ProcessModel.yes, ProcessModel.no
HELD_BACK = 10  # of so many questions one trains nothing: `Prm.calibrated` is for it


@dataclass(frozen=True)
class Settings:
    """What stands in prm.json."""

    kind: str = "generative"  # | "implicit"
    delimiter: str = "\n"  # ends a step
    beta: float = 0.05  # implicit: how much a nat of log-ratio counts
    reference: str = ""  # implicit: folder of the model that was trained
    mix: tuple[float, float, float] = SIGN_ALONE  # generative: see `rollouts.score.mixed`
    threshold: float = 0.5  # a step of less value counts as wrong in `bench`


@dataclass
class Prm:
    """A process reward model in memory.

    Example:
        prm = Prm.load(Path("runs/prm"))
        prm.values([(ids, prompt, ends)])  # [[0.99, 0.98, 0.03]]
    """

    model: Any
    tokenizer: Any
    settings: Settings
    reference: Any = None
    tokens: int = 0  # read so far: prompts and responses, each distinct path once per call

    @classmethod
    def load(cls, folder: Path) -> Prm:
        from transformers import AutoTokenizer

        if not (folder / "prm.json").is_file():
            raise ValueError(f"{folder} has no prm.json: give a folder that `reasoner prm train` wrote")
        settings = Settings(**json.loads((folder / "prm.json").read_text()))
        reference = load(settings.reference, torch.float32) if settings.kind == "implicit" else None
        return cls(load(folder, torch.float32), AutoTokenizer.from_pretrained(folder), settings, reference)

    def save(self, folder: Path) -> None:
        save(self.model, self.tokenizer, folder)
        (folder / "prm.json").write_text(json.dumps(asdict(self.settings)) + "\n")

    def values(self, paths: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> list[list[float]]:
        """For each path (ids, length of its prompt, where its steps end): the value in (0, 1) after each step."""
        found = self._read(paths)
        if self.settings.kind == "implicit":
            return found
        return [[mixed(self.settings.mix, *evidence) for evidence in each] for each in found]

    def _read(self, paths: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> list[list[Any]]:
        distinct = sorted({(tuple(ids), prompt, tuple(ends)) for ids, prompt, ends in paths}, key=lambda p: len(p[0]))
        found: dict[Any, list[Any]] = {}
        for start in range(0, len(distinct), ROWS):
            batch = distinct[start : start + ROWS]
            found |= dict(zip(batch, self._batch(batch), strict=True))
            self.tokens += sum(ends[-1] for _, _, ends in batch)
        return [found[tuple(ids), prompt, tuple(ends)] for ids, prompt, ends in paths]

    def calibrated(self, rows: Sequence[Row]) -> Prm:
        """The same model with the mix of sign and surprise that foretells the labels of these rows best (logistic
        regression), and the threshold that names their first wrong steps best. Solutions of one step are left out
        where others are given; itself where the rows have but one kind of step."""
        rows = [row for row in rows if len(row["ends"]) > 1] or rows
        before = self.tokens
        paths = [tokenised(row, self.tokenizer, self.settings.delimiter) for row in rows]
        told = [
            (sign, odds(math.exp(least)), 1.0, value >= 0.5)
            for row, evidence in zip(rows, self._read(paths), strict=True)
            for (sign, least), value in zip(evidence, until_wrong(row["values"]), strict=False)
        ]
        self.tokens = before
        if len({right for *_, right in told}) < 2:
            return self
        told_N4 = torch.tensor(told, dtype=torch.float64)
        mix = logistic(told_N4[:, :3], told_N4[:, 3])
        fitted = replace(self, settings=replace(self.settings, mix=mix))
        values = fitted.values(paths)
        choices = [step / 40 for step in range(4, 37)]  # the one nearest to 1/2 of those that are best
        best = max(choices, key=lambda t: (measured(rows, values, t)["f1"], -abs(t - 0.5)))
        return replace(fitted, settings=replace(fitted.settings, threshold=best), tokens=self.tokens)

    @torch.inference_mode()
    def _batch(self, batch: Sequence[tuple[tuple[int, ...], int, tuple[int, ...]]]) -> list[list[Any]]:
        """Of each step, what `mixed` takes; of an implicit model, its value."""
        ids_BL = pad_sequence([torch.tensor(ids[: ends[-1]]) for ids, _, ends in batch], batch_first=True)
        lengths = torch.tensor([ends[-1] for _, _, ends in batch])
        mask_BL = (torch.arange(ids_BL.shape[1]) < lengths[:, None]).long()
        law_BLV = self._law(self.model, ids_BL, mask_BL)
        said_BL = self._said(law_BLV, ids_BL)
        if self.settings.kind == "generative":
            plus, minus = signs(self.tokenizer)
            sign_BL = law_BLV[..., plus] - law_BLV[..., minus]
            ends_B = [ends for _, _, ends in batch]
            sign_B = [[row[end - 1].item() for end in ends] for row, ends in zip(sign_BL, ends_B, strict=True)]
            return [list(zip(*both, strict=True)) for both in zip(sign_B, map(surprises, said_BL, batch), strict=True)]
        gain_BL = said_BL - self._said(self._law(self.reference, ids_BL, mask_BL), ids_BL)
        for row, (_, prompt, _) in zip(gain_BL, batch, strict=True):
            row[:prompt] = 0.0  # the prompt was not the model's choice
        value_BL = (self.settings.beta * gain_BL.cumsum(1)).sigmoid()
        return [[row[end - 1].item() for end in ends] for row, (_, _, ends) in zip(value_BL, batch, strict=True)]

    @staticmethod
    def _law(model: Any, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Log-probabilities of what follows each token."""
        device = next(model.parameters()).device
        out = model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False)
        return out.logits.float().log_softmax(-1).cpu()

    @staticmethod
    def _said(law_BLV: Tensor, ids_BL: Tensor) -> Tensor:
        """Log-probability of each token itself; 0 for the first."""
        said = law_BLV[:, :-1].gather(-1, ids_BL[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(said, (1, 0))


def signs(tokenizer: Any) -> tuple[int, int]:
    """The tokens of + and -. Raises ValueError where they are not one token each."""
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in (YES, NO)]
    if any(len(each) != 1 for each in ids):
        raise ValueError(f"this tokenizer spells {YES!r} and {NO!r} as {ids}: a judge needs them as one token each")
    return ids[0][0], ids[1][0]


def train(
    rows: Sequence[Row],
    base: Path,
    *,
    steps: int = 800,
    batch: int = 24,
    lr: float = 8e-4,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Prm:
    """A generative process reward model from labelled rows, starting from the checkpoint `base`.

    Each step's label is drawn: + with the step's value as its probability, so that the expected loss is that of the
    soft label. A step behind the first wrong one has no label: what is built on an error is neither right nor wrong.
    The other tokens of right steps are learned as they are (a joint objective, as in Cobbe et al. 2021,
    arXiv:2110.14168). How much the model's surprise counts beside its sign is then fitted on every tenth question,
    which trains nothing else.
    """
    from transformers import AutoTokenizer

    from reasoner.learner import supervise

    model, tokenizer = load(base, torch.float32), AutoTokenizer.from_pretrained(base)
    noise = torch.Generator().manual_seed(seed)
    kept = set(sorted({row["problem"] for row in rows})[HELD_BACK - 1 :: HELD_BACK])
    learned = [row for row in rows if row["problem"] not in kept]
    distinct = {(tuple(r["ids"]), r["prompt"], tuple(r["ends"]), tuple(r["values"])) for r in learned}
    taught = [_taught(path, signs(tokenizer), noise) for path in sorted(distinct)]
    with tempfile.TemporaryDirectory() as scratch:
        options = {"steps": steps, "batch": batch, "lr": lr, "seed": seed, "folder": Path(scratch)}
        inputs = [(ids, mask) for ids, mask, _ in taught]
        supervise(model, tokenizer, inputs, targets=[said for _, _, said in taught], progress=progress, **options)
    prm = Prm(model.eval(), tokenizer, Settings(delimiter=rows[0]["delimiter"]))
    return prm.calibrated([row for row in rows if row["problem"] in kept])


def _taught(path: Any, signs: tuple[int, int], noise: torch.Generator) -> tuple[list[int], list[bool], list[int]]:
    """Of a labelled path: what the model reads, where it learns, and what it is to say there."""
    ids, prompt, ends, values = path
    plus, minus = signs
    ids = [*ids[: ends[-1]], plus]  # what stands behind the last step is never read
    mask, said = [False] * len(ids), list(ids)
    for start, end, value in zip([prompt, *(end + 1 for end in ends)], ends, until_wrong(values), strict=False):
        mask[end], said[end] = True, plus if torch.rand((), generator=noise) < value else minus
        if value >= 0.5:
            mask[start:end] = [True] * (end - start)
    return ids, mask, said


def logistic(inputs_N3: Tensor, right_N: Tensor) -> tuple[float, float, float]:
    """Weights of a logistic regression, held a little towards 0."""
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        gap = torch.nn.functional.binary_cross_entropy_with_logits(inputs_N3 @ weights, right_N)
        gap = gap + 1e-4 * (weights**2).sum()
        gap.backward()
        return gap

    search.step(loss)
    return tuple(weights.tolist())


def until_wrong(values: Sequence[float]) -> Sequence[float]:
    """The values of the steps up to the first wrong one: what is built on an error is neither right nor wrong."""
    return values[: 1 + next((i for i, value in enumerate(values) if value < 0.5), len(values))]


def surprises(said_L: Tensor, path: tuple[Sequence[int], int, Sequence[int]]) -> list[float]:
    """Of each step, the log-probability of its least probable token; 0 for a step without one.

    The first token of a later step does not count: there the model says its sign.
    """
    _, prompt, ends = path
    starts = [prompt, *(end + 1 for end in ends[:-1])]
    return [said_L[a:b].min().item() if a < b else 0.0 for a, b in zip(starts, ends, strict=True)]


_loaded = lru_cache(maxsize=1)(Prm.load)


def with_step_scores(groups: Sequence[Group], folder: str, delimiter: str, decode: Decode) -> list[Group]:
    """The groups with the model's values as the step scores of the verdicts that were scored."""
    prm = _loaded(Path(folder))
    judged = [r.trajectory for group in groups for r in group.scored if r.trajectory.sampled_tokens]
    values = iter(prm.values([(p.ids, len(p.prompt), judged_at(p, delimiter, decode)) for p in judged]))

    def scored(rollout: Any) -> Any:
        if rollout.verdict.status != "scored" or not rollout.trajectory.sampled_tokens:
            return rollout
        return replace(rollout, verdict=replace(rollout.verdict, steps=tuple(next(values))))

    return [replace(group, rollouts=tuple(map(scored, group.rollouts))) for group in groups]


def tokenised(row: Row, tokenizer: Any, delimiter: str) -> tuple[list[int], int, list[int]]:
    """Token ids, length of the prompt and ends of the steps of a row; from its text where it has no ids."""
    if "ids" in row:
        return row["ids"], row["prompt"], row["ends"]
    message = [{"role": "user", "content": row["problem"]}]
    try:
        ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
        prompt, ends = len(ids), []
        for i, step in enumerate(row["steps"]):
            last = i + 1 == len(row["steps"])
            ids += tokenizer.encode(step + ("" if last else delimiter), add_special_tokens=False)
            ends.append(len(ids))
    except Exception as error:  # tokenizers raise Exception itself for what a vocabulary lacks
        raise ValueError(f"problem {row['problem'][:60]!r}: the model's tokenizer cannot spell it ({error})") from None
    return ids, prompt, ends


def bench(rows: Sequence[Row], prm: Prm) -> dict[str, Any]:
    """First-error accuracy in the form of ProcessBench (Zheng et al. 2024, arXiv:2412.06559), and calibration.

    f1: the harmonic mean of the accuracies on wrong solutions (the first wrong step named exactly) and on right ones
        (none named). The first wrong step is the first whose value is below the model's threshold.
    ece: expected calibration error of the value against "no error yet" over the steps up to the first wrong one, in ten
        bins of equal width.
    """
    values = prm.values([tokenised(row, prm.tokenizer, prm.settings.delimiter) for row in rows])
    return measured(rows, values, prm.settings.threshold) | {"tokens_read": prm.tokens}


def measured(rows: Sequence[Row], values: Sequence[Sequence[float]], threshold: float = 0.5) -> dict[str, Any]:
    """`bench` on the values that a judge gave."""
    named = [next((i for i, v in enumerate(each) if v < threshold), -1) for each in values]
    hits = {True: [], False: []}  # by whether the solution is right
    several = []
    judged: list[tuple[float, bool]] = []
    for row, name, each in zip(rows, named, values, strict=True):
        label = row["label"]
        hits[label == -1].append(name == label)
        if label != -1 and len(each) > 1:
            several.append(name == label)
        judged += [(v, i != label) for i, v in enumerate(each) if label == -1 or i <= label]
    right, wrong = _mean(hits[True]), _mean(hits[False])
    return {
        "f1": 2 * right * wrong / (right + wrong) if right and wrong else 0.0,
        "accuracy_on_right": right,
        "accuracy_on_wrong": wrong,
        "accuracy_on_wrong_of_several_steps": _mean(several),
        "right": len(hits[True]),
        "wrong": len(hits[False]),
        "wrong_of_several_steps": len(several),
        "ece": ece(judged),
        "steps_judged": len(judged),
    }


def ece(judged: Sequence[tuple[float, bool]], bins: int = 10) -> float:
    """Sum over bins of (share of the judgements) x |mean value - share that was right| (Guo et al. 2017)."""
    sorted_in: dict[int, list[tuple[float, bool]]] = {}
    for value, right in judged:
        sorted_in.setdefault(min(int(value * bins), bins - 1), []).append((value, right))
    gaps = [abs(sum(v for v, _ in each) - sum(right for _, right in each)) for each in sorted_in.values()]
    return sum(gaps) / len(judged) if judged else float("nan")


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")
