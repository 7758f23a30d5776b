"""The page of a comparison: accuracy against tokens, what differs from what, and the trees behind single answers.

`write_page` reads what `compare` leaves (summary.json, trees.json) and writes report.html beside them. Knows no search
and no type of the other rooms: the files are the interface. Neighbours: `page` (document, style), `report` (a run).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from reasoner.page import document, down, duration, integer, percent, scale, short, svg

Row = Mapping[str, Any]


def write_page(folder: Path) -> Path:
    """Write `report.html` into the folder of a comparison and return its path."""
    summary, trees = (json.loads((folder / name).read_text()) for name in ("summary.json", "trees.json"))
    page = folder / "report.html"
    partial = page.with_suffix(".tmp")  # a reader never sees half a page
    partial.write_text(render(summary, trees), encoding="utf-8")
    return partial.replace(page)


def render(summary: Row, trees: Sequence[Row]) -> str:
    parts = (_head, _methods, _curves, _comparisons)
    style = _colours(len(summary["methods"])) + STYLE
    sections = [f"<style>{style}</style>", *(part(summary) for part in parts), _trees(trees), _facts(summary)]
    return document(f"{summary['name']} · searches compared", sections)


# -- the page, top to bottom ----------------------------------------------------------------------------------------


def _head(summary: Row) -> str:
    methods = summary["methods"]
    best = max(methods, key=lambda name: methods[name]["accuracy"])
    beaten = [
        c["b"] if c["a"] == best else c["a"] for c in summary["comparisons"] if _shown(c) and best in (c["a"], c["b"])
    ]
    claim = f"{best}: {percent(methods[best]['accuracy'])}"
    ground = f"shown to be better than {', '.join(beaten)}" if beaten else "not shown to be better than any other"
    others = [name for name in methods if name != best and name not in beaten]
    if beaten and others:
        ground += f"; not from {', '.join(others)}"
    return (
        f'<header><p class="name">{escape(summary["name"])}</p><h1>{escape(claim)}</h1>'
        f'<p class="lead">The highest accuracy on {summary["tasks"]} held-out tasks; {escape(ground)} '
        "(paired tests, 5% after Holm's correction).</p></header>"
    )


def _shown(comparison: Row) -> bool:
    return comparison["holm"] < 0.05


def _methods(summary: Row) -> str:
    rows = "".join(_method_row(i, name, m) for i, (name, m) in enumerate(summary["methods"].items()))
    left = f" {summary['not_judged']} tasks that could not be judged are left out." if summary["not_judged"] else ""
    return (
        '<section><h2>Methods</h2><div class="wide"><table class="side"><thead><tr><th></th><th>accuracy</th>'
        '<th class="plot">95%, 0 to 100%</th><th>generated</th><th>prefilled</th><th>cached</th><th>judged</th>'
        f"<th>time</th><th>unfinished</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">Tokens are per task. Each method is grown on training tasks until it generates about '
        f"{integer(summary['budget'])} tokens a task, unless the config gives its size. judged: tokens new to the "
        f"score. unfinished: paths that hit the length limit; they never vote.{left}</p></section>"
    )


def _method_row(i: int, name: str, m: Row) -> str:
    low, high = m["ci"]
    size = ", ".join([*(f"{k} {v}" for k, v in m["size"].items()), m["estimator"]])
    tokens = "".join(f"<td>{_count(m['tokens'][k])}</td>" for k in ("generated", "prefilled", "cached", "judged"))
    rules = "".join(f'<line class="rule" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>' for x in (0, 25, 50, 75, 100))
    marks = f'<line class="band" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="11" y2="11"/>'
    marks += f'<circle class="dot" cx="{100 * m["accuracy"]:.2f}%" cy="11" r="4.5"/>'
    return (
        f'<tr class="m{i}" title="{escape(m["search"])}"><th><i class="key"></i>{escape(name)}'
        f"<small>{escape(size)}</small></th>"
        f"<td>{percent(m['accuracy'])}<small>{100 * low:.1f}–{100 * high:.1f}</small></td>"
        f'<td class="plot"><svg class="chart" height="22" role="img" aria-label="interval">{rules}{marks}</svg></td>'
        f"{tokens}<td>{duration(m['seconds'])}</td><td>{percent(m['unfinished'])}</td></tr>"
    )


def _count(tokens: float) -> str:
    return f"{tokens:,.0f}"


def _curves(summary: Row) -> str:
    methods = list(summary["methods"].items())
    spent = [p["tokens"] for _, m in methods for p in m["curve"]] + [m["tokens"]["generated"] for _, m in methods]
    ends = [end for _, m in methods for p in [m, *m["curve"]] for end in p["ci"]]
    left, right = math.log(max(1.0, min(spent)) * 0.9), math.log(max(2.0, *spent) * 1.1)
    low, high, ticks = scale(ends)

    def x(tokens: float) -> float:
        return 100 * (math.log(max(1.0, tokens)) - left) / (right - left)

    shapes = "".join(f'<path class="rule" d="M0 {down(t, low, high)}H100"/>' for t in ticks)
    words = "".join(f'<text x="-6" y="{down(t, low, high)}%" dy="4">{word}</text>' for t, word in ticks.items())
    for t in _decades(math.exp(left), math.exp(right)):
        words += f'<text class="below" x="{x(t):.2f}%" y="100%" dy="15">{_count(t)}</text>'
    for i, (name, m) in enumerate(methods):
        if m["curve"]:
            shapes += _band(i, m["curve"], x, low, high)
        else:
            words += _cross(i, name, m, x, low, high)
    legend = "".join(f'<span class="m{i}"><i class="key"></i>{escape(n)}</span>' for i, (n, _) in enumerate(methods))
    return (
        '<section><h2>Accuracy against tokens</h2><figure class="curves">'
        f"<figcaption>{legend}</figcaption>{svg(340, 'accuracy against generated tokens per task', shapes, words)}"
        '</figure><p class="note">Generated tokens per task, logarithmic; 95% bands over tasks. Lines: means over '
        "all subsets of independent paths, in closed form for votes and best-of-n, over 50 subsets a task otherwise. "
        "Points: searches whose paths hang together, at the size that was run. Where several paths share the best "
        "score, a line takes one of them at random, the table the answer that most of them give.</p></section>"
    )


def _band(i: int, curve: Sequence[Row], x: Any, low: float, high: float) -> str:
    place = lambda p, value: f"{x(p['tokens']):.2f},{down(value, low, high)}"  # noqa: E731
    around = [place(p, p["ci"][1]) for p in curve] + [place(p, p["ci"][0]) for p in reversed(curve)]
    line = " ".join(place(p, p["accuracy"]) for p in curve)
    tone = f"m{i}"
    return f'<polygon class="area {tone}" points="{" ".join(around)}"/><polyline class="line {tone}" points="{line}"/>'


def _cross(i: int, name: str, m: Row, x: Any, low: float, high: float) -> str:
    at, (bottom, top) = f"{x(m['tokens']['generated']):.2f}%", (down(end, low, high) for end in m["ci"])
    return (
        f'<g class="m{i}"><title>{escape(name)} {percent(m["accuracy"])}</title>'
        f'<line class="band" x1="{at}" x2="{at}" y1="{top}%" y2="{bottom}%"/>'
        f'<circle class="dot" cx="{at}" cy="{down(m["accuracy"], low, high)}%" r="5"/></g>'
    )


def _decades(low: float, high: float) -> Iterator[float]:
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        yield from (t for m in (1, 2, 5) if low <= (t := m * 10.0**exponent) <= high)


def _comparisons(summary: Row) -> str:
    rows = "".join(
        map(_comparison_row, sorted(summary["comparisons"], key=lambda c: (c["holm"], c["p"], c["a"], c["b"])))
    )
    if not rows:
        return ""
    return (
        '<section><h2>What differs from what</h2><div class="wide"><table class="side"><thead><tr><th>method</th>'
        "<th>against</th><th>points</th><th>95%</th><th>p</th><th>Holm</th><th>tokens</th><th>discordant</th><th>resolvable</th>"
        f"<th>test</th></tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">Paired by task, at equal tokens: where both were grown to the budget, independent paths are '
        "read at the number that costs what the other method cost. Intervals: paired bootstrap. Holm: p corrected for "
        "all these comparisons, bold below 5%. resolvable: the smallest true difference that these tasks show four "
        "times in five; a smaller one may be there and not be shown.</p></section>"
    )


def _comparison_row(c: Row) -> str:
    up = c["difference"] >= 0
    first, second = (c["a"], c["b"]) if up else (c["b"], c["a"])
    low, high = (c["low"], c["high"]) if up else (-c["high"], -c["low"])
    spent = c["tokens"] if up else c["tokens"][::-1]
    tag, points = "b" if _shown(c) else "span", f"{100 * abs(c['difference']):+.1f}"
    return (
        f"<tr><th>{escape(first)}</th><td>{escape(second)}</td><td><{tag}>{points}</{tag}></td>"
        f"<td>{100 * low:+.1f} to {100 * high:+.1f}</td><td>{_p(c['p'])}</td><td><{tag}>{_p(c['holm'])}</{tag}></td>"
        f"<td>{_count(spent[0])} / {_count(spent[1])}</td>"
        f"<td>{c['discordant']}</td><td>{100 * c['resolvable']:.1f}</td><td>{escape(c['test'])}</td></tr>"
    )


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _facts(summary: Row) -> str:
    shown = {k: summary[k] for k in ("checkpoint", "seed", "budget", "versions") if k in summary}
    searches = {name: m["search"] for name, m in summary["methods"].items()}
    text = json.dumps({**shown, "searches": searches}, indent=2, ensure_ascii=False)
    return f"<details><summary>Searches as run, checkpoint, versions</summary><pre>{escape(text)}</pre></details>"


# -- trees ----------------------------------------------------------------------------------------------------------


def _trees(trees: Sequence[Row]) -> str:
    if not trees:
        return ""
    shown = "".join(map(_task, trees))
    return (
        '<section><h2>Trees</h2><p class="note">The tasks on which the methods disagree most. Open a method: why its '
        "answer won, the paths it returned, and the tree it grew; marked: what leads to the winning answer.</p>"
        f"{shown}</section>"
    )


def _task(task: Row) -> str:
    facts = (("question", task["question"]), ("reference", task["reference"]))
    heads = "".join(f'<div class="message"><span>{k}</span><pre>{escape(v)}</pre></div>' for k, v in facts)
    return f"<article>{heads}{''.join(_method(m) for m in task['methods'])}</article>"


def _method(m: Row) -> str:
    tone, word = ("good", "✓") if m["right"] == 1 else ("bad", "✗") if m["right"] == 0 else ("unclear", "–")
    answer = "no answer" if m["answer"] is None else f"{m['answer']}"
    paths = "1 path" if len(m["returned"]) == 1 else f"{len(m['returned'])} paths"
    return (
        f'<details class="tree"><summary><b class="{tone}">{word}</b> <b>{escape(m["name"])}</b> {escape(answer)} '
        f"<span>{_count(m['tokens'])} tokens, {paths}</span></summary>"
        f'<p class="why">{escape(why(m))}</p>{_returned(m)}{_nodes(m)}</details>'
    )


def why(m: Row) -> str:
    """Why this answer won, in a sentence."""
    if m["answer"] is None:
        return "No path finished with an answer."
    (first, mass), *rest = m["masses"].items()
    finished = [r for r in m["returned"] if r["answer"] is not None and r["end"] == "stop"]
    n = len(m["returned"])
    if m["estimator"] == "vote":
        said = f"{first} has {round(mass * n)} of {n} votes"
        others = ", ".join(f"{a} {round(p * n)}" for a, p in rest[:4])
    elif m["estimator"] == "best":
        values = [r["value"] for r in finished if r["value"] is not None]
        top = max(values, default=math.nan)
        said = f"a path with {first} has the highest score, {top:.3g}, of {len(finished)} finished"
        others = ""
    else:
        said = f"{first} has the most mass, {mass:.3g}"
        others = ", ".join(f"{a} {p:.3g}" for a, p in rest[:4])
    sentence = f"{said}{f'; then {others}' if others else ''}."
    sentence += " The paths drawn prove that no answer has more mass." if m["certified"] else ""
    return sentence + (f" {m['caveat']}." if m["caveat"] else "")


def _returned(m: Row) -> str:
    rows = "".join(_returned_row(r) for r in m["returned"])
    heads = "".join(f"<th>{head}</th>" for head in ("answer", "score", "log p", "end", "verdict"))
    return f'<table class="side returned"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _returned_row(r: Row) -> str:
    answer = "none" if r["answer"] is None else str(r["answer"])
    value = "" if r["value"] is None else short(r["value"])
    logprob = "" if r["logprob"] is None else f"{r['logprob']:.1f}"
    cells = "".join(f"<td>{escape(c)}</td>" for c in (answer, value, logprob, r["end"] or "open", str(r["why"])))
    return f'<tr class="{_tone(r)}">{cells}</tr>'


def _tone(returned: Row) -> str:
    return {True: "right", False: "wrong"}.get(returned["correct"], "")


def _nodes(m: Row) -> str:
    """The tree as nested lists. Deep chains of one child each are drawn without indentation."""
    by_name = {node["path"]: node for node in m["nodes"]}
    verdicts = {r["path"]: r for r in m["returned"]}
    children: dict[Any, list[Row]] = {}
    for node in m["nodes"]:
        children.setdefault(node["parent"], []).append(node)
    winning = set()
    for r in m["returned"]:
        at = by_name.get(r["path"]) if r["answer"] is not None and r["answer"] == m["answer"] else None
        while at is not None and at["path"] not in winning:
            winning.add(at["path"])
            at = by_name.get(at["parent"])
    lines: list[str] = []
    stack = [(node, 0) for node in reversed(children.get(None, []))]
    while stack:
        node, depth = stack.pop()
        kids = children.get(node["path"], [])
        lines.append(_node(node, depth, node["path"] in winning, verdicts.get(node["path"])))
        stack += [(kid, depth + 1) for kid in reversed(kids)]
    return f'<div class="nodes">{"".join(lines)}</div>'


def _node(node: Row, depth: int, wins: bool, verdict: Row | None) -> str:
    text = node["text"].strip("\n") or ("question" if node["parent"] is None else "…")
    chips = f'<i class="chip">{node["score"]:.2f}</i>' if node["score"] is not None else ""
    if verdict is not None and verdict["correct"] is not None:
        chips += f'<b class="{"good" if verdict["correct"] else "bad"}">{"✓" if verdict["correct"] else "✗"}</b>'
    if node["end"] == "length":
        chips += '<i class="chip">cut at the limit</i>'
    label = f"log p {node['logprob']:.2f}, {node['tokens']} tokens" if node["sampled"] else "written by the search"
    return (
        f'<div class="node{" wins" if wins else ""}{"" if node["sampled"] else " written"}" title="{label}" '
        f'style="--d:{min(depth, 24)}"><pre>{escape(text)}</pre>{chips}</div>'
    )


def _colours(count: int) -> str:
    """A colour for each method, however many: hues evenly round the circle, neighbours of unequal lightness."""
    hues = [(255 + 360 * i / max(1, count)) % 360 for i in range(count)]
    return "".join(f".m{i} {{ --c:oklch({(50, 68)[i % 2]}% .15 {hue:.0f}) }}\n" for i, hue in enumerate(hues))


STYLE = """
.key { background:var(--c); border-radius:50% }
.line { stroke:var(--c); stroke-width:2 }
.area { fill:var(--c); opacity:.13 }
.band { stroke:var(--c); stroke-width:2.5; opacity:.6; stroke-linecap:round }
.dot { fill:var(--c) }
.chart text.below { text-anchor:middle }
.curves .chart { margin-bottom:1.6rem }
.curves figcaption span { display:inline-block }
.wide { overflow-x:auto }
.side { font-size:.9rem }
.side thead th { font-size:.8rem; font-weight:500; color:var(--soft) }
.side tbody tr { border-top:1px solid var(--rule) }
.side td, .side th { white-space:nowrap; padding-right:1.1rem }
.side small { display:block; color:var(--soft); font-weight:400 }
.side .plot { min-width:11rem; width:30% }
.returned { margin:.6rem 0; font-size:.8rem }
.returned td, .returned th { padding:.1rem 1rem .1rem 0 }
.returned .right td:first-child { color:var(--good) }
.returned .wrong td:first-child { color:var(--bad) }
details.tree { margin-top:.5rem; color:var(--ink) }
details.tree summary { cursor:pointer }
details.tree summary span { color:var(--soft); font-size:.85rem; margin-left:.5rem }
.nodes { max-height:34rem; overflow:auto; border-top:1px solid var(--rule); padding:.4rem 0 }
.node { display:flex; gap:.6rem; align-items:baseline; margin-left:calc(var(--d) * 1.1rem); padding-left:.5rem;
  border-left:2px solid var(--rule); color:var(--soft) }
.node pre { margin:0; font-size:12.5px }
.node.wins { border-color:var(--good); color:var(--ink) }
.node.written pre { font-style:italic }
.chip { font-size:.72rem; font-style:normal; background:var(--rule); border-radius:3px; padding:0 .3rem }
"""
