"""One page about a run: did the model learn, where did the time go, what did it write.

`write_report` reads what a run leaves (summary.json, metrics.jsonl, events.jsonl, journal.jsonl, config.json), whole or
half written, and writes report.html beside them: one file, nothing loaded from elsewhere, so it can be mailed and kept.
Every figure on it is read from those files. Only looking through the rollouts needs a script; the rest is there without
one. Knows no model and no engine: the files are the interface.

Neighbours: `page` has the document, the style and the scales, `timeline` and `browser` a section each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from reasoner import browser, timeline
from reasoner.browser import Excerpt
from reasoner.page import document, down, duration, integer, number, percent, scale, short, svg

MEASURES = ("greedy", "mean_at_k", "pass_at_k", "maj_at_k", "marginal_at_k")  # of held-out tasks, in [0, 1]
PHASES = ("warmup", "start", "rollouts", "learn", "sync", "eval")  # each has its colour in STYLE
BESIDE = {  # seconds that run beside the learner's clock: no part of the total
    "verify": "The verifiers worked {} in their own processes, while rollouts ran.",
    "generate": "Groups were on their way for {}, also while the model learned.",
}
SUBJECTS = ("tasks", "base", "search", "credit", "learner")  # sections of the config that say what was done
CHARTS = (  # title, keys of metrics.jsonl
    ("Reward in training", ("reward_mean", "solved_fraction")),
    ("Held-out accuracy after each round", ("heldout_greedy",)),
    ("Problems with a verified path, and with a rationalised one", ("coverage", "coverage_all")),
    ("Different verified paths for each solved problem", ("unique_paths",)),
    ("pass@k and pass@1 in training", ("pass_at_k", "pass_at_1")),
    ("Paths kept, and of those rationalised", ("kept", "kept_hinted")),
    ("Groups per step", ("groups_used", "groups_agreeing")),
    ("Response length, tokens", ("response_length_mean",)),
    ("Entropy of the policy, nats", ("entropy",)),
    ("Engine against learner, |Δ log p|", ("mismatch",)),
    ("Importance ratio, mean", ("ratio_mean",)),
    ("Clipped tokens, fraction", ("clip_ratio",)),
    ("Responses cut at the limit, fraction", ("truncated_fraction",)),
    ("Loss", ("loss",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens generated per step", ("tokens_generated",)),
)
UNPLOTTED = {
    "step",
    "version",
    "rollouts",
    "pass_gap",
    "k",
    "rows",
    "time",
}  # the axis, and what follows from the config


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Works at any time after the run has begun."""
    run = read_run(Path(run_dir))
    page = Path(run_dir) / "report.html"
    partial = page.with_suffix(".tmp")  # a reader never sees half a page
    partial.write_text(_page(run), encoding="utf-8")
    return partial.replace(page)


# --- reading


@dataclass
class Run:
    """What the files of a run say so far. `unread` counts lines that are not JSON."""

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]  # empty while the run is going
    metrics: list[Mapping[str, Any]]
    folder: Path
    early: Mapping[str, Any] | None = None  # a group of the journal, if possible one with right and wrong answers
    late: Mapping[str, Any] | None = None
    excerpt: Excerpt = field(default_factory=Excerpt)  # of the journal
    events: list[Mapping[str, Any]] = field(default_factory=list)  # of the engines
    verdicts: Counter[str] = field(default_factory=Counter)  # by status
    reasons: Counter[str] = field(default_factory=Counter)  # of what no verdict was given for
    unread: int = 0


def read_run(folder: Path) -> Run:
    run = Run(folder.resolve().name, _json(folder / "config.json"), _json(folder / "summary.json"), [], folder)
    run.metrics += _lines(folder / "metrics.jsonl", run)
    run.events += _lines(folder / "events.jsonl", run)
    first = last = None
    for group in _lines(folder / "journal.jsonl", run):
        if "task" not in group:  # tells which groups a step took
            continue
        run.excerpt.add(group)
        first, last = first or group, group
        verdicts = [_verdict(rollout) for rollout in group.get("rollouts") or ()]
        if {True, False} <= {verdict.get("correct") for verdict in verdicts}:
            run.early, run.late = run.early or group, group
        for verdict in verdicts:
            status = verdict.get("status") or "no verdict"
            run.verdicts[status] += 1
            if status != "scored":
                run.reasons[f"{status}: {verdict.get('why') or 'no reason given'}"] += 1
    run.early, run.late = run.early or first, run.late or last
    return run


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or being written
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path, run: Run) -> Iterator[Mapping[str, Any]]:
    """Objects of a JSONL file. A torn last line is normal while the run is going."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                run.unread += line.endswith("\n")
                continue
            if isinstance(row, dict):
                yield row


def _verdict(rollout: Mapping[str, Any]) -> Mapping[str, Any]:
    return rollout.get("verdict") or {}


def _series(run: Run, key: str) -> list[tuple[float, float]]:
    """(step, value) where a row has both, by step. A resumed run repeats steps: the later row counts."""
    points = {number(row.get("step")): number(row.get(key)) for row in run.metrics}
    return sorted((step, value) for step, value in points.items() if step is not None and value is not None)


@dataclass(frozen=True)
class Measure:
    mean: float
    low: float | None
    high: float | None


def _measure(side: Any, key: str) -> Measure | None:
    """One entry of summary.json's `base` or `final`; its interval is in `ci` under the same key, as [low, high]."""
    mean = number(side.get(key)) if isinstance(side, Mapping) else None
    if mean is None:
        return None
    intervals = side.get("ci")
    ends = intervals.get(key) if isinstance(intervals, Mapping) else None
    low, high = ends if isinstance(ends, Sequence) and len(ends) == 2 else (None, None)
    return Measure(mean, number(low), number(high))


# --- the page, top to bottom


def _page(run: Run) -> str:
    sections = [_head(run), _before_after(run), _curves(run), _time(run), _left_out(run), _rollouts(run)]
    sections += [browser.section(run.excerpt, run.folder), _config(run)]
    return document(f"{run.name} · run report", sections)


def _head(run: Run) -> str:
    tone, claim, detail = _claim(run)
    facts = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(run))
    return (
        f'<header><p class="name">{escape(run.name)}</p><h1 class="{tone}">{escape(claim)}</h1>'
        f'<p class="lead">{escape(detail)}</p><dl class="facts">{facts}</dl>{_subject(run)}</header>'
    )


def _claim(run: Run) -> tuple[str, str, str]:
    """(class, one sentence, its ground). It claims only what disjoint intervals show."""
    before, after = (_measure(run.summary.get(side), "greedy") for side in ("base", "final"))
    if before is None or after is None:
        return _so_far(run)
    points = 100 * (after.mean - before.mean)
    ground = f"Held-out greedy accuracy went from {percent(before.mean)} to {percent(after.mean)}"
    tasks = number(run.summary["final"].get("tasks"))
    ground += f" on {tasks:.0f} tasks." if tasks else "."
    if None in (before.low, before.high, after.low, after.high):
        return "unclear", "No claim without intervals", ground
    if after.low > before.high:
        return "good", f"The model learned: {points:+.1f} points", f"{ground} The 95% intervals are apart."
    if after.high < before.low:
        return "bad", f"The model got worse: {points:+.1f} points", f"{ground} The 95% intervals are apart."
    return "unclear", "Not shown that the model learned", f"{ground} The 95% intervals overlap."


def _so_far(run: Run) -> tuple[str, str, str]:
    rewards = _series(run, "reward_mean")
    if not rewards:
        return "unclear", "No steps yet", "There is no summary and no metrics row with a reward."
    window = _window(rewards)
    first, last = (sum(v for _, v in part) / len(part) for part in (rewards[:window], rewards[-window:]))
    ground = f"Mean training reward over {window} steps: {first:.3f} at first, {last:.3f} now."
    return "unclear", f"No summary yet, at step {rewards[-1][0]:.0f}", f"{ground} Nothing here is held out."


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    summary = run.summary
    if run.metrics:
        yield "steps", integer(len(run.metrics))
    total = number(_at(summary, "seconds", "total"))
    if total is not None:
        yield "time", duration(total)
    for kind in ("generated", "prefilled"):
        tokens = number(_at(summary, "tokens", kind))
        if tokens is not None:
            yield f"tokens {kind}", integer(tokens)
    first, last = (number(_at(summary, "mismatch", key)) for key in ("first", "last"))
    if first is not None:
        after = f" → {last:.2g}" if last is not None else ""
        yield "mismatch, |Δ log p|", f"{first:.2g}{after}"
    if number(summary.get("peak_rss_bytes")) is not None:
        yield "peak memory", f"{summary['peak_rss_bytes'] / 1e9:.1f} GB"
    if summary.get("seed") is not None:
        yield "seed", str(summary["seed"])


def _subject(run: Run) -> str:
    rows = [(name, run.config[name]) for name in SUBJECTS if run.config.get(name)]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{_settings(value)}</td></tr>" for name, value in rows)
    return f'<table class="subject"><caption>What was trained on what</caption>{cells}</table>' if rows else ""


def _settings(value: Any) -> str:
    if not isinstance(value, Mapping):
        return escape(_plain(value))
    return " ".join(f"<span>{escape(str(k))}&nbsp;<b>{escape(_plain(v))}</b></span>" for k, v in value.items())


def _before_after(run: Run) -> str:
    sides = [run.summary.get(side) for side in ("base", "final")]
    rows = [(key, *(_measure(side, key) for side in sides)) for key in MEASURES]
    rows = [row for row in rows if row[1] or row[2]]
    if not rows:
        return ""
    k = next((side["k"] for side in sides if isinstance(side, Mapping) and "k" in side), "k")
    tokens = {key: [number(_at(side, "tokens", key)) for side in sides] for key, _, _ in rows}
    body = "".join(
        _measure_row(key.replace("_at_k", f"@{k}"), before, after, tokens[key]) for key, before, after in rows
    )
    return (
        '<section><h2>Before and after, held-out tasks</h2><table class="measures"><thead><tr><th></th>'
        '<th class="base">before</th><th class="final">after</th><th>points</th>'
        f'<th class="plot">95% intervals, 0 to 100%</th></tr></thead><tbody>{body}</tbody></table>'
        '<p class="note">greedy: the likeliest token each time. mean: of sampled answers. pass: any of them right. '
        "maj: the most frequent answer. marginal: the answer with the most probability over its paths. Tokens: those "
        "sampled per task, before and after.</p></section>"
    )


def _measure_row(name: str, before: Measure | None, after: Measure | None, tokens: Sequence[float | None]) -> str:
    points = f"{100 * (after.mean - before.mean):+.1f}" if before and after else ""
    cost = " → ".join(f"{t:,.0f}" for t in tokens if t is not None)
    cost = f"<small>{cost} tokens</small>" if cost else ""
    return (
        f"<tr><th>{escape(name)}{cost}</th><td>{_cell(before)}</td><td>{_cell(after)}</td><td>{points}</td>"
        f'<td class="plot">{_intervals(before, after)}</td></tr>'
    )


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return ""
    if measure.low is None or measure.high is None:
        return percent(measure.mean)
    return f"{percent(measure.mean)}<small>{100 * measure.low:.1f}–{100 * measure.high:.1f}</small>"


def _curves(run: Run) -> str:
    known = {key for _, keys in CHARTS for key in keys}
    telling = {key: None for row in run.metrics for key, value in row.items() if number(value)}  # not always 0
    others = [k for k in telling if k not in known | UNPLOTTED and not k.startswith("seconds_")]
    charts = [(title, [(k, _series(run, k)) for k in keys]) for title, keys in CHARTS]
    charts += [(k.replace("_", " "), [(k, _series(run, k))]) for k in others]
    figures = [_line_chart(title, [s for s in series if s[1]]) for title, series in charts if any(s[1] for s in series)]
    if not figures:
        return ""
    window = _window(run.metrics)
    note = f'<p class="note">Thin: each step. Bold: mean of the last {window} steps.</p>' if window > 1 else ""
    return f'<section><h2>Learning curves</h2><div class="grid">{"".join(figures)}</div>{note}</section>'


def _time(run: Run) -> str:
    per_step = {k.removeprefix("seconds_"): _series(run, k) for k in _seconds_keys(run)}
    whole = run.summary.get("seconds") if isinstance(run.summary.get("seconds"), Mapping) else {}
    spent = {k: s for k, v in whole.items() if k != "total" and (s := number(v))}
    spent = spent or {k: sum(v for _, v in points) for k, points in per_step.items() if points}
    beside = {key: spent.pop(key) for key in BESIDE if key in spent}
    total, notes = number(whole.get("total")), []
    if not spent:
        return ""
    if total is not None and sum(spent.values()) > 1.01 * total:
        notes.append(f"The phases overlap: together {duration(sum(spent.values()))}, by the clock {duration(total)}.")
    elif total is not None:
        spent["elsewhere"] = max(0.0, total - sum(spent.values()))
    notes += [BESIDE[key].format(duration(seconds)) for key, seconds in beside.items()]
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    steps = _stacked_chart({k: points for k, points in per_step.items() if points and k not in BESIDE})
    lanes = timeline.lanes(run.metrics, run.events)
    return f"<section><h2>Where the time went</h2>{_stacked_bar(spent)}{note}{steps}{lanes}</section>"


def _seconds_keys(run: Run) -> list[str]:
    found = {key: None for row in run.metrics for key in row if key.startswith("seconds_") and key != "seconds_total"}
    return sorted(found, key=lambda k: _phase_rank(k.removeprefix("seconds_")))


def _left_out(run: Run) -> str:
    told = [row["dropped"] for row in run.metrics if isinstance(row.get("dropped"), Mapping)]
    reasons = Counter() if told else Counter(run.reasons)  # the same rollouts, counted by the loop or in the journal
    groups = [row["groups_dropped"] for row in run.metrics if isinstance(row.get("groups_dropped"), Mapping)]
    for drops in (*told, *({f"group {why}": n for why, n in each.items()} for each in groups)):
        reasons.update({str(why): int(number(count) or 0) for why, count in drops.items()})
    in_rounds = False
    for key, words in (("lost", "path not trained on"), ("lost_hinted", "path with a hint not trained on")):
        for lost in (row[key] for row in run.metrics if isinstance(row.get(key), Mapping)):
            in_rounds = True
            reasons.update({f"{words}: {why}": int(number(count) or 0) for why, count in lost.items()})
    agreeing = sum(value for _, value in _series(run, "groups_agreeing"))
    if agreeing and not in_rounds:
        reasons["group not learned from: all its scores agree"] = int(agreeing)
    for side in ("base", "final"):
        if unjudged := number(_at(run.summary, side, "not_judged")):
            reasons[f"held-out task that could not be judged ({side})"] = int(unjudged)
    if run.unread:
        reasons["line of metrics.jsonl or journal.jsonl that is not JSON"] = run.unread
    if not sum(run.verdicts.values()) and not reasons:
        return ""
    shown = "".join(f"<tr><td>{escape(why)}</td><td>{integer(n)}</td></tr>" for why, n in reasons.most_common(20))
    table = f'<table class="reasons">{shown}</table>' if shown else ""
    scored, judged = run.verdicts["scored"], sum(run.verdicts.values())
    lead = f"{integer(scored)} of {integer(judged)} rollouts in the journal were scored." if judged else ""
    lead += "" if table else " Nothing was dropped."
    return f"<section><h2>What was left out</h2><p>{lead}</p>{table}</section>"


def _config(run: Run) -> str:
    if not run.config:
        return ""
    shown = {"config": run.config, "versions": run.summary.get("versions")}
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    return f"<details><summary>Resolved configuration and versions</summary><pre>{escape(text)}</pre></details>"


# --- rollouts


def _rollouts(run: Run) -> str:
    groups = [("Early", run.early)] + ([("Late", run.late)] if run.late is not run.early else [])
    shown = "".join(_group(when, group) for when, group in groups if group)
    note = (
        '<p class="note">The first and the last group of the journal that hold both a right and a wrong answer, where '
        "there are such; of each, the first right and the first wrong one. They are examples, not a sample.</p>"
    )
    return f"<section><h2>Two groups in full</h2>{note}{shown}</section>" if shown else ""


def _group(when: str, group: Mapping[str, Any]) -> str:
    rollouts = group.get("rollouts") or []
    task = group.get("task") or {}
    right = sum(_verdict(r).get("correct") is True for r in rollouts)
    messages = [(m.get("role", ""), m.get("content", "")) for m in task.get("prompt") or ()]
    messages.append(("reference", _plain(task.get("reference"))))
    shown = "".join(
        f'<div class="message"><span>{escape(str(role))}</span><pre>{escape(str(content))}</pre></div>'
        for role, content in messages
    )
    facts = f"step {group.get('step', '?')} · {task.get('id', 'unnamed task')} · {right} of {len(rollouts)} right"
    return (
        f"<article><h3>{when}<span>{escape(facts)}</span></h3>{shown}"
        f"{''.join(map(_rollout, _contrast(rollouts)))}</article>"
    )


def _contrast(rollouts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first right and the first wrong one; where one kind is missing, the first without a verdict."""
    firsts = (next((r for r in rollouts if _verdict(r).get("correct") is kind), None) for kind in (True, False, None))
    return [r for r in firsts if r is not None][:2]


def _rollout(rollout: Mapping[str, Any]) -> str:
    verdict, steps = _verdict(rollout), rollout.get("steps") or []
    scores = verdict.get("steps") or []
    scores = scores if len(scores) == len(steps) else [None] * len(steps)
    tone, word = {True: ("good", "✓ right"), False: ("bad", "✗ wrong")}.get(
        verdict.get("correct"), ("unclear", f"– {verdict.get('status') or 'no verdict'}")
    )
    facts = " · ".join(escape(fact) for fact in _rollout_facts(rollout))
    text = "".join(_step(step, score) for step, score in zip(steps, scores, strict=True))
    return (
        f'<div class="rollout"><p><b class="{tone}">{escape(word)}</b> {facts}</p><pre>{text}</pre>'
        f'<p class="why">{escape(str(verdict.get("why") or ""))}</p></div>'
    )


def _rollout_facts(rollout: Mapping[str, Any]) -> Iterator[str]:
    verdict, steps = _verdict(rollout), rollout.get("steps") or []
    if verdict.get("answer") is not None:
        yield f"answer {verdict['answer']}"
    if number(verdict.get("score")) is not None:
        yield f"score {verdict['score']:g}"
    yield f"{sum(len(step.get('ids') or ()) for step in steps)} tokens"
    logprobs = [lp for step in steps if step.get("sampled", True) for lp in step.get("logprobs") or ()]
    if logprobs:
        yield f"log p {sum(logprobs):.1f}"
    if rollout.get("end"):
        yield {"stop": "ended by itself", "length": "cut at the limit"}.get(rollout["end"], str(rollout["end"]))
    versions = {span[0] for step in steps for span in step.get("versions") or ()}
    if versions:
        yield "policy " + ", ".join(map(str, sorted(versions)))
    if number(verdict.get("seconds")):
        yield f"judged in {verdict['seconds'] * 1000:.1f} ms"


def _step(step: Mapping[str, Any], score: Any) -> str:
    text = escape(str(step.get("text") or ""))
    mark = f'<i title="score of this step">{score:.2f}</i>' if number(score) is not None else ""
    return f"<span>{text}</span>{mark}" if step.get("sampled", True) else f'<em title="not sampled">{text}</em>{mark}'


# --- charts


def _intervals(before: Measure | None, after: Measure | None) -> str:
    """Two dots with their intervals on a line from 0 to 100%."""
    marks = "".join(f'<line class="rule" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>' for x in (0, 25, 50, 75, 100))
    for tone, y, measure in (("base", 12, before), ("final", 24, after)):
        if measure is None:
            continue
        if measure.low is not None and measure.high is not None:
            ends = f'x1="{100 * measure.low:.2f}%" x2="{100 * measure.high:.2f}%"'
            marks += f'<line class="span {tone}" {ends} y1="{y}" y2="{y}"/>'
        marks += f'<circle class="dot {tone}" cx="{100 * measure.mean:.2f}%" cy="{y}" r="4.5"/>'
    return f'<svg class="chart" height="36" role="img" aria-label="before and after">{marks}</svg>'


def _line_chart(title: str, series: Sequence[tuple[str, list[tuple[float, float]]]]) -> str:
    low, high, ticks = scale([v for _, points in series for _, v in points])
    start, stop = min(p[0][0] for _, p in series), max(p[-1][0] for _, p in series)

    def place(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{100 * (x - start) / ((stop - start) or 1):.2f},{down(y, low, high)}" for x, y in points)

    shapes = "".join(f'<path class="rule" d="M0 {down(t, low, high)}H100"/>' for t in ticks)
    for tone, (_, points) in zip(("final", "base"), series, strict=False):
        if len(points) == 1:
            points = [points[0], (points[0][0] + 1e-9, points[0][1])]
        shapes += f'<polyline class="thin {tone}" points="{place(points)}"/>'
        shapes += f'<polyline class="bold {tone}" points="{place(_smooth(points))}"/>'
    words = "".join(f'<text x="-6" y="{down(t, low, high)}%" dy="4">{word}</text>' for t, word in ticks.items())
    legend = "".join(
        f'<span class="{tone}">{escape(_name(key)) if len(series) > 1 else "last"} {short(points[-1][1])}</span>'
        for tone, (key, points) in zip(("final", "base"), series, strict=False)
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>{svg(130, title, shapes, words)}"
        f'<div class="axis"><span>step {start:.0f}</span><span>{stop:.0f}</span></div></figure>'
    )


def _stacked_bar(seconds: Mapping[str, float]) -> str:
    """One bar of the whole run, and its legend as a table."""
    order = sorted(seconds, key=_phase_rank)
    total = sum(seconds.values()) or 1.0
    left, bars, rows = 0.0, "", ""
    for name in order:
        width = 100 * seconds[name] / total
        bars += f'<rect class="{_phase_class(name)}" x="{left:.3f}" width="{width:.3f}" y="0" height="100"/>'
        rows += (
            f'<tr><th><i class="key {_phase_class(name)}"></i>{escape(name)}</th><td>{duration(seconds[name])}</td>'
            f"<td>{width:.1f}%</td></tr>"
        )
        left += width
    return svg(34, "time by phase", bars) + f'<table class="phases">{rows}</table>'


def _stacked_chart(phases: Mapping[str, list[tuple[float, float]]]) -> str:
    """Seconds of each step, phase upon phase."""
    if not phases:
        return ""
    steps = sorted({step for points in phases.values() for step, _ in points})
    column = {step: i for i, step in enumerate(steps)}
    tops = dict.fromkeys(steps, 0.0)
    bars = []
    for name, points in phases.items():
        for step, value in points:
            bars.append((name, column[step], tops[step], value))
            tops[step] += value
    _, high, ticks = scale([0.0, *tops.values()])
    shapes = "".join(f'<path class="rule" d="M0 {down(t, 0, high)}H100"/>' for t in ticks)
    width = 100 / len(steps)
    gap = 0.9 if len(steps) < 60 else 1.0
    shapes += "".join(
        f'<rect class="{_phase_class(name)}" x="{i * width:.3f}" width="{width * gap:.3f}" '
        f'y="{100 - 100 * (base + value) / high:.3f}" height="{100 * value / high:.3f}"/>'
        for name, i, base, value in bars
    )
    words = "".join(f'<text x="-6" y="{down(t, 0, high)}%" dy="4">{word}</text>' for t, word in ticks.items())
    return (
        f"<figure><figcaption><b>Seconds per step</b></figcaption>{svg(130, 'seconds per step', shapes, words)}"
        f'<div class="axis"><span>step {steps[0]:.0f}</span><span>{steps[-1]:.0f}</span></div></figure>'
    )


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of the last `_window` points, of fewer at the start."""
    window = _window(points)
    values = [v for _, v in points]
    return [
        (step, sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1)) for i, (step, _) in enumerate(points)
    ]


def _window(points: Sequence[Any]) -> int:
    return max(1, min(20, len(points) // 8))


def _phase_rank(name: str) -> tuple[int, str]:
    return (PHASES.index(name) if name in PHASES else len(PHASES) + (name == "elsewhere"), name)


def _phase_class(name: str) -> str:
    return f"p{PHASES.index(name)}" if name in PHASES else "rest"


# --- words


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _name(key: str) -> str:
    return key.removesuffix("_mean").replace("_", " ")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
