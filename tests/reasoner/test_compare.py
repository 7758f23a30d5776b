"""Searches side by side: bad input is named before anything is drawn, sizes fit the budget, and numbers are paired."""

import asyncio
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reasoner import compare
from reasoner.__main__ import main
from reasoner.compare import Result, Stage, accuracy, comparisons, grow, summarise
from reasoner.compare_page import render, why
from reasoner.config import Comparison, ConfigError, Method, load_comparison
from reasoner.evaluate import Reading, read, require_steps
from search import Beam, BestOf, Revise, Sample
from search.base import Sampling, Step, Trajectory
from search.scripted import Scripted
from verifiers import Pool
from verifiers.base import Task

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "search.toml"
SMALL = (
    "--heldout=6 --sizing=3 --budget=120 --tasks.train=64 --tasks.heldout=8 --base.steps=4 --base.batch=8 "
    "--base.hidden=32 --base.layers=2 --sampling.max_tokens=24 --verifier_workers=1"
).split()
METHODS = """
[[methods]]
name = "greedy"
temperature = 0.0
search = { kind = "sample", n = 1 }

[[methods]]
name = "majority"
search = { kind = "sample" }

[[methods]]
name = "marginal"
search = { kind = "sample" }
estimator = "horvitz_thompson"

[[methods]]
name = "best-of-n"
search = { kind = "best_of" }

[[methods]]
name = "beam"
search = { kind = "beam", branch = 2, until = 8 }
"""


def written(folder: Path, methods: str = METHODS) -> Path:
    path = folder / "searches.toml"
    path.write_text(CONFIG.read_text().split("[[methods]]")[0] + methods)
    return path


# -- bad input ------------------------------------------------------------------------------------------------------


def method(text: str) -> str:
    return f'[[methods]]\nname = "m"\n{text}\n'


@pytest.mark.parametrize(
    ("methods", "override", "names"),
    [
        (METHODS, "score.kind='verifier'", ["methods.greedy", "answer key", "score.kind = 'process'"]),
        (method('search = {kind = "beam"}\nscore = {kind = "verifier"}'), "", ["methods.m", "answer key"]),
        (METHODS, "budget=20", ["budget = 20", "one path", "max_tokens = 72"]),
        (METHODS, "sampling.step=''", ["sampling.step is empty"]),
        (method('search = {kind = "beam", branch = 8}'), "budget=200", ["methods.m", "branch=8", "576", "200"]),
        (method('search = {kind = "sample"}\nestimator = "best"'), "", ["methods.m", "'best'", "best_of"]),
        (method('search = {kind = "sample"}\nestimator = "vots"'), "", ["methods.m", "vots", "vote"]),
        (method('search = {kind = "sample"}\nestimator = "rao_blackwell"'), "", ["methods.m", "search.top"]),
        (method('search = {kind = "sample"}\nestimator = "gumbel"'), "", ["methods.m", "gumbel"]),
        (METHODS + method("") + method(""), "", ["two are called 'm'"]),
        (method("temperature = 3.0"), "", ["methods.m.temperature = 3.0"]),
        (METHODS, "sizing=0", ["sizing = 0", "at least 1"]),
        (method('search = {kind = "baem"}'), "", ["did you mean 'beam'?"]),
        ('[[methods]]\nname = "a/b"\n', "", ["a/b"]),
        ("", "", ["no [[methods]]", "configs/search.toml"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy_before_anything_loads(tmp_path, methods, override, names):
    with pytest.raises(ConfigError) as error:
        load_comparison(written(tmp_path, methods), [override] if override else [])
    assert all(name in str(error.value) for name in names), error.value


def test_a_search_that_needs_a_score_and_has_none_is_named(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace('[score]\nkind = "process"', ""))
    with pytest.raises(ConfigError, match="methods.best-of-n.search.*needs a score"):
        load_comparison(path)


def test_training_and_comparing_do_not_take_each_others_configs(tmp_path, capsys):
    assert main(["train", str(CONFIG)]) == 2
    assert "reasoner search" in capsys.readouterr().err
    assert main(["search", str(ROOT / "configs" / "quickstart.toml")]) == 2
    assert "[[methods]]" in capsys.readouterr().err


def test_evaluation_refuses_a_config_that_binds_the_answer_key(capsys):
    assert (
        main(["eval", str(ROOT / "configs" / "quickstart.toml"), "--search.kind=best_of", "--score.kind=verifier"]) == 2
    )
    assert "answer key" in capsys.readouterr().err


def test_a_written_size_is_kept_and_others_grow():
    grows = {m.name: m.grow for m in load_comparison(CONFIG).methods}
    assert not grows["greedy"] and grows["majority"] and grows["beam"]


def test_a_plan_counts_what_a_search_may_generate(capsys):
    quickstart = str(ROOT / "configs" / "quickstart.toml")
    assert main(["check", quickstart]) == 0 and "32 tasks, 256 paths" in capsys.readouterr().out
    assert main(["check", str(CONFIG), "--tasks.train=100"]) == 0 and "9 methods" in capsys.readouterr().out


# -- with a scripted engine -----------------------------------------------------------------------------------------


class Letters:
    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        return [ord(c) for message in messages for c in message["content"]]


def task(number: int, reference: str = "7") -> Task:
    return Task(f"t/{number}", ({"role": "user", "content": f"3 + {number} ="},), reference, "math")


@pytest.fixture(scope="module")
def pools():
    with Pool(1) as judges, Pool(1) as open_:
        yield judges, open_


def stage(pools, replies, budget=100, **sampling) -> Stage:
    engine = Scripted(
        lambda text, child: replies[child % len(replies)][len(text) :], Sampling(max_tokens=40, **sampling)
    )
    comparison = Comparison("test", (), budget)
    return Stage(comparison, engine, Letters(), *pools, {})


@pytest.mark.parametrize(("budget", "n"), [(100, 10), (99, 9), (40, 4), (10, 1)])
def test_a_method_grows_to_the_largest_size_within_the_budget(pools, budget, n):
    made = stage(pools, ["Answer: 7"], budget)  # 9 letters and the end: 10 tokens a path
    grown, cost = asyncio.run(grow(made, Method("m", Sample()), [task(4), task(5)]))
    assert grown.search.n == n and cost == 10 * n
    kept, _ = asyncio.run(grow(made, Method("m", Sample(n=99), grow=False), [task(4)]))
    assert kept.search.n == 99


def test_growing_stops_where_more_of_a_search_costs_nothing_more(pools):
    made = stage(pools, ["Answer: 7"], 1000)  # every child of the beam is the same: at any width one path is left
    made = replace(made, comparison=replace(made.comparison, score=None))
    search = Beam(branch=1, until="end")
    grown, cost = asyncio.run(grow(made, Method("m", search, score=compare_score()), [task(4)]))
    assert cost <= 1000 and grown.search.width < 200


def compare_score():
    from rollouts.score import Process

    return Process()


def test_a_step_search_on_a_model_that_writes_no_steps_is_named_after_the_first_batch(pools):
    def groups(*replies):
        found = asyncio.run(compare._search(stage(pools, replies), Method("probe", Sample(n=4)), [task(4)]))
        return [each.group for each in found]

    with pytest.raises(ConfigError, match=r"methods.walk.*'\\n'.*Answer: 7"):
        require_steps(Beam(), "\n", groups("Answer: 7"), "methods.walk")
    require_steps(Beam(), "\n", groups("Answer: 7", "3+4=7\nAnswer: 7"))
    require_steps(Sample(), "\n", groups("Answer: 7"))


def test_words_that_the_model_cannot_spell_are_named_before_they_are_written(pools):
    class Digits(Scripted):
        def write(self, path, text, *, turn=False):
            if not set(text) <= set("0123456789="):
                raise ValueError("unknown characters")
            return super().write(path, text, turn=turn)

    made = stage(pools, ["Answer: 7"])
    made = replace(made, engine=Digits(made.engine.reply, made.engine.sampling))
    compare._require_writable(Method("m", Revise(critique="=", request="=")), made, task(4))
    with pytest.raises(ConfigError, match="methods.m.*Check the solution"):
        compare._require_writable(Method("m", Revise()), made, task(4))


def test_a_score_with_a_model_of_its_own_is_read_from_its_own_engine(pools):
    served = []

    class Trained:
        checkpoint = "prm"

        def open(self, question, engine, pool):
            served.append(engine)
            return compare_score().open(question, engine, pool)

    made = stage(pools, ["Answer: 7"])
    own = replace(made.engine, logprob=-0.5)
    asyncio.run(compare._search(replace(made, scorers={"prm": own}), Method("m", BestOf(n=2), Trained()), [task(4)]))
    asyncio.run(compare._search(made, Method("m", BestOf(n=2), compare_score()), [task(4)]))
    assert served == [own]


def test_a_scores_own_model_must_read_the_same_tokens(tmp_path):
    from reasoner.engine import scoring_engine
    from reasoner.model import char_tokenizer
    from rollouts.score import ProcessModel

    run, tokenizer = load_comparison(CONFIG).run(), char_tokenizer("0123")
    with pytest.raises(ConfigError, match="nowhere.*config.json"):
        with scoring_engine(run, ProcessModel("nowhere"), None, tokenizer, "local"):
            pass
    char_tokenizer("abc").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(ConfigError, match="another vocabulary.*reasoner prm train"):
        with scoring_engine(run, ProcessModel(str(tmp_path)), None, tokenizer, "local"):
            pass


def result(pools, name, search, replies, estimator="", tasks=(4, 5), grown=True) -> Result:
    async def run():
        made = Method(name, search, compare_score(), estimator, grow=grown)
        found = await compare._search(stage(pools, replies), made, [task(n) for n in tasks])
        readings = [await read(each.group, pools[0]) for each in found]
        return Result(made, found, {r.task: r for r in readings}, 1.0)

    return asyncio.run(run())


def test_methods_are_compared_at_equal_tokens(pools):
    right, wrong = "Answer: 7", "Answer: 8"
    wide = result(pools, "wide", Sample(n=8), [right, wrong, wrong, wrong])  # 10 tokens each
    narrow = result(pools, "narrow", Beam(width=1, branch=2, until="end"), [right, wrong])
    (row,) = comparisons([wide, narrow], ["t/4", "t/5"])
    assert row["tokens"] == (20.0, 20.0)
    # Two of eight paths, of which two are right: both right 1/28, one right 12/28 (a tie, half), else wrong.
    assert row["difference"] == pytest.approx((1 + 6) / 28 - 1)
    fixed = replace(wide, method=replace(wide.method, grow=False))
    (row,) = comparisons([fixed, narrow], ["t/4", "t/5"])
    assert row["tokens"] == (80.0, 20.0) and row["difference"] == -1


def test_a_path_that_hits_the_limit_is_counted_and_never_votes(pools):
    endless = "Answer: 8" + " and on" * 20
    found = result(pools, "m", Sample(n=3), [endless, endless, "Answer: 7"])
    summary = summarise([found])
    row = summary["methods"]["m"]
    assert row["accuracy"] == 1.0 and row["unfinished"] == pytest.approx(2 / 3)
    assert result(pools, "m", Sample(n=2), [endless]).worth(["t/4"]) == {"t/4": 0.0}


def reading(*paths: tuple[str, bool], values=()) -> Reading:
    made = [
        Trajectory((1,), (Step((i, 0), (-1.0, 0.0), answer),), end="stop", value=value)
        for i, ((answer, _), value) in enumerate(zip(paths, values or [None] * len(paths), strict=True))
    ]
    answers = [answer for answer, _ in paths]
    same = {(a, b): a == b for a in answers for b in answers}
    return Reading("t", made, answers, [right for _, right in paths], same)


def test_tied_leaders_share_the_credit_and_scores_of_nought_count_alike():
    assert accuracy(reading(("5", True), ("6", False)), "vote") == 0.5
    assert accuracy(reading(("5", True), ("6", False), ("6", False)), "vote") == 0.0
    assert accuracy(reading(("5", True), ("6", False), ("5", True), values=[0.0, 0.0, 0.0]), "prm") == 1.0


def test_the_curve_of_independent_paths_ends_where_the_table_stands(pools):
    found = result(pools, "m", BestOf(n=4), ["3+4=8\nAnswer: 8", "3+4=7\nAnswer: 7", "Answer: 9", "Answer: 9"])
    row = summarise([found])["methods"]["m"]
    assert [p["k"] for p in row["curve"]] == [1, 2, 3, 4] and all(p["exact"] for p in row["curve"])
    assert row["curve"][0]["accuracy"] == 0.25 and row["curve"][-1]["accuracy"] == row["accuracy"] == 1.0
    assert row["curve"][-1]["tokens"] == row["tokens"]["generated"]
    assert summarise([result(pools, "m", Beam(width=2), ["3+4=7\nAnswer: 7"])])["methods"]["m"]["curve"] == []


# -- the page -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    VOID = {"meta", "br", "line", "circle", "path", "polygon", "polyline", "rect"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.broken = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.broken.append(tag)


def page(pools, *results) -> str:
    summary = summarise(results) | {"name": "<b>x", "seed": 0, "budget": 100, "checkpoint": "c", "versions": {}}
    return render(json.loads(json.dumps(summary)), json.loads(json.dumps(compare.trees(results))))


def test_the_page_is_whole_and_no_text_of_a_model_breaks_out_of_it(pools):
    hostile = "<script>alert(1)</script>\nAnswer: 7"
    made = [result(pools, "a<i>", Sample(n=3), [hostile, "Answer: 8"]), result(pools, "beam", Beam(), [hostile])]
    text = page(pools, *made)
    tags = Tags(text)
    assert not tags.open and not tags.broken and "script" not in tags.seen
    assert "&lt;script&gt;" in text and "http" not in text.replace("http-equiv", "")


def test_the_tree_shows_scores_verdicts_and_what_leads_to_the_winner(pools):
    made = result(pools, "beam", Beam(width=1, branch=2), ["3+4=7\nAnswer: 7", "3+4=8\nAnswer: 8"])
    text = page(pools, made)
    assert '<div class="node wins"' in text and '<i class="chip">1.00</i>' in text and ">0.00</i>" in text
    (shown,) = compare.trees([made])[0]["methods"]
    assert shown["answer"] == "7" and "highest score" in why(shown)


def test_every_method_has_a_colour_of_its_own(pools):
    row = summarise([result(pools, "m", Sample(n=1), ["Answer: 7"])])
    for count in (1, 9, 14):
        methods = {f"m{i}": row["methods"]["m"] for i in range(count)}
        page = render({**row, "name": "t", "budget": 9, "methods": methods, "comparisons": []}, [])
        colours = re.findall(r"\.m(\d+) { --c:(oklch[^}]*) }", page)
        assert len(colours) == len({colour for _, colour in colours}) == count
        assert all(f'class="m{i}"' in page for i in range(count))


def test_why_an_answer_won_is_said_in_votes(pools):
    made = result(pools, "m", Sample(n=3), ["Answer: 7", "Answer: 7", "Answer: 8"])
    (shown,) = compare.trees([made])[0]["methods"]
    assert why(shown).startswith("7 has 2 of 3 votes; then 8 1.")


# -- the whole command, on a tiny model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("compare"))


def searched(folder: Path) -> Path:
    folders = [f"--out={folder}/runs", f"--cache={folder}/cache"]
    assert main(["search", str(written(folder)), *SMALL, *folders, "--export=3"]) == 0
    return folder / "runs" / "search"


def test_a_comparison_leaves_tables_journals_trees_and_a_page(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    names = ["greedy", "majority", "marginal", "best-of-n", "beam"]
    assert list(summary["methods"]) == names and len(summary["comparisons"]) == 10
    for name in names:
        row = summary["methods"][name]
        assert 0 <= row["ci"][0] <= row["accuracy"] <= row["ci"][1] <= 1 and row["tokens"]["generated"] > 0
        assert len((run / f"{name}.jsonl").read_text().splitlines()) == 6
    assert summary["methods"]["best-of-n"]["tokens"]["judged"] > 0
    assert json.loads((run / "config.json").read_text())["methods"][4]["search"]["kind"] == "beam"
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").stat().st_size > 5000


def test_what_is_exported_comes_from_training_tasks_alone(run):
    lines = (run / "training" / "steps.jsonl").read_text().splitlines()
    ids = {json.loads(line)["id"].rsplit("/", 1)[0] for line in lines}
    assert ids and ids <= {f"chain_sum/train/{i}" for i in range(3)}
    assert {file.name for file in (run / "training").iterdir()} == {"sft.jsonl", "dpo.jsonl", "steps.jsonl"}


def grown(run: Path) -> list:
    """Every node of every tree by its identity, which is hashed from seeds and token ids."""
    trees = json.loads((run / "trees.json").read_text())
    return [[(n["path"], n["parent"], n["text"]) for n in m["nodes"]] for task in trees for m in task["methods"]]


def test_the_same_seed_gives_the_same_trees(run, tmp_path):
    assert grown(searched(tmp_path)) == grown(run)  # log p may differ in rounding: batches depend on timing


@pytest.mark.slow
def test_searches_run_on_vllm_and_grow_the_trees_of_the_engine_in_process(run, tmp_path):
    folders = [f"--out={tmp_path}/runs", f"--cache={run.parents[1]}/cache"]
    vllm = ["--engine.kind=vllm", "--engine.kv_cache_gib=0.1"]
    assert main(["search", str(written(tmp_path)), *SMALL, *folders, *vllm]) == 0
    here, there = (json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "runs" / "search"))
    sizes = [{name: m["size"] for name, m in summary["methods"].items()} for summary in (here, there)]
    assert sizes[0] == sizes[1]
