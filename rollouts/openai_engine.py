"""Any server of the OpenAI completions API as an Engine, where it tells log-probabilities and token ids.

For searches and evaluations on a model that is served elsewhere; no weights can be pushed. vLLM's own server tells
everything that is asked for here (`vllm serve MODEL`). Knows no Ray and no vLLM. Neighbour: `cluster.Engines`.

What to know of a server: its log-probabilities are those of the model at temperature 1, whatever the temperature,
unless it says otherwise (vLLM: `--logprobs-mode processed_logprobs`); one that leaves out the token which ended an
answer gets that token back here with the log-probability NaN (unknown), so that no estimator can take it for certain.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx

from rollouts.request import Request
from rollouts.writing import write
from search.base import END, Alternative, Offer, Sampling, Step, Trajectory, Until

TRIES = 4  # of one request, when the server cannot be reached or is busy
NEVER = -9999.0  # how the API writes minus infinity
BUSY = (429, 500, 502, 503, 504)


class ServerError(RuntimeError):
    """What a person can mend: a server that does not answer, refuses, or leaves out what a search needs."""


class OpenAIEngine:
    """Extends paths on a server. Children of one call are requests of their own, each with its hashed seed.

    Args:
        url: of the API, up to and with its version: "http://localhost:8000/v1".
        model: its name on the server.
        tokenizer: the model's; prompts go out as ids.
        context: tokens of prompt and response that the server takes together.
        key: sent as a bearer token.
        timeout: seconds for one request.
        at_once: requests in flight; others wait here.

    Example:
        engine = OpenAIEngine("http://localhost:8000/v1", "my-model", tokenizer, Sampling(max_tokens=256))
        paths = await engine.extend(Trajectory(prompt=(5, 3, 9), seed=1), n=8)
    """

    offers: frozenset[Offer] = frozenset({"logprobs", "top", "write"})

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        sampling: Sampling | None = None,
        *,
        context: int = 2**31,
        key: str = "",
        timeout: float = 600.0,
        at_once: int = 256,
    ) -> None:
        self.sampling = sampling or Sampling()
        self._server = _Server(url.rstrip("/") + "/completions", key, timeout, at_once)  # shared by all views
        self._model, self._tokenizer, self._context = model, tokenizer, context

    def at(self, **changes: float | int | str) -> OpenAIEngine:
        other = copy.copy(self)
        other.sampling = replace(self.sampling, **changes)
        return other

    def write(self, path: Trajectory, text: str, *, turn: bool = False) -> Trajectory:
        """See `search.base.Engine`. Raises ValueError for text that the vocabulary cannot spell."""
        return write(self._tokenizer, path, text, turn=turn)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    async def extend(self, path: Trajectory, *, n: int = 1, until: Until = END) -> list[Trajectory]:
        """See `search.base.Engine`. Raises ServerError with what the server lacks or said."""
        if path.end is not None:
            raise ValueError(f"a path that ended ({path.end}) cannot be extended")
        room = min(self.sampling.max_tokens - path.length, self._context - len(path.ids))
        request = Request.children(path, n, until, self.sampling, room)
        if room <= 0:
            return [replace(path, end="length", seed=seed) for seed in request.seeds]
        answers = await asyncio.gather(*(self._server.post(self._body(request, seed)) for seed in request.seeds))
        return [self._grown(path, request, *pair) for pair in zip(request.seeds, answers, strict=True)]

    def _body(self, request: Request, seed: int) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "model": self._model,
            "prompt": list(request.ids),
            "max_tokens": request.most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "logprobs": sampling.top,  # 0: of the sampled token alone
            # What vLLM's server adds to the API; others leave it aside.
            "return_tokens_as_token_ids": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }
        return body | ({"stop": [sampling.step]} if request.until.kind == "step" else {})

    def _grown(self, path: Trajectory, request: Request, seed: int, answer: dict[str, Any]) -> Trajectory:
        choice, details = answer["choices"][0], (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        told = choice.get("logprobs")
        if not told or told.get("token_logprobs") is None or None in told["token_logprobs"]:
            raise ServerError(
                f"{self._server.url} tells no log-probabilities of {self._model}, and no estimator or search works "
                "without them: use a server that answers `logprobs`, e.g. `vllm serve`"
            )
        ids, logprobs = [self._id(token) for token in told["tokens"]], list(told["token_logprobs"])
        top = [self._alternatives(row) for row in told.get("top_logprobs") or ()] if request.sampling.top else []
        eos = self._tokenizer.eos_token_id
        end = self._end(request, choice, ids)
        if end == "stop" and ids[-1:] != [eos] and "stop_reason" not in choice:  # no token of the answer ended it
            ids, logprobs = [*ids, eos], [*logprobs, math.nan]
            top = [*top, ()] if top else []
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        known = details.get("cached_tokens") or 0
        step = Step(tuple(ids), tuple(logprobs), text, versions=((0, 0, len(ids)),), top=tuple(top), cached=known)
        return path.grow(step, end=end, seed=seed)

    def _end(self, request: Request, choice: dict[str, Any], ids: list[int]) -> str | None:
        if choice["finish_reason"] == "length":
            return None if request.until.kind == "tokens" and len(ids) < request.room else "length"
        delimiter = request.sampling.step
        if request.until.kind != "step" or ids[-1:] == [self._tokenizer.eos_token_id]:
            return "stop"
        if choice.get("stop_reason") == delimiter or delimiter in self._tokenizer.decode(ids):
            return None
        if "stop_reason" in choice:
            return "stop"  # by a token of its own choice
        raise ServerError(
            f"{self._server.url} does not say whether the delimiter {delimiter!r} or the end of the answer stopped it: "
            "search by until = 'end' or a number of tokens, or use a server that knows `include_stop_str_in_output`"
        )

    def _id(self, token: str) -> int:
        """Of a token as the server writes it: "token_id:17", or its text."""
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        ids = self._tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1 or self._tokenizer.decode(ids) != token:
            raise ServerError(
                f"{self._server.url} tells tokens by their text, and {token!r} is not one token of this tokenizer: use "
                "the served model's own tokenizer, or a server that knows `return_tokens_as_token_ids`"
            )
        return ids[0]

    def _alternatives(self, row: dict[str, float]) -> tuple[Alternative, ...]:
        """The likeliest first, as the server may not say it."""
        possible = {token: logprob for token, logprob in row.items() if logprob > NEVER}
        pairs = sorted(((self._id(token), logprob) for token, logprob in possible.items()), key=lambda pair: -pair[1])
        eos = self._tokenizer.eos_token_id
        words = [self._tokenizer.decode([i], skip_special_tokens=True) for i, _ in pairs]
        return tuple(Alternative(i, lp, word, i == eos) for (i, lp), word in zip(pairs, words, strict=True))


class _Server:
    """One address: requests that wait their turn, tries again, and errors that say what to do."""

    def __init__(self, url: str, key: str, timeout: float, at_once: int) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout, self._at_once = timeout, at_once
        self._loop: asyncio.AbstractEventLoop | None = None

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        client, turn = self._open()
        why = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(2.0 ** (attempt - 2))
            try:
                async with turn:
                    answer = await client.post(self.url, json=body)
            except httpx.HTTPError as error:
                why = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == 200:
                return answer.json()
            why = f"{answer.status_code} {answer.text[:300]}"
            if answer.status_code not in BUSY:
                raise ServerError(f"{self.url} refuses the request: {why}")
        raise ServerError(f"{self.url} did not answer in {TRIES} tries: {why}: start the server or correct engine.url")

    def _open(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The connections of the running event loop: they cannot be used from another."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            limits = httpx.Limits(max_connections=self._at_once, max_keepalive_connections=self._at_once)
            self._client = httpx.AsyncClient(timeout=self._timeout, limits=limits, headers=self._headers)
            self._turn, self._loop = asyncio.Semaphore(self._at_once), loop
        return self._client, self._turn
