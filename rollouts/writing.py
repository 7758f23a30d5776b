"""Text that a search adds to a path, as token ids: the other place, next to `roll_out.encode`, where text becomes ids.

Shared by every engine that offers "write"; needs a tokenizer and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from search.base import Step, Trajectory, derive

ANSWER = "<<answer>>"  # stands for the response in a chat template


def write(tokenizer: Any, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
    """See `search.base.Engine.write`. Raises ValueError for text that the vocabulary cannot spell."""
    steps = path.steps
    if path.end == "stop":
        steps = (*steps[:-1], _without_last(steps[-1]))
    ids = _encode(tokenizer, text, turn)
    added = Step(ids, (0.0,) * len(ids), tokenizer.decode(ids, skip_special_tokens=True), sampled=False)
    return replace(path, steps=(*steps, added), end=None, seed=derive(path.seed, "write", text))


def _encode(tokenizer: Any, text: str, turn: bool) -> tuple[int, ...]:
    """turn: what the chat template puts from the end of an answer to the beginning of the next one."""
    if turn:
        chat = (("user", "?"), ("assistant", ANSWER), ("user", text))
        messages = [{"role": role, "content": content} for role, content in chat]
        page = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = page.partition(ANSWER)[2]
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    back = tokenizer.decode(ids, skip_special_tokens=False)
    if back.strip() != text.strip():
        raise ValueError(f"the tokenizer turns {text!r} into {back!r}: write only what its vocabulary has")
    return ids


def _without_last(step: Step) -> Step:
    """The step less the token that ended the path."""
    n = len(step.ids) - 1
    spans = tuple((version, start, min(end, n)) for version, start, end in step.versions if start < n)
    return replace(step, ids=step.ids[:n], logprobs=step.logprobs[:n], top=step.top[:n], versions=spans)
