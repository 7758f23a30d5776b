import subprocess
import sys
from pathlib import Path

import pytest

from reasoner.config import KINDS, ConfigError, load, load_any, to_dict
from reasoner.typed_toml import build, flat
from search import Beam

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.toml"


def refused(*overrides: str, path: Path = QUICKSTART) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("stepz=3", ["stepz", "Did you mean steps?"]),
        ("learner.max_grad_nrom=1", ["Did you mean max_grad_norm?"]),
        ("sampling.temprature=1.0", ["Did you mean temperature?"]),
        ("search.kind='sampel'", ["did you mean 'sample'?"]),
        ("credit.kind='grop'", ["Did you mean grpo?"]),
        ("tasks.dataste='x'", ["Did you mean dataset?"]),
        ("search.width=3", ["search.width", "Sample"]),
        ("steps='many'", ["steps", "'many'", "int"]),
        ("steps=true", ["steps", "bool"]),
        ("sampling=3", ["sampling", "table"]),
        ("evaluate.k=99", ["evaluate.k = 99", "evaluate.n = 16", "lower k"]),
        ("sampling.max_tokens=500", ["500", "engine.max_model_len = 128", "raise max_model_len"]),
        ("sampling.temperature=0.0", ["sampling.temperature", "above 0"]),
        ("search.n=1", ["search.n = 1", "raise n"]),
        ("tasks_per_step=0", ["tasks_per_step = 0", "at least 1"]),
        ("steps=-1", ["steps = -1", "at least 0"]),
        ("learner.importance='tokens'", ["token_truncate"]),
        ("learner.loss='daop'", ["learner.loss", "Did you mean dapo?"]),
        ("name='a/b'", ["name", "folder"]),
        ("sampling.top_p=1.5", ["sampling.top_p", "(0, 1]"]),
        ("sampling.temperature=2.5", ["sampling.temperature", "at most 2"]),
        ("search.kind='best_of'", ["search", "score"]),
        ("score.kind='proces'", ["score.kind", "Did you mean process?"]),
        ("score.join='sum'", ["score", "join"]),
        ("score.kind='process'", ["score", "Sample asks for no score", "best_of"]),
        ("engine.dtype='fp16'", ["engine.dtype", "float16"]),
        ("verify_timeout=0.0", ["verify_timeout"]),
        ("learner.lr_warmup=100", ["lr_warmup = 100", "steps = 60"]),
        ("learner.report_to=['tensorbord']", ["tensorbord", "tensorboard"]),
        ("policies.mathh.form='any'", ["policies.mathh", "math"]),
        ("policies.math.fomr='any'", ["policies.math", "form"]),
        ("policies.math=3", ["policies.math", "table"]),
        ("engine.kind='openai'", ["engine.url = ''", "http://localhost:8000/v1"]),
        ("engine.url='http://localhost:8000/v1'", ["engine.kind = 'vllm'", "engine.model = ''"]),
        ("learner.router_replay=true", ["'vllm'", "records no experts", "engine.kind = 'paged'"]),
        ("engine.kind='sglang'", ["'vllm'", "'local'"]),
        ("tasks.train=0", ["train=0"]),
        ("learner.lr=nan", ["learner.lr = nan", "finite"]),
        ("learner.lr=-1e-4", ["learner.lr = -0.0001", "negative"]),
        ("verify_timeout=inf", ["verify_timeout = inf", "finite"]),
        ("seed=-1", ["seed = -1", "negative"]),
        ("seed=4294967296", ["seed = 4294967296", "below"]),
        ("base.blurt=2.0", ["base.blurt = 2.0", "between 0 and 1"]),
        ("base.batch=0", ["base.batch = 0", "at least 1"]),
        ("engine.max_num_seqs=0", ["engine.max_num_seqs = 0", "at least 1"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, names):
    message = refused(override)
    assert all(name in message for name in names), message


@pytest.mark.parametrize("value", ["5", "true", "nan", "[]", "[{}]", "{a=1}", "{kind=5}", "1979-05-27", "''"])
@pytest.mark.parametrize("name", ["quickstart", "search", "star"])
def test_no_value_at_any_key_is_more_than_a_mistake_of_one_line(name, value):
    path = ROOT / "configs" / f"{name}.toml"
    leaves = flat(to_dict(load_any(path)))
    tables = {key.rsplit(".", i)[0] for key in leaves for i in range(1, key.count(".") + 1)}
    for key in sorted(leaves.keys() | tables):
        try:
            load_any(path, [f"{key}={value}"])
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("method", ["5", "{}", '{name = "a", search = 5}', '{name = "a", search = {kind = []}}'])
def test_a_method_of_a_wrong_shape_is_named(tmp_path, method):
    (tmp_path / "c.toml").write_text(f'name = "x"\nbudget = 500\nmethods = [{method}]\n')
    with pytest.raises(ConfigError, match="methods"):
        load_any(tmp_path / "c.toml")


def test_training_on_a_server_that_takes_no_weights_is_refused_before_anything_is_loaded():
    from reasoner.train import train

    run = load(QUICKSTART, ["engine.kind='openai'", "engine.url='http://localhost:8000/v1'", "engine.model='m'"])
    with pytest.raises(ConfigError, match="no weights can be pushed to http://localhost:8000/v1.*'vllm'"):
        train(run, ray="local", screen=None)


def test_arithmetic_codes_are_refused_where_vllm_draws_by_its_own_noise():
    assert load(QUICKSTART, ["sampling.arithmetic=true"]).sampling.arithmetic
    message = refused("sampling.arithmetic=true", "engine.gpus=1")
    assert all(part in message for part in ("sampling.arithmetic", "engine.gpus = 1", "leave it out"))


def test_a_file_that_is_missing_or_broken_is_named(tmp_path):
    assert "does not exist" in refused(path=tmp_path / "no.toml")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    assert "broken.toml" in refused(path=tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml is no text" in refused(path=tmp_path / "binary.toml")
    (tmp_path / "empty.toml").write_text("")
    assert "name is missing" in refused(path=tmp_path / "empty.toml")


def test_overrides_reach_nested_keys_and_keep_their_types():
    run = load(QUICKSTART, ["learner.lr=1", "tasks.dataset=basic_arithmetic", "search.n=2", "credit.kind=shuffled"])
    assert run.learner.lr == 1.0 and run.tasks.dataset == "basic_arithmetic" and type(run.credit).__name__ == "Shuffled"


@pytest.mark.parametrize("until", ["end", 16])
def test_a_key_of_two_types_takes_both(until):
    assert build(Beam, {"until": until}, KINDS, "search").until == until


def test_the_resolved_config_says_the_kind_of_every_strategy():
    tree = to_dict(load(QUICKSTART))
    assert (
        tree["tasks"]["kind"] == "reasoning_gym"
        and tree["search"]["kind"] == "sample"
        and tree["credit"]["kind"] == "grpo"
    )


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda p: p.name)
def test_every_config_loads_and_opens_with_what_it_needs_and_reaches(path):
    load_any(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith("#") and ("core" in first or "GPU" in first)


def test_checking_loads_no_model_library():
    code = f"import sys; from reasoner.__main__ import main; main(['check', {str(QUICKSTART)!r}])"
    code += "; print([m for m in ('torch', 'ray', 'vllm', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "8000 for training, 200 held out" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_loss_over_rows_refuses_pieces():
    assert "micro_batches = 2" in refused("learner.loss='grpo'", "learner.micro_batches=2")
    assert "learner.workers = 2" in refused("learner.loss='grpo'", "learner.workers=2")


def test_keys_stay_few():
    tree = to_dict(load(QUICKSTART))
    strategies = {"tasks", "base", "search", "credit"}  # their fields are their own
    keys = sum(len(v) if isinstance(v, dict) else 1 for k, v in tree.items() if k not in strategies) + len(strategies)
    assert keys <= 60


def test_policies_reach_the_verifiers_that_judge_rollouts():
    import asyncio

    from verifiers import Pool
    from verifiers.base import Task

    task = Task("t", ({"role": "user", "content": "3 + 4 ="},), "7", "math")
    with Pool(1, policies=dict(load(QUICKSTART).policies)) as pool:
        verdicts = asyncio.run(pool.verify(task, ["Answer: 7", "Answer: 3+4", "Answer: 3 + 4 = 7"]))
    assert [v.correct for v in verdicts][:2] == [True, False]


def test_tasks_that_answer_back_want_a_search_that_listens():
    puzzle = ("tasks={kind='puzzle', dataset='chain_sum'}", "engine.kind='local'")
    assert "search.kind = 'episode'" in refused(*puzzle)
    assert "search.context = 1024 exceeds engine.max_model_len = 128" in refused(*puzzle, "search={kind='episode'}")
    assert load(QUICKSTART, [*puzzle, "search={kind='episode', context=128}"]).search.context == 128
