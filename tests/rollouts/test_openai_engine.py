"""The engine on a server of the completions API, against a small server that serves the toy chain."""

import asyncio
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rollouts.openai_engine import OpenAIEngine, ServerError
from search.base import STEP, TOKENS, Sampling, Trajectory, bind
from search.beam import Beam
from search.cot import CotDecoding
from search.force import Force
from search.marginal import estimate
from search.sample import Sample
from search.toy import ChainEngine, same_number, trap
from search.toy_checkpoint import write_checkpoint
from search.tree import explore

transformers = pytest.importorskip("transformers")

CHAIN = trap()
PROBABILITY = dict(CHAIN.paths())


class Chat:
    """What a server is told and how it answers: the toy chain, as vLLM's server would put it, or with faults."""

    def __init__(self):
        self.bodies, self.faults, self.dialect, self.never = [], [], "vllm", {}

    def answer(self, body):
        self.bodies.append(body)
        if self.faults:
            return self.faults.pop(0)
        changes = {"temperature": body["temperature"], "top": body["logprobs"], "max_tokens": body["max_tokens"]}
        engine = ChainEngine(CHAIN, Sampling(**changes))
        until = STEP if body.get("stop") else TOKENS(body["max_tokens"])
        (path,) = asyncio.run(engine.extend(Trajectory(tuple(body["prompt"]), seed=body["seed"]), until=until))
        return 200, self.told(path, by_delimiter=bool(body.get("stop")) and path.end is None)

    def told(self, path, by_delimiter):
        step, name = path.steps[0], self.name
        choice = {
            "text": path.text,
            "finish_reason": "stop" if path.end == "stop" or by_delimiter else "length",
            "stop_reason": "\n" if by_delimiter else None,
            "logprobs": {
                "tokens": [name(i) for i in step.ids],
                "token_logprobs": list(step.logprobs),
                "top_logprobs": [{name(a.id): a.logprob for a in row} | self.never for row in step.top] or None,
            },
        }
        if self.dialect == "plain" and path.end == "stop":  # a server that keeps the last token to itself
            del choice["stop_reason"]
            for values in choice["logprobs"].values():
                values and values.pop()
        if self.dialect == "silent":
            choice["logprobs"] = None
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 1}}}

    def name(self, token):
        return f"token_id:{token}" if self.dialect == "vllm" else CHAIN.vocabulary[token]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_checkpoint(CHAIN, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def address():
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = self.server.chat.answer(body) if self.path == "/v1/completions" else (404, {})
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def chat(address):
    address.chat = Chat()
    return address.chat


@pytest.fixture
def engine(address, chat, tokenizer):
    return OpenAIEngine(f"http://127.0.0.1:{address.server_port}/v1/", "chain", tokenizer, Sampling(max_tokens=12))


def run(search, engine, seed=0):
    return asyncio.run(explore(bind(search, CHAIN.answer, same_number), CHAIN.root(seed), engine)).paths


def test_a_server_without_logprobs_is_refused_with_the_remedy(engine, chat):
    chat.dialect = "silent"
    with pytest.raises(ServerError, match="tells no log-probabilities of chain.*vllm serve"):
        asyncio.run(engine.extend(CHAIN.root()))


def test_a_refusal_is_told_at_once_and_a_busy_server_is_asked_again(engine, chat):
    chat.faults = [(400, {"error": "the model `chain` does not exist"})]
    with pytest.raises(ServerError, match="refuses the request: 400.*does not exist"):
        asyncio.run(engine.extend(CHAIN.root()))
    assert len(chat.bodies) == 1
    chat.faults = [(503, {}), (429, {})]
    (path,) = asyncio.run(engine.extend(CHAIN.root()))
    assert path.end == "stop" and len(chat.bodies) == 4


def test_a_server_that_is_not_there_is_named(tokenizer):
    gone = OpenAIEngine("http://127.0.0.1:9/v1", "chain", tokenizer)
    with pytest.raises(ServerError, match="127.0.0.1:9.*did not answer in 4 tries.*engine.url"):
        asyncio.run(gone.extend(CHAIN.root()))


def test_tokens_told_by_texts_that_are_none_are_refused(engine, chat):
    chat.dialect = "text"
    chat.name = lambda token: "no such token"
    with pytest.raises(ServerError, match="not one token of this tokenizer"):
        asyncio.run(engine.extend(CHAIN.root()))


@pytest.mark.parametrize("dialect", ["vllm", "plain"])
def test_paths_and_their_probabilities_are_the_chain_s(engine, chat, dialect):
    chat.dialect = dialect
    paths = run(Sample(n=20), engine)
    assert len({path.seed for path in paths}) == len({body["seed"] for body in chat.bodies}) == 20
    for path in paths:
        assert path.end == "stop" and path.ids[-1] == CHAIN.end and path.steps[0].cached == 1
        known = [lp for lp in path.steps[0].logprobs if not math.isnan(lp)]
        assert len(known) == path.length - (dialect == "plain")
        assert math.fsum(known) == pytest.approx(PROBABILITY[path.ids[1:]], abs=1e-9)  # the chain always ends then
    assert run(Sample(n=20), engine) == paths or dialect == "plain"  # NaN equals nothing


def test_searches_that_need_alternatives_steps_and_writing_run_on_a_server(engine):
    margins = {path.text[0]: path.value for path in run(CotDecoding(k=3), engine)}
    assert margins == pytest.approx({"D": 0.35, "S": 0.47, "T": 0.45}, abs=1e-4)
    for path in asyncio.run(engine.extend(CHAIN.root(), n=5, until=STEP)):
        assert path.length == 1 and path.text.endswith("\n") and path.end is None
    (path,) = asyncio.run(engine.extend(CHAIN.root(), until=TOKENS(2)))
    assert path.length == 2 and path.end is None
    (path,) = asyncio.run(engine.at(max_tokens=2).extend(CHAIN.root()))
    assert path.length == 2 and path.end == "length"
    assert all("S\n" in path.text for path in run(Force(n=3, wait="S\n", finish="S\n"), engine))
    got = estimate(run(Sample(n=64, top=64), engine), equal=same_number, answer=CHAIN.answer, method="rao_blackwell")
    assert same_number(got.answer, "18") and got.mass == pytest.approx(0.5893, abs=4 * 0.035)
    beam = run(Beam(width=3, branch=3, expand="top"), engine)
    assert beam[0].logprob == pytest.approx(max(PROBABILITY.values()), abs=1e-9)


def test_alternatives_that_never_come_are_left_out(engine, chat):
    chat.never = {"token_id:5": -9999.0}
    (path,) = asyncio.run(engine.at(top=3).extend(CHAIN.root(), until=TOKENS(1)))
    assert {a.text for a in path.steps[0].top[0]} == {"D\n", "S\n", "T\n"}


def test_an_end_that_may_be_a_step_s_is_refused(engine, chat):
    chat.dialect = "plain"
    chat.told = lambda path, by_delimiter, told=chat.told: _stripped(told(path, by_delimiter))
    with pytest.raises(ServerError, match="does not say whether the delimiter"):
        asyncio.run(engine.extend(CHAIN.root(), until=STEP))


def _stripped(answer):
    """As a server that cuts the stop string off and has no word for what stopped it."""
    choice = answer["choices"][0]
    choice.pop("stop_reason", None)
    for values in choice["logprobs"].values():
        values and values.pop()
    return answer
