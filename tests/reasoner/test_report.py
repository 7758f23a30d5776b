"""The report page: it says what the files say, at any stage of a run, and no text of a model can break out of it.

`write_run` makes TEST DATA: invented curves in the form of a run's files. Nothing in it was measured.
"""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from reasoner.__main__ import main
from reasoner.browser import MOST_TOKENS, SCRIPT, Excerpt
from reasoner.report import read_run, write_report

STEPS = 120


def side(greedy, mean, best, maj, marginal):
    values = {"greedy": greedy, "mean_at_k": mean, "pass_at_k": best, "maj_at_k": maj, "marginal_at_k": marginal}
    ci = {key: [max(0.0, v - 0.055), min(1.0, v + 0.045)] for key, v in values.items()}
    tokens = {key: 40.4 if key == "greedy" else 8 * 40.4 for key in values}
    return {**values, "k": 8, "n": 16, "tasks": 200, "not_judged": 0, "ci": ci, "tokens": tokens}


def summary():
    return {
        "base": side(0.42, 0.38, 0.86, 0.55, 0.60),
        "final": side(0.90, 0.84, 0.97, 0.92, 0.93),
        "seconds": {
            "warmup": 96.0,
            "start": 20.0,
            "rollouts": 148.2,
            "verify": 2.4,
            "learn": 121.9,
            "sync": 6.1,
            "eval": 31.0,
            "total": 431.0,
        },  # fmt: skip
        "tokens": {"generated": 1_234_567, "prefilled": 345_678},
        "mismatch": {"first": 0.00021, "last": 0.00034},
        "versions": {"torch": "2.13.0"},
        "seed": 1,
        "peak_rss_bytes": 5_300_000_000,
    }


def metrics(step):
    rise = 1 / (1 + math.exp(-(step - 45) / 16))
    wave = math.sin(step * 2.399) * 0.05 + math.sin(step * 0.77) * 0.03  # looks like noise, is the same every time
    return {
        "step": step,
        "version": step,
        "reward_mean": 0.38 + 0.48 * rise + wave,
        "solved_fraction": 0.71 + 0.25 * rise + wave / 2,
        "groups_used": round(24 - 12 * rise + 20 * wave),
        "groups_agreeing": round(8 + 12 * rise - 20 * wave),
        "tokens_generated": round(9000 + 2500 * rise + 4000 * wave),
        "response_length_mean": 34 + 10 * rise + 16 * wave,
        "rollouts": 256,
        "dropped": {"failed: no answer within 1.0 s": 1} if step == 0 else {},
        "truncated_fraction": 0.06 - 0.05 * rise,
        "clip_ratio": 0.002 + abs(wave) / 50,
        "loss": -0.004 + wave / 10,
        "grad_norm": 0.9 - 0.4 * rise + wave,
        "entropy": 0.44 - 0.26 * rise + wave / 3,
        "mismatch": 0.0003 + 0.001 * abs(wave),
        "ratio_mean": 1 + wave / 200,
        "seconds_rollouts": 1.25 + wave,
        "seconds_verify": 0.02,
        "seconds_learn": 1.0 + wave / 2,
        "seconds_sync": 0.05,
    }


def rollout(text, answer, correct, *, end="stop", version=0, status="scored", why="equal as integers", written=""):
    ids = [ord(c) % 60 for c in text]
    spans = [[version, 0, len(ids)]]
    step = {"ids": ids, "logprobs": [-0.2] * len(ids), "text": text, "sampled": True, "versions": spans}
    hint = {"ids": [3], "logprobs": [0.0], "text": written, "sampled": False, "versions": []}
    score = float(correct) if status == "scored" else None
    verdict = dict(status=status, score=score, correct=correct, answer=answer, steps=[], why=why, seconds=0.0004)
    steps = [hint, step] if written else [step]
    return {"prompt_ids": [1, 2], "steps": steps, "end": end, "seed": 7, "verdict": verdict} | {
        "value": None,
        "log_weight": 0.0,
    }


def group(step, number, rollouts, prompt="4 - 1 - 7 + 2 ="):
    messages = [{"role": "user", "content": prompt}]
    task = {"id": f"chain_sum/train/{number}", "prompt": messages, "reference": "-2", "verifier": "math"}
    return {"step": step, "version": step, "task": task, "rollouts": rollouts}


def journal():
    worked = "4 - 1 = 3\n3 - 7 = -4\n-4 + 2 = -2\nans:-2"
    slip = "4 - 1 = 3\n3 - 7 = -5\n-5 + 2 = -3\nans:-3"
    wrong, blurt = dict(answer="-3", correct=False, why="-3 is not -2"), rollout("ans:5", "5", False, why="5 is not -2")
    yield group(0, 4, [blurt] * 8)  # all agree
    broken = rollout("ans:" * 30, None, None, status="failed", why="no answer within 1.0 s", end="length")
    yield group(0, 5, [blurt, rollout(worked, "-2", True), rollout(slip, **wrong), broken])
    yield group(60, 6, [rollout(worked, "-2", True, version=60)] * 8)
    hinted = rollout(slip, **wrong, version=119, written="Wait, check the signs.\n")
    yield group(119, 9, [rollout(worked, "-2", True, version=119), hinted])


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder, *, done=True, steps=STEPS):
    folder.mkdir(exist_ok=True)
    source = {"kind": "reasoning_gym", "dataset": "chain_sum", "train": 4000, "heldout": 200, "verifier": "math"}
    base = {"kind": "warmup", "layers": 4, "width": 128}
    config = {"tasks": source, "base": base, "credit": {"kind": "grpo"}, "learner": {"steps": STEPS, "lr": 3e-4}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(lines(metrics(step) for step in range(steps)))
    (folder / "journal.jsonl").write_text(lines(journal()))
    if done:
        (folder / "summary.json").write_text(json.dumps(summary()))
    return folder


# --- no text gets out of its place

HOSTILE = '</pre></style><script>alert("x")</script><img src="http://x.example/y" onerror=alert(1)>'


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed in order."""

    VOID = {"meta", "input"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], [], []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def poisoned(value):
    """The same structure with every text, keys of settings and metrics included, turned hostile."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    if isinstance(value, dict):
        return {**{k: poisoned(v) for k, v in value.items()}, HOSTILE: 1.0}
    return value


def poison(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(lines(poisoned(row) for row in rows))


def test_hostile_text_stays_text(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("config.json", "summary.json", "metrics.jsonl", "journal.jsonl"):
        poison(folder / name)
    page = page_of(folder)
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "iframe", "link", "object"})
    data, script = page.scripts
    assert script == SCRIPT and "<" not in data and HOSTILE in json.loads(data)["groups"][0]["prompt"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in page.words


def test_page_needs_nothing_from_elsewhere(tmp_path):
    html = write_report(write_run(tmp_path / "run")).read_text()
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|fetch|XMLHttp|innerHTML|eval\(", html)


# --- what it says


def test_disjoint_intervals_are_called_learning(tmp_path):
    words = page_of(write_run(tmp_path / "run")).words
    assert "The model learned: +48.0 points" in words
    assert "went from 42.0% to 90.0% on 200 tasks" in words


@pytest.mark.parametrize(
    ("final", "claim"),
    [
        (0.45, "Not shown that the model learned"),
        (0.52, "The model learned: +10.0"),
        (0.20, "The model got worse: -22.0"),
    ],
)
def test_claim_is_no_larger_than_the_intervals_allow(tmp_path, final, claim):
    folder = write_run(tmp_path / "run")
    data = {**summary(), "final": side(final, 0.5, 0.5, 0.5, 0.5)}
    data["final"]["ci"]["greedy"] = [final - 0.04, final + 0.04]  # the interval before is 0.365 to 0.465
    (folder / "summary.json").write_text(json.dumps(data))
    assert claim in page_of(folder).words


def test_no_claim_is_made_without_intervals(tmp_path):
    folder = write_run(tmp_path / "run")
    data = summary()
    del data["base"]["ci"]
    (folder / "summary.json").write_text(json.dumps(data))
    words = page_of(folder).words
    assert "No claim without intervals" in words and "The model learned" not in words


def test_table_shows_every_measure_with_its_interval(tmp_path):
    words = page_of(write_run(tmp_path / "run")).words
    for name, before, after, points in [
        ("greedy", "42.0% 36.5–46.5", "90.0% 84.5–94.5", "+48.0"),
        ("pass@8", "86.0% 80.5–90.5", "97.0% 91.5–100.0", "+11.0"),
        ("marginal@8", "60.0% 54.5–64.5", "93.0% 87.5–97.5", "+33.0"),
    ]:
        tokens = "40 → 40" if name == "greedy" else "323 → 323"
        assert f"{name} {tokens} tokens {before} {after} {points}" in words


def test_time_that_no_phase_claims_is_shown_as_elsewhere(tmp_path):
    words = page_of(write_run(tmp_path / "run")).words
    assert "rollouts 2 min 28 s 34.4%" in words
    assert "elsewhere 7.8 s 1.8%" in words
    assert "The verifiers worked 2.4 s in their own processes" in words


def test_overlapping_phases_are_not_added_up_in_silence(tmp_path):
    folder = write_run(tmp_path / "run")
    data = summary()
    data["seconds"]["total"] = 300.0
    (folder / "summary.json").write_text(json.dumps(data))
    words = page_of(folder).words
    assert "The phases overlap: together 7 min 3 s, by the clock 5 min 0 s." in words and "elsewhere" not in words


def test_everything_left_out_is_counted_by_reason(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 120, "dropped": {"engine lost": 3, "failed: no answer within 1.0 s": 2}}\n')
    data = summary()
    data["final"]["not_judged"] = 4
    (folder / "summary.json").write_text(json.dumps(data))
    words = page_of(folder).words
    assert "21 of 22 rollouts in the journal were scored." in words
    assert "failed: no answer within 1.0 s 3" in words
    assert "engine lost 3" in words
    assert "held-out task that could not be judged (final) 4" in words and "judged (base)" not in words
    agreeing = sum(metrics(step)["groups_agreeing"] for step in range(STEPS))
    assert f"all its scores agree {agreeing:,}" in words


def test_journal_alone_tells_what_was_dropped(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    assert "failed: no answer within 1.0 s 1" in page_of(folder).words


def test_rollouts_shown_are_right_and_wrong_early_and_late(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert (run.early["task"]["id"], run.late["task"]["id"]) == ("chain_sum/train/5", "chain_sum/train/9")
    words = page_of(tmp_path / "run").words
    assert words.count("✓ right") == 2 and words.count("✗ wrong") == 2
    assert "-4 + 2 = -2 ans:-2" in words and "-3 is not -2" in words


def test_text_the_search_wrote_is_told_apart(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert ("em", {"title": "not sampled"}) in page.tags
    assert "Wait, check the signs." in page.words


def test_unknown_metric_gets_a_curve_of_its_own(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(lines({**metrics(i), "expert_load_max": 1.5 + i} for i in range(5)))
    assert "expert load max last 5.5" in page_of(folder).words


def test_a_metric_that_was_always_zero_gets_no_curve(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [{**metrics(i), "groups_unjudged": 0, "lag_max": float(i == 3)} for i in range(5)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    words = page_of(folder).words
    assert "groups unjudged" not in words and "lag max" in words


def test_a_folder_that_holds_no_run_gets_no_page(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- half a run


def test_run_without_any_file_has_a_page(tmp_path):
    assert "No steps yet" in page_of(tmp_path).words


def test_run_that_is_going_has_a_page_that_claims_nothing(tmp_path):
    words = page_of(write_run(tmp_path / "run", done=False, steps=37)).words
    assert "No summary yet, at step 36" in words and "Nothing here is held out" in words
    assert "The model learned" not in words


def test_torn_last_line_is_normal_and_a_broken_line_is_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    journal_text = (folder / "journal.jsonl").read_text()
    (folder / "journal.jsonl").write_text(journal_text + '{"step": 120, "task": {"id"')
    assert read_run(folder).unread == 0
    (folder / "journal.jsonl").write_text("{broken\n" + journal_text)
    assert read_run(folder).unread == 1
    assert "not JSON 1" in page_of(folder).words


def test_nan_and_infinity_are_not_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [metrics(i) for i in range(6)]
    rows[2]["loss"], rows[3]["grad_norm"], rows[4]["entropy"] = math.nan, math.inf, None
    (folder / "metrics.jsonl").write_text(lines(rows))
    html = write_report(folder).read_text()
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", html, flags=re.S))


def test_resumed_run_counts_the_later_row_of_a_step(tmp_path):
    folder = write_run(tmp_path / "run", done=False, steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**metrics(2), "loss": 7.25}) + "\n")
    assert "Loss last 7.25" in page_of(folder).words


def without_each_key(value):
    """Every version of a structure with one key or list item missing, or one key null."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        for changed in without_each_key(inner):
            copy = value.copy()
            copy[key] = changed
            yield copy
        if isinstance(value, dict):
            yield {**value, key: None}
        copy = value.copy()
        del copy[key]
        yield copy


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "journal.jsonl", "config.json"])
def test_no_missing_or_null_key_breaks_the_page(tmp_path, name):
    folder = write_run(tmp_path / "run", steps=2)
    first = json.loads((folder / name).read_text().splitlines()[-1])
    for changed in without_each_key(first):
        (folder / name).write_text(json.dumps(changed) + "\n")
        page_of(folder)


# --- looking through rollouts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def shown(folder, search=""):
    """The page's document after its script has run."""
    page = write_report(folder).resolve()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000"]
    home = f"--user-data-dir={folder}/browser"
    done = subprocess.run([*command, home, f"file://{page}#{search}"], capture_output=True, text=True, timeout=60)
    return done.stdout


def found(document):
    table = re.search(r'<div id="found">(.*?)</div>', document, re.S).group(1)
    return [re.findall(r"<td>(.*?)</td>", row, re.S) for row in re.findall(r"<tr.*?</tr>", table, re.S)]


@in_a_browser
@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("", 22),
        ("least=1", 10),
        ("task=train/5", 4),
        ("words=WAIT, check", 1),
        ("task=train/5&least=1&from=0&to=60&most=1", 1),
    ],
)
def test_a_browser_finds_rollouts_by_score_task_step_and_words(tmp_path, search, expected):
    rows = found(shown(write_run(tmp_path / "run"), search))
    assert len(rows) == expected, rows


@in_a_browser
def test_a_browser_shows_each_token_with_log_probability_advantage_and_version(tmp_path):
    folder = write_run(tmp_path / "run")
    config = {"name": "x", "steps": 1, "credit": {"kind": "grpo"}}
    (folder / "config.json").write_text(json.dumps(config))
    document = shown(folder, "task=train/5&least=1&show=0&colour=advantage")
    tokens = re.findall(r'<span title="(.*?)"', document)
    assert len(tokens) == len("4 - 1 = 3\n3 - 7 = -4\n-4 + 2 = -2\nans:-2")
    assert tokens[0] == "log p -0.2, advantage 0.667, version 0"


@in_a_browser
def test_hostile_text_does_nothing_in_a_browser(tmp_path):
    folder = write_run(tmp_path / "run")
    poison(folder / "journal.jsonl")
    document = shown(folder, "show=0")
    assert "<img" not in document and len(re.findall("<script", document.replace("&lt;script", ""))) == 2


def test_an_excerpt_is_even_bounded_and_holds_the_newest():
    excerpt = Excerpt(limit=1000)
    for i in range(10_000):
        excerpt.add({"number": i, "rollouts": [{"steps": [{"ids": [1] * 10}]}]})
    kept = [row["number"] for row in excerpt.rows()]
    assert excerpt.seen == 10_000 and kept[0] == 0 and kept[-8:] == list(range(9992, 10_000))
    assert len(kept) <= 108 and len({b - a for a, b in zip(kept[:-9], kept[1:-8], strict=True)}) == 1


def test_the_page_of_a_large_journal_stays_small(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [group(step, step, [rollout("4 - 1 = 3 " * 20, "3", True)] * 8) for step in range(400)]
    (folder / "journal.jsonl").write_text(lines(rows))
    assert 400 * 8 * 200 > MOST_TOKENS
    assert write_report(folder).stat().st_size < 6e6


# --- time line


def test_the_time_line_has_a_lane_for_the_learner_and_each_engine(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [metrics(step) | {"time": 1e9 + 3 * step} for step in range(STEPS)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    events = [
        {
            "time": 1e9 - 50,
            "engine": 0,
            "state": "serving",
            "version": 1,
            "lag": 0,
            "restarts": 0,
            "node": "a",
            "why": "",
        },
        {
            "time": 1e9 + 60,
            "engine": 0,
            "state": "restarting",
            "version": 1,
            "lag": 2,
            "restarts": 1,
            "node": "a",
            "why": HOSTILE,
        },
        {
            "time": 1e9 + 90,
            "engine": 0,
            "state": "serving",
            "version": 9,
            "lag": 0,
            "restarts": 1,
            "node": "a",
            "why": "",
        },
        {
            "time": 1e9 - 50,
            "engine": 1,
            "state": "serving",
            "version": 1,
            "lag": 0,
            "restarts": 0,
            "node": "b",
            "why": "",
        },
    ]
    (folder / "events.jsonl").write_text(lines(events))
    page = page_of(folder)
    assert "learner" in page.text and "engine 0" in page.text and "engine 1" in page.text
    assert any("restarting at version 1" in text for text in page.text)


def test_groups_left_out_for_their_lag_are_counted_by_reason(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [metrics(step) | {"groups_dropped": {"stale: its oldest token lags 5 versions": 2}} for step in range(3)]
    (folder / "metrics.jsonl").write_text(lines(rows))
    assert "group stale: its oldest token lags 5 versions 6" in page_of(folder).words
