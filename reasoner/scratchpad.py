"""A base model that can add one digit with a scratchpad, and knows the form of longer sums but not how to do them.

    4 + 8 =              24 + 58 = 82         24 + 58 =            24 + 58 =
    4+8+0=12             4+8+0=12             Answer: 131          4+8+0=5
    Answer: 12           2+5+1=8                                   2+5+0=11
                         Answer: 82                                Answer: 115

The scratchpad goes from right to left: digit + digit + carry (Nye et al. 2021, arXiv:2112.00114). The warm-up shows one
digit as it is asked (first), any length with the answer in the question (second), and longer sums without it only as
guesses (third) and as work with random results (last). So the base starts near 0 at two digits and a hint helps it,
which is what the few-shot prompts of STaR's own experiment do (Zelikman et al. 2022, arXiv:2203.14465).
Neighbours: `rollouts.tasks.Addition` has the tasks, `base_model.py` the other bases.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoner.base_model import Progress, fingerprint, teach
from reasoner.demonstrations import ALPHABET, Row
from search.base import derive
from verifiers.base import Task

HINTED = "{question} {answer}"  # the question of the middle column


@dataclass(frozen=True)
class Scratchpad:
    """Our MLA + MoE model, taught the scratchpad of addition for a minute. Knows `addition` tasks only."""

    steps: int = 300
    batch: int = 64
    lr: float = 2.5e-3
    hinted: float = 0.5  # share of the demonstrations that have the answer in the question
    longer: float = 0.2  # share that are longer sums without it; the rest work a sum of one digit
    guess: float = 0.7  # share of those longer ones that are guesses; the others are work with slips
    slip: float = 1.0  # chance of a random result in a line of such work
    hidden: int = 96
    layers: int = 3
    expert_width: int = 32

    def check(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if "terms" not in task.meta:
                raise ValueError(
                    f"task {task.id} is no sum of two numbers: set tasks.kind = 'addition', or another base"
                )

    def prepare(self, tasks: Sequence[Task], cache: Path, seed: int, progress: Progress) -> Path:
        folder = cache / f"scratchpad-{fingerprint(self, tasks, seed, 'scratchpad.py')}"
        if not (folder / "config.json").is_file():
            from reasoner.model import char_tokenizer

            tokenizer = char_tokenizer(ALPHABET)
            teach(self, self._rows(tasks, tokenizer, seed), tokenizer, folder, seed, progress)
        return folder

    def _rows(self, tasks: Sequence[Task], tokenizer: Any, seed: int) -> list[Row]:
        """Demonstrations of the three columns, every length of sum equally often."""
        noise = random.Random(derive(seed, "scratchpad"))
        levels: dict[int, list[Task]] = {}
        for task in tasks:
            levels.setdefault(task.meta["level"], []).append(task)
        short, *long = sorted(levels)
        shares = (self.hinted, self.longer if long else 0.0, 1 - self.hinted - self.longer)
        rows = []
        for _ in range(self.steps * self.batch):
            kind = noise.choices(("hinted", "longer", "plain"), shares)[0]
            level = noise.choice({"hinted": [short, *long], "longer": long, "plain": [short]}[kind])
            task = noise.choice(levels[level])
            question, terms = task.question, task.meta["terms"]
            if kind == "hinted":
                question = HINTED.format(question=question, answer=task.reference)
            if kind == "longer" and noise.random() < self.guess:
                text = f"Answer: {sum(noise.choice(levels[level]).meta['terms'])}"  # of another sum
            else:
                text = worked(*terms, slip=self.slip if kind == "longer" else 0.0, noise=noise)
            rows.append(_row(tokenizer, question, text))
        return rows


def worked(a: int, b: int, *, slip: float = 0.0, noise: random.Random = random) -> str:
    """The scratchpad of a sum: worked(24, 58) is "4+8+0=12\\n2+5+1=8\\nAnswer: 82".

    slip: chance that a line has a random result, with which the work goes on.
    """
    lines, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = noise.randrange(20) if noise.random() < slip else int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total}")
        digits, carry = f"{total % 10}{digits}", total // 10
    return "\n".join([*lines, f"Answer: {int(f'{carry}{digits}')}"])


def _row(tokenizer: Any, question: str, text: str) -> Row:
    messages = [{"role": "user", "content": question}]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + response, [False] * len(prompt) + [True] * len(response)
