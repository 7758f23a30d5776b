"""Rollouts to look through in the report: by score, task, step and words, each token with what was known of it.

A journal may hold millions of rollouts; `Excerpt` keeps whole groups evenly over it, within a number of tokens, and the
newest. The page carries them as JSON and a script that builds text nodes alone, so that no text of a model can become
markup. Advantages are what the run's credit rule gives each group by itself. Neighbour: `report`, which puts it on the
page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from reasoner.page import number

MOST_TOKENS = 200_000  # on the page: about 4 MB
NEWEST = 8  # groups always on it

Row = Mapping[str, Any]  # a line of the journal
Advantages = Callable[[Row], list[list[float] | None]]  # of a group: per rollout, per token of its response


class Excerpt:
    """Every k-th group of a stream, k growing so that the tokens kept stay below a limit; and the newest groups."""

    def __init__(self, limit: int = MOST_TOKENS) -> None:
        self._limit, self._every, self._seen, self._tokens = limit, 1, 0, 0
        self._kept: list[tuple[int, int, Row]] = []  # (number, tokens, row)
        self._newest: list[tuple[int, int, Row]] = []

    def add(self, row: Row) -> None:
        tokens = sum(len(step.get("ids") or ()) for r in row.get("rollouts") or () for step in r.get("steps") or ())
        item = (self._seen, tokens, row)
        self._seen += 1
        self._newest = [*self._newest[1 - NEWEST :], item]
        if item[0] % self._every == 0:
            self._kept.append(item)
            self._tokens += tokens
        while self._tokens > self._limit and len(self._kept) > 1:
            self._every *= 2
            self._kept = [each for each in self._kept if each[0] % self._every == 0]
            self._tokens = sum(each[1] for each in self._kept)

    def rows(self) -> list[Row]:
        chosen = {number: row for number, _, row in (*self._kept, *self._newest)}
        return [chosen[number] for number in sorted(chosen)]

    @property
    def seen(self) -> int:
        return self._seen


def section(excerpt: Excerpt, folder: Path) -> str:
    """The part of the page: search fields, a list, and one rollout in full."""
    rows = excerpt.rows()
    if not rows:
        return ""
    pieces, advantages = _spelling(folder), _credit(folder)
    groups = [_group(row, pieces, advantages) for row in rows]
    data = json.dumps({"groups": groups}, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    part = "all groups" if len(rows) == excerpt.seen else f"{len(rows)} of {excerpt.seen:,} groups, evenly over the run"
    return (
        f'<section><h2>Rollouts</h2><p class="note">{part} of the journal. Pick one to see its tokens.</p>'
        f'<div id="finder">{FIELDS}</div><p class="note" id="count"></p><div id="found"></div><div id="shown"></div>'
        f'<script type="application/json" id="rollouts">{data}</script><script>{SCRIPT}</script></section>'
    )


def _group(row: Row, pieces: Callable[[int], str], advantages: Advantages) -> dict[str, Any]:
    task = row.get("task") or {}
    gains = advantages(row)
    prompt = "\n".join(str(message.get("content", "")) for message in task.get("prompt") or ())
    rollouts = [_rollout(r, gain, pieces) for r, gain in zip(row.get("rollouts") or (), gains, strict=True)]
    reference = json.dumps(task.get("reference"), ensure_ascii=False, default=str)[:300]
    head = {
        "step": row.get("step"),
        "version": row.get("version"),
        "task": str(task.get("id")),
        "prompt": prompt[:4000],
    }
    return head | {"reference": reference, "rollouts": rollouts}


def _rollout(rollout: Row, gain: list[float] | None, pieces: Callable[[int], str]) -> dict[str, Any]:
    steps = rollout.get("steps") or []
    verdict = rollout.get("verdict") or {}
    versions: list[Any] = []
    for step in steps:
        own: list[Any] = [None] * len(step.get("ids") or ())
        for span in step.get("versions") or ():
            if len(span) == 3:
                own[span[1] : span[2]] = [span[0]] * (span[2] - span[1])
        versions += own
    flat = [
        (i, lp, step.get("sampled", True))
        for step in steps
        for i, lp in zip_longest(step.get("ids") or (), step.get("logprobs") or ())
    ]
    return {
        "tokens": [pieces(i) for i, _, _ in flat],
        "logprobs": [round(lp, 3) if sampled and number(lp) is not None else None for _, lp, sampled in flat],
        "advantages": [round(each, 3) for each in gain] if gain else None,
        "versions": versions,
        "text": "".join(str(step.get("text") or "") for step in steps),
        "score": verdict.get("score"),
        "status": verdict.get("status"),
        "answer": verdict.get("answer"),
        "why": verdict.get("why"),
        "end": rollout.get("end"),
    }


def _spelling(folder: Path) -> Callable[[int], str]:
    """Token ids to text, by the run's tokenizer where it is there, else the bare numbers."""
    file = folder / "tokenizer" / "tokenizer.json"
    if not file.exists():
        return lambda i: f"‹{i}›"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    known: dict[int, str] = {}

    def spell(i: int) -> str:
        if i not in known:
            known[i] = tokenizer.decode([i], skip_special_tokens=True) or tokenizer.id_to_token(i) or f"‹{i}›"
        return known[i]

    return spell


def _credit(folder: Path) -> Advantages:
    """The credit rule of the run's config; a group that teaches nothing, or a rule that needs more, has none."""
    from reasoner.config import ConfigError, resume
    from rollouts.journal import group_of

    try:
        rule = resume(folder, None).credit
    except (ConfigError, ValueError, KeyError, TypeError):
        return lambda row: [None] * len(row.get("rollouts") or ())

    def advantages(row: Row) -> list[list[float] | None]:
        try:
            found = group_of(dict(row))
            gains = {tuple(s.ids): s.advantages for s in rule(found)}
            return [_of_response(r.trajectory, gains.get(r.trajectory.ids)) for r in found.rollouts]
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            return [None] * len(row.get("rollouts") or ())

    return advantages


def _of_response(path: Any, gains: tuple[float, ...] | None) -> list[float] | None:
    return None if gains is None else list(gains[len(path.prompt) :])


FIELDS = """
<label>words <input id="words" size="18"></label> <label>task <input id="task" size="14"></label>
<label>step <input id="from" size="4" inputmode="numeric">–<input id="to" size="4" inputmode="numeric"></label>
<label>score <input id="least" size="4" inputmode="decimal">–<input id="most" size="4" inputmode="decimal"></label>
<label>colour <select id="colour"><option>logprob</option><option>advantage</option><option>version</option></select>
</label>
"""

SCRIPT = """
"use strict";
(() => {
  const at = id => document.getElementById(id), MOST = 200;
  const groups = JSON.parse(at("rollouts").textContent).groups;
  const all = groups.flatMap(g => g.rollouts.map(r => ({g, r})));
  const add = (to, kind, text, cls) => {
    const e = document.createElement(kind);
    if (text !== undefined) e.textContent = text;
    if (cls) e.className = cls;
    to.appendChild(e);
    return e;
  };
  const limit = (id, other) => at(id).value.trim() === "" ? other : Number(at(id).value);
  const score = r => r.score === null || r.score === undefined ? r.status : Number(r.score).toFixed(2);
  let chosen = null;

  function find() {
    const words = at("words").value.toLowerCase(), task = at("task").value.toLowerCase();
    const from = limit("from", -1), to = limit("to", Infinity);
    const least = limit("least", null), most = limit("most", null);
    const found = all.filter(({g, r}) =>
      (r.text + "\\n" + g.prompt).toLowerCase().includes(words) && g.task.toLowerCase().includes(task)
      && g.step >= from && g.step <= to
      && (least === null || (r.score !== null && r.score >= least))
      && (most === null || (r.score !== null && r.score <= most)));
    const more = found.length > MOST ? ", the first " + MOST + " listed" : "";
    at("count").textContent = found.length + " rollouts" + more;
    const list = at("found");
    list.replaceChildren();
    const table = add(list, "table");
    for (const item of found.slice(0, MOST)) {
      const row = add(table, "tr");
      row.tabIndex = 0;
      for (const text of ["step " + item.g.step, item.g.task, score(item.r), item.r.tokens.length + " tokens",
                          item.r.text.replace(/\\n/g, " ⏎ ").slice(0, 90)]) add(row, "td", text);
      row.onclick = () => { chosen = item; show(); };
      row.onkeydown = event => { if (event.key === "Enter") row.onclick(); };
    }
  }

  function paint(r, i) {
    const way = at("colour").value;
    if (way === "version") {
      const known = r.versions.filter(v => v !== null), v = r.versions[i];
      return v === null || v === undefined ? "" : `hsl(${(v * 47) % 360} 55% 50% / .35)`;
    }
    if (way === "advantage") {
      const a = r.advantages ? r.advantages[i] : 0;
      return a ? `rgb(${a > 0 ? "35 140 80" : "190 60 30"} / ${Math.min(.8, .15 + Math.abs(a) / 1.5)})` : "";
    }
    const lp = r.logprobs[i];
    return lp === null ? "" : `rgb(200 120 20 / ${Math.min(.85, -lp / 4)})`;
  }

  function show() {
    const box = at("shown");
    box.replaceChildren();
    if (!chosen) return;
    const {g, r} = chosen, card = add(box, "article");
    add(card, "h3", g.task + ", step " + g.step + ", score " + score(r));
    add(card, "pre", g.prompt, "prompt");
    const pre = add(card, "pre", undefined, "tokens");
    r.tokens.forEach((token, i) => {
      const e = add(pre, "span", token);
      e.style.background = paint(r, i);
      const facts = [r.logprobs[i] === null ? "not sampled" : "log p " + r.logprobs[i]];
      if (r.advantages) facts.push("advantage " + r.advantages[i]);
      if (r.versions[i] !== null && r.versions[i] !== undefined) facts.push("version " + r.versions[i]);
      e.title = facts.join(", ");
    });
    const sum = r.logprobs.reduce((a, b) => a + (b || 0), 0);
    const spans = [...new Set(r.versions.filter(v => v !== null))];
    const gains = r.advantages ? [...new Set(r.advantages)].slice(0, 6).join(", ") : "none: taught nothing";
    add(card, "p", "reference " + g.reference + " · answer " + r.answer + " · " + (r.why || "") + " · ended: " + r.end
      + " · log p " + sum.toFixed(1) + " · policy " + spans.join(", ") + " (group began at " + g.version + ")"
      + " · advantage " + gains, "why");
  }

  for (const id of ["words", "task", "from", "to", "least", "most"]) at(id).oninput = find;
  at("colour").onchange = show;
  const given = new URLSearchParams(location.hash.slice(1));  // report.html#task=sum/12&least=1 finds at once
  for (const id of ["words", "task", "from", "to", "least", "most", "colour"])
    if (given.has(id)) at(id).value = given.get(id);
  find();
  if (given.has("show")) document.querySelectorAll("#found tr")[Number(given.get("show"))]?.onclick();
})();
"""
