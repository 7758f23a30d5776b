"""What a person sees while a run goes on, and where its time and memory go. Knows nothing of models or engines."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

NAMES = {
    "greedy": "greedy",
    "mean_at_k": "mean",
    "pass_at_k": "pass@{k}",
    "maj_at_k": "maj@{k}",
    "marginal_at_k": "marginal@{k}",
}


class Clock:
    """Seconds by phase. Phases may not be nested."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what an earlier process of the same run spent, its `total` included."""
        self.seconds.update({name: s for name, s in seconds.items() if name != "total"})
        self._start -= seconds.get("total", 0.0)

    def total(self) -> float:
        return time.perf_counter() - self._start


class PeakMemory:
    """The largest resident memory of this process and its descendants together, sampled once a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._end.wait(1.0):
            family = [me, *me.children(recursive=True)]
            self.bytes = max(self.bytes, sum(map(_resident, family)))


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended meanwhile
        return 0


class Screen:
    """Progress bars on a terminal; a line now and then where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    @contextmanager
    def bar(self, what: str, total: int, *, each: bool = False) -> Iterator[Any]:
        """A function of (done, note) that moves the bar. each: without a terminal, every call is a line."""
        if not self.console.is_terminal:
            yield self._lines(what, total, each=each)
            return
        words, note = TextColumn("{task.description:<9}"), TextColumn("{task.fields[note]}")
        with Bars(words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, console=self.console) as bars:
            task = bars.add_task(what, total=total, note="")
            yield lambda done, note: bars.update(task, completed=done, note=note)

    def _lines(self, what: str, total: int, *, each: bool) -> Any:
        def tell(done: int, note: str) -> None:
            if each or done == total or done % max(1, total // 10) == 0:
                self.say(f"{what} {done}/{total}  {note}")

        return tell

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)  # one line stays one line, however narrow


def step_line(row: Mapping[str, Any], in_flight: int, engines: Sequence[Any] = ()) -> str:
    """One step in one line: what was learned from, where the time went, how far the rollouts lag, who serves.

    wait: the learner waited for groups. generate: groups were on their way, also while it learned. verify: the workers'
    own seconds. engines: states with `state` and `engine`.
    """
    reward = "none judged" if row["reward_mean"] is None else f"{row['reward_mean']:.3f}"
    spent = {"wait": "rollouts", "learn": "learn", "sync": "sync", "generate": "generate", "verify": "verify"}
    times = " ".join(f"{name} {row[f'seconds_{key}']:.2f}" for name, key in spent.items())
    ahead = f"lag {row['lag_mean']:.1f} in flight {in_flight}" if in_flight or row["lag_max"] else "lag 0"
    dropped = sum(row["groups_dropped"].values())
    parts = [f"reward {reward}", f"length {row['response_length_mean']:.0f}", f"s: {times}", ahead]
    parts += [f"dropped {dropped}"] if dropped else []
    if engines:
        away = [f"{each.engine} {each.state}" for each in engines if each.state != "serving"]
        parts.append(f"engines {len(engines) - len(away)}/{len(engines)}" + (f" ({', '.join(away)})" if away else ""))
    return "  ".join(parts)


def comparison(summary: dict[str, Any]) -> Table:
    """The table that a run ends with: before, after, 95% intervals, tokens a task."""
    base, final = summary["base"], summary["final"]
    table = Table("held-out accuracy", "before", "95%", "after", "95%", "tokens/task")
    for key, name in NAMES.items():
        table.add_row(
            name.format(k=base["k"]),
            f"{base[key]:.1%}",
            _interval(base["ci"][key]),
            f"{final[key]:.1%}",
            _interval(final["ci"][key]),
            f"{base['tokens'][key]:.0f} → {final['tokens'][key]:.0f}",
        )
    return table


def accuracies(result: dict[str, Any]) -> Table:
    """One evaluation."""
    table = Table("held-out accuracy", f"{result['tasks']} tasks", "95%", "tokens/task")
    for key, name in NAMES.items():
        interval, tokens = _interval(result["ci"][key]), f"{result['tokens'][key]:.0f}"
        table.add_row(name.format(k=result["k"]), f"{result[key]:.1%}", interval, tokens)
    return table


def side_by_side(summary: dict[str, Any]) -> Table:
    """The table that a comparison of searches ends with."""
    table = Table("method", "size", "accuracy", "95%", "tokens", "judged", "time")
    for name, m in summary["methods"].items():
        size = ", ".join(str(value) for value in m["size"].values())
        tokens, judged = (f"{m['tokens'][kind]:.0f}" for kind in ("generated", "judged"))
        ends = " – ".join(f"{100 * end:.1f}" for end in m["ci"])
        table.add_row(name, size, f"{m['accuracy']:.1%}", ends, tokens, judged, f"{m['seconds']:.0f} s")
    table.caption = f"{summary['tasks']} held-out tasks; tokens a task; judged: read by the score"
    return table


def _interval(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1%} – {pair[1]:.1%}"
