"""Judges: text in, verdict out. The public face of the room, and the registry of its judges by name.

A judge plugs in with three lines:

    @verifier("parity")
    def parity(task, response):
        return int(response) % 2 == task.reference

The function may also ask for `reference` in place of `task`; its keyword-only parameters are its policy. It returns
True or False, a score in [0, 1], a Verdict, or None to abstain. A class with the methods of `Verifier` registers in the
same way, its fields being the policy. Installed packages add judges through the entry-point group `reasoner.verifiers`.

Imports neither of the other rooms, nor torch, ray, vllm or trl; the judges themselves are imported when first asked
for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any

from verifiers.base import Task, Verdict, Verifier
from verifiers.combine import FirstOf, FunctionVerifier

__all__ = ["Pool", "Task", "Verdict", "Verifier", "get", "known", "verifier", "verify_many", "verify_many_async"]

_judges: dict[str, Any] = {  # name -> class, function, or "module:class", imported when first asked for
    "math": "verifiers.math:Math",
    "process_math": "verifiers.process:ProcessMath",
    "steps": "verifiers.process:Steps",
    "code": "verifiers.code:Code",
    "arc": "verifiers.arc:Arc",
    "reasoning_gym": "verifiers.reasoning_gym:ReasoningGym",
    "weighted": "verifiers.combine:Weighted",
}


def verifier(name: str) -> Callable[[Any], Any]:
    """Register the decorated function or class as the judge called `name`. A name is taken once only."""

    def register(judge: Any) -> Any:
        taken = _judges.get(name)
        again = getattr(taken, "__qualname__", None) == judge.__qualname__  # its file run anew, as __mp_main__
        if taken is not None and not again:
            raise ValueError(f'@verifier("{name}") on {judge.__qualname__}: the name belongs to {taken}, take another')
        if "|" in name:
            raise ValueError(f'@verifier("{name}"): "|" combines judges and cannot be part of a name')
        _judges[name] = judge
        return judge

    return register


def known() -> tuple[str, ...]:
    """Every name that `get` takes."""
    return tuple(sorted({*_judges, *(point.name for point in entry_points(group="reasoner.verifiers"))}))


def get(name: str, **policy: Any) -> Verifier:
    """The judge called `name`, with its policy. "first | second" asks the second where the first abstains.

    Raises ValueError for a name or a policy key that does not exist, naming the nearest one.
    """
    if "|" in name:
        if policy:
            raise ValueError(f'get("{name}", {", ".join(policy)}): a combination has no policy, its parts do')
        first, rest = name.split("|", 1)
        return FirstOf(get(first.strip()), get(rest.strip()))
    judge = _load(name)
    build = judge if inspect.isclass(judge) else _function(judge)
    _refuse_strangers("policy key", policy, inspect.signature(build).parameters, f'verifier "{name}"')
    return build(**policy)


def _load(name: str) -> Any:
    judge = _judges.get(name)
    if judge is None:
        found = [point for point in entry_points(group="reasoner.verifiers") if point.name == name]
        if not found:
            _refuse_strangers("verifier", [name], known(), "the registry")
        judge = found[0].load()
    elif isinstance(judge, str):
        module, _, attribute = judge.partition(":")
        judge = getattr(importlib.import_module(module), attribute)
    _judges[name] = judge
    if inspect.isclass(judge) and "__or__" not in vars(judge):
        judge.__or__ = lambda first, second: FirstOf(first, second)  # any two judges combine: get("a") | get("b")
    return judge


def _function(judge: Callable[..., Any]) -> Callable[..., FunctionVerifier]:
    """What builds the judge from its policy, with the signature of the policy."""

    def build(**policy: Any) -> FunctionVerifier:
        return FunctionVerifier(judge, policy)

    keywords = [p for p in inspect.signature(judge).parameters.values() if p.kind is p.KEYWORD_ONLY]
    build.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return build


def _refuse_strangers(what: str, given: Iterable[str], allowed: Iterable[str], owner: str) -> None:
    allowed = sorted(allowed)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            raise ValueError(f'{what} "{key}" is unknown to {owner}: {hint}known: {", ".join(allowed) or "none"}')


from verifiers.pool import Pool, verify_many, verify_many_async  # noqa: E402 (the pool asks the registry)
