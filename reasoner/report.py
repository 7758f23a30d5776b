"""One page about a run: did the model learn, where did the time go, what did it write.

`write_report` reads what a run leaves (summary.json, metrics.jsonl, journal.jsonl, config.json), whole or half written,
and writes report.html beside them: one file, no script, nothing loaded from elsewhere, so it can be mailed and kept.
Every figure on it is read from those files. Knows no model, no engine and no type of the other rooms: the files are
the interface.

A chart is an SVG of fixed height and the width of its column: shapes live in an inner SVG that stretches (0..100 both
ways), words are placed by percentages and never stretch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

MEASURES = ("greedy", "mean_at_k", "pass_at_k", "maj_at_k", "marginal_at_k")  # of held-out tasks, in [0, 1]
PHASES = ("warmup", "start", "rollouts", "learn", "sync", "eval")  # each has its colour in STYLE
BESIDE = "verify"  # seconds of the verifiers' own processes, while rollouts run: not a part of the total
SUBJECTS = ("tasks", "base", "search", "credit", "learner")  # sections of the config that say what was done
CHARTS = (  # title, keys of metrics.jsonl
    ("Reward in training", ("reward_mean", "solved_fraction")),
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
UNPLOTTED = {"step", "version", "rollouts"}  # the axis, and what follows from the config


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
    early: Mapping[str, Any] | None = None  # a group of the journal, if possible one with right and wrong answers
    late: Mapping[str, Any] | None = None
    verdicts: Counter[str] = field(default_factory=Counter)  # by status
    reasons: Counter[str] = field(default_factory=Counter)  # of what no verdict was given for
    unread: int = 0


def read_run(folder: Path) -> Run:
    run = Run(folder.resolve().name, _json(folder / "config.json"), _json(folder / "summary.json"), [])
    run.metrics += _lines(folder / "metrics.jsonl", run)
    first = last = None
    for group in _lines(folder / "journal.jsonl", run):
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


def _number(value: Any) -> float | None:
    """A finite number, or None for what cannot be drawn."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _series(run: Run, key: str) -> list[tuple[float, float]]:
    """(step, value) where a row has both, by step. A resumed run repeats steps: the later row counts."""
    points = {_number(row.get("step")): _number(row.get(key)) for row in run.metrics}
    return sorted((step, value) for step, value in points.items() if step is not None and value is not None)


@dataclass(frozen=True)
class Measure:
    mean: float
    low: float | None
    high: float | None


def _measure(side: Any, key: str) -> Measure | None:
    """One entry of summary.json's `base` or `final`; its interval is in `ci` under the same key, as [low, high]."""
    mean = _number(side.get(key)) if isinstance(side, Mapping) else None
    if mean is None:
        return None
    intervals = side.get("ci")
    ends = intervals.get(key) if isinstance(intervals, Mapping) else None
    low, high = ends if isinstance(ends, Sequence) and len(ends) == 2 else (None, None)
    return Measure(mean, _number(low), _number(high))


# --- the page, top to bottom


def _page(run: Run) -> str:
    sections = [_head(run), _before_after(run), _curves(run), _time(run), _left_out(run), _rollouts(run), _config(run)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(run.name)} · run report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


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
    ground = f"Held-out greedy accuracy went from {_percent(before.mean)} to {_percent(after.mean)}"
    tasks = _number(run.summary["final"].get("tasks"))
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
        yield "steps", _integer(len(run.metrics))
    total = _number(_at(summary, "seconds", "total"))
    if total is not None:
        yield "time", _duration(total)
    for kind in ("generated", "prefilled"):
        tokens = _number(_at(summary, "tokens", kind))
        if tokens is not None:
            yield f"tokens {kind}", _integer(tokens)
    first, last = (_number(_at(summary, "mismatch", key)) for key in ("first", "last"))
    if first is not None:
        after = f" → {last:.2g}" if last is not None else ""
        yield "mismatch, |Δ log p|", f"{first:.2g}{after}"
    if _number(summary.get("peak_rss_bytes")) is not None:
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
    tokens = {key: [_number(_at(side, "tokens", key)) for side in sides] for key, _, _ in rows}
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
        return _percent(measure.mean)
    return f"{_percent(measure.mean)}<small>{100 * measure.low:.1f}–{100 * measure.high:.1f}</small>"


def _curves(run: Run) -> str:
    known = {key for _, keys in CHARTS for key in keys}
    numeric = {key: None for row in run.metrics for key, value in row.items() if _number(value) is not None}
    others = [k for k in numeric if k not in known | UNPLOTTED and not k.startswith("seconds_")]
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
    spent = {k: s for k, v in whole.items() if k != "total" and (s := _number(v))}
    spent = spent or {k: sum(v for _, v in points) for k, points in per_step.items() if points}
    beside, total, notes = spent.pop(BESIDE, None), _number(whole.get("total")), []
    if not spent:
        return ""
    if total is not None and sum(spent.values()) > 1.01 * total:
        notes.append(f"The phases overlap: together {_duration(sum(spent.values()))}, by the clock {_duration(total)}.")
    elif total is not None:
        spent["elsewhere"] = max(0.0, total - sum(spent.values()))
    if beside is not None:
        notes.append(f"The verifiers worked {_duration(beside)} in their own processes, while rollouts ran.")
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    steps = _stacked_chart({k: points for k, points in per_step.items() if points and k != BESIDE})
    return f"<section><h2>Where the time went</h2>{_stacked_bar(spent)}{note}{steps}</section>"


def _seconds_keys(run: Run) -> list[str]:
    found = {key: None for row in run.metrics for key in row if key.startswith("seconds_") and key != "seconds_total"}
    return sorted(found, key=lambda k: _phase_rank(k.removeprefix("seconds_")))


def _left_out(run: Run) -> str:
    told = [row["dropped"] for row in run.metrics if isinstance(row.get("dropped"), Mapping)]
    reasons = Counter() if told else Counter(run.reasons)  # the same rollouts, counted by the loop or in the journal
    for drops in told:
        reasons.update({str(why): int(_number(count) or 0) for why, count in drops.items()})
    agreeing = sum(value for _, value in _series(run, "groups_agreeing"))
    if agreeing:
        reasons["group not learned from: all its scores agree"] = int(agreeing)
    for side in ("base", "final"):
        if unjudged := _number(_at(run.summary, side, "not_judged")):
            reasons[f"held-out task that could not be judged ({side})"] = int(unjudged)
    if run.unread:
        reasons["line of metrics.jsonl or journal.jsonl that is not JSON"] = run.unread
    if not sum(run.verdicts.values()) and not reasons:
        return ""
    shown = "".join(f"<tr><td>{escape(why)}</td><td>{_integer(n)}</td></tr>" for why, n in reasons.most_common(20))
    table = f'<table class="reasons">{shown}</table>' if shown else ""
    scored, judged = run.verdicts["scored"], sum(run.verdicts.values())
    lead = f"{_integer(scored)} of {_integer(judged)} rollouts in the journal were scored." if judged else ""
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
    return f"<section><h2>Rollouts in full</h2>{note}{shown}</section>" if shown else ""


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
    if _number(verdict.get("score")) is not None:
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
    if _number(verdict.get("seconds")):
        yield f"judged in {verdict['seconds'] * 1000:.1f} ms"


def _step(step: Mapping[str, Any], score: Any) -> str:
    text = escape(str(step.get("text") or ""))
    mark = f'<i title="score of this step">{score:.2f}</i>' if _number(score) is not None else ""
    return f"<span>{text}</span>{mark}" if step.get("sampled", True) else f'<em title="not sampled">{text}</em>{mark}'


# --- charts


def _svg(height: int, label: str, shapes: str, words: str = "", box: str = "0 0 100 100") -> str:
    """`shapes` stretch to the column, `words` (placed in percent) do not."""
    return (
        f'<svg class="chart{" ruled" if words else ""}" height="{height}" role="img" aria-label="{escape(label)}">'
        f'<svg width="100%" height="100%" viewBox="{box}" preserveAspectRatio="none">{shapes}</svg>{words}</svg>'
    )


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
    low, high, ticks = _scale([v for _, points in series for _, v in points])
    start, stop = min(p[0][0] for _, p in series), max(p[-1][0] for _, p in series)

    def place(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{100 * (x - start) / ((stop - start) or 1):.2f},{_y(y, low, high)}" for x, y in points)

    shapes = "".join(f'<path class="rule" d="M0 {_y(t, low, high)}H100"/>' for t in ticks)
    for tone, (_, points) in zip(("final", "base"), series, strict=False):
        if len(points) == 1:
            points = [points[0], (points[0][0] + 1e-9, points[0][1])]
        shapes += f'<polyline class="thin {tone}" points="{place(points)}"/>'
        shapes += f'<polyline class="bold {tone}" points="{place(_smooth(points))}"/>'
    words = "".join(f'<text x="-6" y="{_y(t, low, high)}%" dy="4">{word}</text>' for t, word in ticks.items())
    legend = "".join(
        f'<span class="{tone}">{escape(_name(key)) if len(series) > 1 else "last"} {_short(points[-1][1])}</span>'
        for tone, (key, points) in zip(("final", "base"), series, strict=False)
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>{_svg(130, title, shapes, words)}"
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
            f'<tr><th><i class="key {_phase_class(name)}"></i>{escape(name)}</th><td>{_duration(seconds[name])}</td>'
            f"<td>{width:.1f}%</td></tr>"
        )
        left += width
    return _svg(34, "time by phase", bars) + f'<table class="phases">{rows}</table>'


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
    _, high, ticks = _scale([0.0, *tops.values()])
    shapes = "".join(f'<path class="rule" d="M0 {_y(t, 0, high)}H100"/>' for t in ticks)
    width = 100 / len(steps)
    gap = 0.9 if len(steps) < 60 else 1.0
    shapes += "".join(
        f'<rect class="{_phase_class(name)}" x="{i * width:.3f}" width="{width * gap:.3f}" '
        f'y="{100 - 100 * (base + value) / high:.3f}" height="{100 * value / high:.3f}"/>'
        for name, i, base, value in bars
    )
    words = "".join(f'<text x="-6" y="{_y(t, 0, high)}%" dy="4">{word}</text>' for t, word in ticks.items())
    return (
        f"<figure><figcaption><b>Seconds per step</b></figcaption>{_svg(130, 'seconds per step', shapes, words)}"
        f'<div class="axis"><span>step {steps[0]:.0f}</span><span>{steps[-1]:.0f}</span></div></figure>'
    )


def _scale(values: Sequence[float]) -> tuple[float, float, dict[float, str]]:
    """Ends of the axis, and its two to five round ticks with their words. Fractions that come near 0 or 1 show it."""
    low, high = min(values), max(values)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if 0.75 < high <= 1.0:
        high = 1.0
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    pitch = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    ticks = [pitch * i for i in range(math.ceil(low / pitch - 1e-9), math.floor(high / pitch + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(pitch) + 1e-9)) + (pitch == 2.5 * unit)
    room = 0.0 if high == 1.0 else 0.04 * (high - low)
    return low, high + room, {t: f"{t:,.{digits}f}" if digits < 6 else f"{t:.1e}" for t in ticks}


def _y(value: float, low: float, high: float) -> str:
    return f"{100 - 100 * (value - low) / (high - low):.2f}"


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


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def _integer(value: Any) -> str:
    return f"{int(value):,}"


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2e}".replace("e+0", "e")
    return f"{value:.4g}" if abs(value) >= 0.001 or not value else f"{value:.2g}".replace("e-0", "e-")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60} s"


STYLE = """
:root { --paper:#fcfcfa; --ink:#1c1e21; --soft:#63676e; --rule:#dfdfda; --panel:#f3f3ef;
  --base:#82868d; --final:#1f5fae; --good:#23734a; --bad:#ad3f22;
  --p0:#b9a06a; --p1:#8a78b5; --p2:#3f73ad; --p3:#cf7f3c; --p4:#b8617a; --p5:#5e9c76; --rest:#b9bbbf }
@media (prefers-color-scheme: dark) { :root {
  --paper:#15171a; --ink:#e4e3df; --soft:#9a9ea6; --rule:#33363b; --panel:#1d2024;
  --base:#8f949c; --final:#7db2f0; --good:#74c497; --bad:#ee8d70;
  --p0:#a8915f; --p1:#9d8cc8; --p2:#5b8fc9; --p3:#d08a4e; --p4:#c8738b; --p5:#6fae88; --rest:#5d6067 } }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); -webkit-text-size-adjust:100%;
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
  font-variant-numeric:tabular-nums }
main { max-width:60rem; margin:0 auto; padding:2.5rem 1.25rem 4rem }
section { margin-top:3rem; padding-top:1.2rem; border-top:1px solid var(--rule) }
h1 { font-size:2rem; line-height:1.2; margin:.1rem 0 .4rem; font-weight:650; letter-spacing:-.015em }
h2 { font-size:1.15rem; margin:0 0 .9rem; font-weight:650 }
h3 { font-size:1rem; margin:0 0 .8rem }
h3 span { font-weight:400; color:var(--soft); margin-left:.6rem }
pre { font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
  white-space:pre-wrap; overflow-wrap:anywhere; margin:0 }
table { border-collapse:collapse; width:100% }
th { text-align:left; font-weight:550 }
th, td { padding:.35rem .6rem .35rem 0; vertical-align:top }
.name { margin:0; color:var(--soft); overflow-wrap:anywhere }
.lead { margin:0 0 1.4rem; font-size:1.1rem; max-width:46rem }
.note, .why { color:var(--soft); font-size:.875rem; margin:.7rem 0 }
.good { color:var(--good) }
.bad { color:var(--bad) }
.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr)); gap:.9rem 1.4rem; margin:0 }
.facts dt { color:var(--soft); font-size:.8rem }
.facts dd { margin:0; font-weight:550; overflow-wrap:anywhere }
.subject { margin-top:1.8rem; font-size:.875rem }
.subject caption { text-align:left; color:var(--soft); padding-bottom:.2rem }
.subject tr { border-top:1px solid var(--rule) }
.subject th { width:6rem }
.subject span { color:var(--soft); margin-right:.8rem; display:inline-block }
.subject b { color:var(--ink); font-weight:500; overflow-wrap:anywhere }
.measures thead th { font-size:.8rem; font-weight:500; color:var(--soft) }
.measures thead .base { color:var(--base) }
.measures thead .final { color:var(--final) }
.measures tbody tr { border-top:1px solid var(--rule) }
.measures td, .measures th { white-space:nowrap; padding-right:1.4rem }
.measures .plot { width:46%; padding-right:0 }
.measures small { display:block; color:var(--soft); font-weight:400 }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(17rem,1fr)); gap:1.6rem 2rem }
figure { margin:0 }
section > figure { margin-top:1.6rem }
figcaption { font-size:.875rem; margin-bottom:.5rem }
figcaption b { font-weight:550; display:block }
figcaption span { margin-right:.9rem }
figcaption .base { color:var(--base) }
figcaption .final { color:var(--final) }
.axis { display:flex; justify-content:space-between; color:var(--soft); font-size:11px; margin:.2rem 0 0 2.9rem }
.chart { display:block; width:100%; overflow:visible }
.chart svg { overflow:visible }
.ruled { margin-left:2.9rem; width:calc(100% - 2.9rem) }
.chart text { fill:var(--soft); font-size:11px; text-anchor:end }
.rule { stroke:var(--rule); stroke-width:1; vector-effect:non-scaling-stroke; fill:none }
polyline { fill:none; vector-effect:non-scaling-stroke; stroke-linejoin:round; stroke-linecap:round }
.thin { stroke-width:1; opacity:.4 }
.bold { stroke-width:2.2 }
.span { stroke-width:2.5; opacity:.55; stroke-linecap:round }
polyline.base, .span.base { stroke:var(--base) }
polyline.final, .span.final { stroke:var(--final) }
.dot.base { fill:var(--base) }
.dot.final { fill:var(--final) }
.p0 { fill:var(--p0); background:var(--p0) }
.p1 { fill:var(--p1); background:var(--p1) }
.p2 { fill:var(--p2); background:var(--p2) }
.p3 { fill:var(--p3); background:var(--p3) }
.p4 { fill:var(--p4); background:var(--p4) }
.p5 { fill:var(--p5); background:var(--p5) }
.rest { fill:var(--rest); background:var(--rest) }
.key { display:inline-block; width:.75rem; height:.75rem; margin-right:.5rem }
.phases, .reasons { width:auto; margin-top:.8rem; font-size:.9rem }
.phases th { font-weight:400 }
.phases td, .reasons td:last-child { text-align:right; padding-left:1.4rem; white-space:nowrap }
.reasons td:first-child { overflow-wrap:anywhere }
article { background:var(--panel); padding:1.1rem 1.2rem; margin-top:1.2rem; border-radius:4px }
.message { display:flex; gap:1rem; margin-bottom:.3rem }
.message > span { flex:0 0 5.5rem; color:var(--soft); font-size:.875rem }
.rollout { border-top:1px solid var(--rule); margin-top:.9rem; padding-top:.8rem }
.rollout p { margin:0 0 .5rem; font-size:.875rem; color:var(--soft) }
.rollout pre { border-left:2px solid var(--rule); padding-left:.8rem }
.rollout pre em, .rollout pre i { color:var(--soft) }
.rollout pre i { font-size:.75rem; margin-left:.5rem }
.rollout .why { margin:.5rem 0 0 }
.rollout .good { color:var(--good) }
.rollout .bad { color:var(--bad) }
details { margin-top:3rem; color:var(--soft) }
details pre { margin-top:.8rem; font-size:12.5px }
@media (max-width: 40rem) {
  main { padding-top:1.5rem }
  h1 { font-size:1.6rem }
  h3 span { display:block; margin:0 }
  .grid { grid-template-columns:1fr }
  .subject th { width:4.5rem }
  .measures thead { display:none }
  .measures tr { display:grid; grid-template-columns:6.6rem 1fr 1fr auto; padding:.3rem 0 }
  .measures td, .measures th { padding-right:.3rem }
  .measures th { font-size:.9rem }
  .measures small { font-size:.7rem }
  .measures .plot { grid-column:1/-1; width:auto }
  .measures td:nth-child(2) { color:var(--base) }
  .measures td:nth-child(3) { color:var(--final) }
}
"""
