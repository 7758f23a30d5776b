"""its_hub beside our searches: its methods on the very engine object, and as it is usually used, over HTTP.

Neighbour: `benchmarks.search` runs both on the same questions. its_hub is not installed with the project:

    pip install --target its_hub --no-deps its-hub backoff; PYTHONPATH=its_hub python -m benchmarks.search engine
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from search.base import END, STEP, Trajectory, derive
from search.toy import Chain


@contextmanager
def its_hub(engine, chain: Chain, prompts, folder: Path, n: int):
    """Its methods as runs by name, which take a turn's number and give the tokens generated; {} where it is missing.

    The server is alive inside.
    """
    if importlib.util.find_spec("its_hub") is None:
        print("its_hub is not found: its rows are LEFT OUT (see --help for how to add it)")
        yield {}
        return
    with _server(folder) as url:
        yield _runs(engine, chain, prompts, folder, url, n)


def _runs(engine, chain: Chain, prompts, folder: Path, url: str, n: int) -> dict:
    from its_hub.api import AbstractLanguageModel, AbstractOutcomeRewardModel, AbstractProcessRewardModel
    from its_hub.core.algorithms.beam_search import BeamSearch
    from its_hub.core.algorithms.bon import BestOfN
    from its_hub.core.algorithms.self_consistency import SelfConsistency
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
    from its_hub.core.lms.step_generation import StepGeneration
    from its_hub.core.orchestrator import LMOrchestrator
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731

    class Served(AbstractLanguageModel):
        """The same engine under its_hub's interface: text in, text out."""

        generated = 0
        calls = 0

        async def agenerate_single(self, messages, stop=None, **settings):
            said = messages[-1].content if messages[-1].role == "assistant" else ""
            Served.calls += 1
            ids = (chain.start, *encode(messages[0].content), *encode(said))
            path = Trajectory(ids, seed=derive("its_hub", Served.calls))
            (grown,) = await engine.extend(path, until=STEP if stop else END)
            Served.generated += grown.sampled_tokens
            text = grown.text.removesuffix(stop) if stop else grown.text
            return {"role": "assistant", "content": text if grown.end is None else text + "<end>"}

        async def agenerate(self, messages, stop=None, **settings):
            if messages and isinstance(messages[0], list):
                return await asyncio.gather(*(self.agenerate_single(m, stop) for m in messages))
            return await self.agenerate_single(messages, stop)

    class Http(OpenAICompatibleLanguageModel):
        """Its own client, which adds the mark of an ended answer: the server leaves the end token out of the text."""

        async def _agenerate(self, *args, **settings):
            replies = await super()._agenerate(*args, **settings)
            for reply in replies:
                if reply["_raw_choice"].get("stop_reason") is None:
                    reply["content"] += "<end>"
            return replies

    class Outcomes(AbstractOutcomeRewardModel):
        def score(self, messages, **settings):
            return [derive(str(m)) % 1000 / 1000 for m in messages]

        async def ascore(self, messages, orchestrator=None, **settings):
            return self.score(messages)

    class Steps(AbstractProcessRewardModel):
        def score(self, prompt, steps):
            return [derive(text) % 1000 / 1000 for text in steps]

        async def ascore(self, prompt, steps):
            return self.score(prompt, steps)

    texts = [tokenizer.decode(prompt[1:]) for prompt in prompts]
    http = Http(url, "none", str(folder), temperature=1.0, max_tokens=256, include_raw_choices=True)

    def in_process(make):
        async def run(turn: int) -> tuple[int, dict]:
            Served.generated = 0
            method, served = make(), Served()
            await asyncio.gather(*(method.ainfer(served, text, budget=n) for text in texts))
            return Served.generated, {}

        return run

    def over_http(make):
        async def run(turn: int) -> tuple[int, dict]:
            before, method = _written(url), make()
            await asyncio.gather(*(method.ainfer(http, text, budget=n) for text in texts))
            return _written(url) - before, {}

        return run

    def steps():
        return StepGeneration(max_steps=40, step_token="\n", stop_token="<end>", temperature=1.0)

    makers = {
        "self-consistency": lambda: SelfConsistency(orchestrator=LMOrchestrator(-1)),
        "self-consistency, 32 at once": lambda: SelfConsistency(orchestrator=LMOrchestrator(32)),
        "best-of-n": lambda: BestOfN(Outcomes(), LMOrchestrator(-1)),
        "beam 4x4": lambda: BeamSearch(steps(), Steps(), beam_width=4),
    }
    in_here = {f"its_hub: {name}": in_process(make) for name, make in makers.items()}
    return in_here | {f"its_hub over HTTP: {name}": over_http(make) for name, make in makers.items()}


def _written(url: str) -> int:
    """Tokens that the server has generated so far."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total")))


@contextmanager
def _server(folder: Path):
    """vLLM's server with what the engine has: its URL. The template puts the messages one after the other."""
    (folder / "template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", port]
    command += ["--enforce-eager", "--max-model-len", 512, "--max-num-seqs", 256, "--block-size", 32]
    command += ["--max-num-batched-tokens", 8192, "--disable-uvicorn-access-log"]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", 2**29, "--generation-config", "vllm"]
    command += ["--chat-template", folder / "template.jinja"]
    env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([str(word) for word in command], env=env, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(url + "/health"):
                if server.poll() is not None:
                    raise RuntimeError("the server ended:\n" + (folder / "server.log").read_text()[-2000:])
                time.sleep(0.5)
            yield url + "/v1"
        finally:
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
