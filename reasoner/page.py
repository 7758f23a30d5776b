"""What the pages of this room are made of: the document, its style, charts' scales, and words for numbers.

A chart is an SVG of fixed height and the width of its column: shapes live in an inner SVG that stretches (0..100 both
ways), words are placed by percentages and never stretch. Neighbours: `report` (a training run), `compare_page`
(searches side by side). Knows nothing of what they show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page: one file, nothing loaded from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def svg(height: int, label: str, shapes: str, words: str = "", box: str = "0 0 100 100") -> str:
    """`shapes` stretch to the column, `words` (placed in percent) do not."""
    return (
        f'<svg class="chart{" ruled" if words else ""}" height="{height}" role="img" aria-label="{escape(label)}">'
        f'<svg width="100%" height="100%" viewBox="{box}" preserveAspectRatio="none">{shapes}</svg>{words}</svg>'
    )


def scale(values: Sequence[float]) -> tuple[float, float, dict[float, str]]:
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


def down(value: float, low: float, high: float) -> str:
    """How far down in a chart a value stands, in percent."""
    return f"{100 - 100 * (value - low) / (high - low):.2f}"


def number(value: Any) -> float | None:
    """A finite number, or None for what cannot be drawn."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def integer(value: Any) -> str:
    return f"{int(value):,}"


def short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2e}".replace("e+0", "e")
    return f"{value:.4g}" if abs(value) >= 0.001 or not value else f"{value:.2g}".replace("e-0", "e-")


def duration(seconds: float) -> str:
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
#finder { display:flex; flex-wrap:wrap; gap:.5rem 1rem; font-size:.875rem }
#finder input, #finder select { font:inherit; color:inherit; background:var(--panel); border:1px solid var(--rule);
  padding:.15rem .35rem }
#found { max-height:20rem; overflow:auto; font-size:.85rem; border-top:1px solid var(--rule) }
#found td { white-space:nowrap; padding:.15rem .8rem .15rem 0 }
#found tr { cursor:pointer; border-bottom:1px solid var(--rule) }
#found tr:hover, #found tr:focus { background:var(--panel) }
#shown .prompt { color:var(--soft); margin-bottom:.8rem }
.tokens span { border-radius:2px }
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
