"""What the learner and each engine did when: a lane each, from metrics.jsonl and events.jsonl. Neighbour: `report`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from reasoner.page import duration, number

STEPS = 400  # of the newest that are drawn
ORDER = ("save", "rollouts", "learn", "sync")  # of a step's phases by the learner's clock
CLASSES = {"rollouts": "p2", "learn": "p3", "sync": "p4", "save": "p0"}
STATES = {"starting": "p1", "updating": "p4", "serving": "p2", "restarting": "p3", "dead": "p0"}


def lanes(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> str:
    """An SVG with its legend; "" where nothing tells a time."""
    rows = [row for row in metrics if number(row.get("time"))][-STEPS:]
    if not rows:
        return ""
    learner = [span for row in rows for span in _spans(row)]
    begin, end = min(s[1] for s in learner), max(s[2] for s in learner)
    drawn = [("learner", learner)]
    for engine in sorted({e["engine"] for e in events if "engine" in e}):
        drawn.append((f"engine {engine}", _states([e for e in events if e.get("engine") == engine], begin, end)))
    width = max(end - begin, 1e-9)
    height, shapes, words = 22, "", ""
    for lane, (name, spans) in enumerate(drawn):
        top = lane * height
        words += f'<text x="-6" y="{top + 13}" text-anchor="end">{escape(name)}</text>'
        for kind, start, stop, title in spans:
            x, w = 100 * (start - begin) / width, max(100 * (stop - start) / width, 0.05)
            shapes += (
                f'<rect class="{kind}" x="{x:.3f}%" width="{w:.3f}%" y="{top + 2}" height="{height - 5}">'
                f"<title>{escape(title)}</title></rect>"
            )
    legend = "".join(
        f'<span><i class="key {kind}"></i>{escape(name)}</span> '
        for name, kind in ({"wait for groups": "p2"} | {k: CLASSES[k] for k in ("learn", "sync", "save")}).items()
    ) + "".join(f'<span><i class="key {STATES[s]}"></i>engine {s}</span> ' for s in STATES if len(drawn) > 1)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin))
    return (
        f"<figure><figcaption><b>Learner and engines, {len(rows)} steps in {duration(width)} from {when}</b>{legend}"
        f'</figcaption><svg class="chart ruled" height="{height * len(drawn)}" role="img" '
        f'aria-label="time line">{shapes}{words}</svg></figure>'
    )


def _spans(row: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """A step's phases, laid end to end before the moment it was written down."""
    spent = [(phase, number(row.get(f"seconds_{phase}")) or 0.0) for phase in ORDER]
    at = row["time"] - sum(seconds for _, seconds in spent)
    spans = []
    for phase, seconds in spent:
        if seconds:
            spans.append((CLASSES[phase], at, at + seconds, f"step {row.get('step')}: {phase} {seconds:.2f} s"))
        at += seconds
    return spans


def _states(events: Sequence[Mapping[str, Any]], begin: float, end: float) -> list[tuple[str, float, float, str]]:
    """From each event to the next; what lies outside the picture is left out."""
    spans = []
    for event, following in zip(events, [*events[1:], None], strict=True):
        start, stop = event["time"], following["time"] if following else end
        if stop > begin and start < end:
            title = f"{event.get('state')} at version {event.get('version')} {event.get('why') or ''}"
            spans.append((STATES.get(event.get("state"), "rest"), max(start, begin), min(stop, end), title))
    return spans[-2000:]
