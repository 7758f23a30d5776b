"""Where tasks come from: reasoning-gym generators, JSONL files, Hugging Face datasets, sums of two numbers.

A source is a frozen dataclass whose fields are its TOML keys; `load()` gives (training, held-out) tasks. No question of
the held-out tasks occurs in training. Whether a verifier can read the references is asked by the caller
(`Verifier.check`): this file knows no judge, no engine and no learner. The two libraries are imported when first used
(`import reasoning_gym` takes 0.7 s, `import datasets` 0.5 s).

In every source `prompt` is a template over the fields of an entry, as in `str.format`: "{question}",
"{expression} =", "{question}\\nThink, then give \\\\boxed{{}}." A field that holds the reference is refused in it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from search.base import derive
from verifiers.base import Message, Task

Split = tuple[list[Task], list[Task]]  # training, held-out
Row = tuple[str, Mapping[str, Any]]  # where it was read (for messages and ids), and its fields

DRY = 1000  # a generator that gives nothing new so many times in a row is taken to be exhausted
SECRETS = ("answer", "solution")  # entry fields with these words in their names are never offered to a prompt


class Source(Protocol):
    def load(self) -> Split:
        """Training and held-out tasks, neither empty. Raises ValueError with the remedy."""
        ...


@dataclass(frozen=True)
class ReasoningGym:
    """Instances of one reasoning-gym generator, all questions distinct, split by seed.

    `prompt` sees the question and the metadata of an entry: for chain_sum "{expression} =" gives "4 - 1 - 7 =".

    Example:
        ReasoningGym("chain_sum", {"max_digits": 1}, train=4000, heldout=200, seed=1, prompt="{expression} =").load()
    """

    dataset: str = "chain_sum"
    params: Mapping[str, Any] = field(default_factory=dict)  # of the generator: max_terms, max_digits ...
    train: int = 1000
    heldout: int = 200
    seed: int = 0
    verifier: str = "math"  # "reasoning_gym" scores with the generator's own rule and gets the whole entry
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        if self.train < 1 or self.heldout < 1:
            raise ValueError(f"train={self.train} and heldout={self.heldout}: each needs at least 1 task")
        for key in ("seed", "size"):
            if key in self.params:
                raise ValueError(
                    f"params.{key} = {self.params[key]} would be overwritten: set the source's own `seed`, `train` and "
                    "`heldout`, from which the generator's are made"
                )

    def load(self) -> Split:
        seen: set[str] = set()
        heldout = self._distinct("heldout", self.heldout, seen)  # first, so that `train` never changes it
        train = self._distinct("train", self.train, seen)
        return apart(train, heldout)

    def _distinct(self, split: str, wanted: int, seen: set[str]) -> list[Task]:
        tasks: list[Task] = []
        dry = 0
        for entry in self._entries(split):
            task = self._task(entry, f"{self.dataset}/{split}/{len(tasks)}")
            dry += 1
            if task.question not in seen:
                seen.add(task.question)
                tasks.append(task)
                dry = 0
            if len(tasks) == wanted:
                return tasks
            if dry == DRY:
                break
        raise ValueError(
            f"{self.dataset} gave {len(seen)} distinct questions of the {self.train + self.heldout} asked for "
            f"(train={self.train}, heldout={self.heldout}): ask for fewer or widen one of {self._widths()}"
        )

    def _entries(self, split: str) -> Iterator[dict[str, Any]]:
        """Endless. The library seeds instance i with seed + i; a hashed seed per part keeps parts from overlapping."""
        for part in count():
            seed = derive(self.seed, self.dataset, split, part) % 2**31
            yield from _generator(self.dataset, {**self.params, "seed": seed, "size": DRY})

    def _task(self, entry: Mapping[str, Any], name: str) -> Task:
        meta = entry.get("metadata", {})
        fields = {k: v for k, v in meta.items() if not any(word in k for word in SECRETS)}
        prompt = messages(self.prompt, {**fields, "question": entry["question"]}, self.dataset)
        own = self.verifier == "reasoning_gym"
        reference = {"dataset": self.dataset, "entry": entry} if own else entry["answer"]
        return Task(name, prompt, reference, self.verifier, meta)

    def _widths(self) -> str:
        knobs = vars(_generator(self.dataset, dict(self.params)).config)
        widths = {k: v for k, v in knobs.items() if k.startswith("max_")} or knobs
        return ", ".join(f"{k}={v}" for k, v in widths.items() if k not in ("seed", "size"))


@dataclass(frozen=True)
class Jsonl:
    """One task per line of a JSONL file. Held-out tasks are another file, or a fraction of the first.

    The fraction is drawn by the hash of each question, so a question never changes sides when lines are added.
    """

    path: str
    heldout_path: str = ""
    heldout: float = 0.0  # fraction of `path`, when there is no `heldout_path`
    seed: int = 0
    prompt: str = "{question}"  # a field with a list of messages is used as it is: "{messages}"
    reference: str = "answer"  # name of the field
    id: str = ""  # name of the field; without it the line number
    verifier: str = "math"

    def __post_init__(self) -> None:
        if bool(self.heldout_path) == (self.heldout != 0.0) or not 0.0 <= self.heldout < 1.0:
            raise ValueError(
                f"heldout_path={self.heldout_path!r} and heldout={self.heldout}: "
                "give one of them, a file or a fraction between 0 and 1"
            )

    def load(self) -> Split:
        tasks = self._tasks(self.path)
        if self.heldout_path:
            return apart(tasks, self._tasks(self.heldout_path))
        held = {t.question for t in tasks if derive(self.seed, t.question) < self.heldout * 2**63}
        train = [t for t in tasks if t.question not in held]
        return apart(train, [t for t in tasks if t.question in held])

    def _tasks(self, path: str) -> list[Task]:
        return _tasks(_lines(Path(path)), self.prompt, self.reference, self.id, self.verifier, Path(path).stem)


@dataclass(frozen=True)
class Datasets:
    """Two splits of anything `datasets` loads: a name on the Hub, a folder of files, or the result of `save_to_disk`.

    Splits may be slices: train_split="train[:90%]", heldout_split="train[90%:]" (not after `save_to_disk`).
    """

    name: str
    subset: str = ""
    train_split: str = "train"
    heldout_split: str = "test"
    prompt: str = "{question}"
    reference: str = "answer"
    id: str = ""  # name of the field; without it the row number
    verifier: str = "math"

    def load(self) -> Split:
        return apart(self._tasks(self.train_split), self._tasks(self.heldout_split))

    def _tasks(self, split: str) -> list[Task]:
        rows = ((str(i), row) for i, row in enumerate(_dataset(self.name, self.subset, split)))
        return _tasks(rows, self.prompt, self.reference, self.id, self.verifier, f"{Path(self.name).name}/{split}")


@dataclass(frozen=True)
class Addition:
    """Sums of two numbers with equally many digits, "24 + 58 =", every length from 1 to `digits` equally often.

    All questions are distinct, so one digit has only 80 sums for training and 20 held out; longer ones take the places
    that are left. `meta["level"]` is the number of digits.
    """

    digits: int = 3
    train: int = 3000
    heldout: int = 300
    seed: int = 0
    verifier: str = "math"

    def __post_init__(self) -> None:
        if self.digits < 1 or min(self.train, self.heldout) < self.digits:
            raise ValueError(
                f"digits={self.digits}, train={self.train}, heldout={self.heldout}: give at least 1 digit, and on each "
                "side at least one task for each length"
            )

    def load(self) -> Split:
        train: list[Task] = []
        heldout: list[Task] = []
        for digits in range(1, self.digits + 1):
            low, high = (0, 10) if digits == 1 else (10 ** (digits - 1), 10**digits)
            every = (high - low) ** 2
            left = self.digits - digits + 1  # lengths that share what is still wanted
            held = min((self.heldout - len(heldout)) // left, every // 5)
            learned = min((self.train - len(train)) // left, every * 4 // 5)
            noise = random.Random(derive(self.seed, "addition", digits))
            first = noise.sample(range(every), held)  # whatever `train` is
            then = [i for i in noise.sample(range(every), held + learned) if i not in set(first)][:learned]
            for side, name, drawn in ((heldout, "heldout", first), (train, "train", then)):
                side += [self._task(low + i // (high - low), low + i % (high - low), digits, name) for i in drawn]
        return apart(train, heldout)

    def _task(self, a: int, b: int, digits: int, side: str) -> Task:
        prompt = ({"role": "user", "content": f"{a} + {b} ="},)
        meta = {"level": digits, "terms": [a, b]}
        return Task(f"addition/{side}/{a}+{b}", prompt, str(a + b), self.verifier, meta)


SOURCES: dict[str, type[Source]] = {
    "reasoning_gym": ReasoningGym,
    "jsonl": Jsonl,
    "datasets": Datasets,
    "addition": Addition,
}


def apart(train: list[Task], heldout: list[Task]) -> Split:
    """The split itself, after refusing an empty side, equal ids, and a held-out question that occurs in training."""
    for side, tasks in (("training", train), ("held-out", heldout)):
        if not tasks:
            total = len(train) + len(heldout)
            raise ValueError(f"there are no {side} tasks ({total} in all): add some or split otherwise")
    names = Counter(task.id for task in train + heldout)
    name, times = names.most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} tasks have the id {name!r}: name a field whose values are unique, or leave `id` out")
    trained = {task.question: task.id for task in train}
    leaks = [task for task in heldout if task.question in trained]
    if leaks:
        raise ValueError(
            f"{len(leaks)} of {len(heldout)} held-out questions occur in training, the first is {leaks[0].id} = "
            f"{trained[leaks[0].question]}: remove them from one side"
        )
    return train, heldout


def _tasks(rows: Iterable[Row], prompt: str, reference: str, id: str, verifier: str, name: str) -> list[Task]:
    """Rows of a file or a dataset as tasks. The ids begin with `name`."""
    tasks = []
    for place, row in rows:
        where = f"{name}, row {place}"
        key = str(_take(row, id, where)) if id else place
        fields = {k: v for k, v in row.items() if k != reference}
        answer = _take(row, reference, where)
        tasks.append(Task(f"{name}/{key}", messages(prompt, fields, where), answer, verifier, fields))
    return tasks


def _take(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where}: no field {key!r}{nearest(key, row)}")
    return row[key]


def messages(template: str, fields: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt={template!r}: {error}; write {{{{ and }}}} for braces in the text") from None
    for name in names:
        if name not in fields:
            raise ValueError(
                f"{where}: prompt={template!r} names the field {name!r}, which is not there or would show the reference"
                f" (for braces in the text write {{{{ and }}}}){nearest(name, fields)}"
            )
    if len(names) == 1 and template == f"{{{names[0]}}}" and isinstance(fields[names[0]], list):
        return _checked(fields[names[0]], where)
    return ({"role": "user", "content": template.format_map(fields)},)


def _checked(messages: list[Any], where: str) -> tuple[Message, ...]:
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: {message!r} is not a message: write {{'role': 'user', 'content': 'text'}}")
    return tuple(messages)


def _lines(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the path of a JSONL file, from where the command is run")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON, or bytes that are not UTF-8
            raise ValueError(f"{path}, line {number}: {error}; every line must be one JSON object in UTF-8") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__} instead of an object: write {{...}}")
        yield str(number), row


def _generator(dataset: str, params: dict[str, Any]) -> Any:
    """A reasoning-gym dataset, with its errors turned into ours."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise ValueError(f"reasoning-gym has no dataset {dataset!r}{nearest(dataset, DATASETS)}")
    known = [f.name for f in dataclasses.fields(DATASETS[dataset][1])]
    for key in params:
        if key not in known:
            raise ValueError(f"{dataset} has no parameter {key!r}{nearest(key, known)}")
    try:
        return reasoning_gym.create_dataset(dataset, **params)
    except (AssertionError, TypeError) as error:  # the library checks its parameters by assert
        raise ValueError(f"{dataset} refuses {params}: {error}") from None


def _dataset(name: str, subset: str, split: str) -> Any:
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, subset or None, split=split)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"cannot load split {split!r} of {name!r} (subset {subset!r}): {error}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """What the message about an unknown name ends with: the known name that is most like it, or the first thirty."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f". Did you mean {close[0]}?" if close else f". Known: {', '.join(known[:30])}"
