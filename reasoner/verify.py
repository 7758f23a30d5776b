"""`reasoner verify`: one answer, a file of cases, or a judge's self-test, from the command line.

    reasoner verify --verifier math --gold '\\frac{1}{2}' --answer 'so \\boxed{0.5}'
    reasoner verify --verifier math --file cases.jsonl          # rows of gold, answer, expected
    reasoner verify --selftest math

Exit status: 0 accepted, all as expected, or passed; 1 not; 2 when what was asked for cannot be done.
Knows no particular judge and no model. Neighbours: the registry and the pool of `verifiers` do the work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verifiers import Task, Verdict, get, known, verify_many
from verifiers.selftest import Case, Check, selftest

OUTCOMES = ("accepted", "refused", "abstained", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verifier", default="math", metavar="NAME", help=f"one of {', '.join(known())}")
    parser.add_argument("--gold", help="the reference: text, or a JSON object for judges that take one")
    parser.add_argument("--answer", help='the response to judge; "-" reads standard input')
    parser.add_argument("--file", type=Path, help="JSONL rows of gold, answer and expected (true or false)")
    parser.add_argument(
        "--selftest", metavar="NAME", help="try this judge on good, corrupted, hanging and hungry answers"
    )
    parser.add_argument(
        "--policy", action="append", default=[], metavar="KEY=VALUE", help="of the judge; may be repeated"
    )
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds per verdict (default: 10)")
    parser.add_argument(
        "--load", action="append", default=[], metavar="MODULE", help="import a module that registers judges"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except (ValueError, ImportError, OSError) as error:
        print(f"reasoner verify: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    sys.path[:0] = [] if "" in sys.path or str(Path.cwd()) in sys.path else [str(Path.cwd())]  # for --load
    for module in args.load:
        importlib.import_module(module.removesuffix(".py"))
    policy = dict(_setting(text) for text in args.policy)
    if args.selftest:
        rows = _read(args.file) if args.file else []
        return _print_checks(args.selftest, selftest(args.selftest, _cases(rows), **policy), args.json)
    if args.file:
        rows = _read(args.file)
        pairs = [(row["gold"], row["answer"]) for row in rows]
        return _print_table(rows, verify_many(args.verifier, pairs, timeout=args.timeout, **policy), args.json)
    if args.gold is None or args.answer is None:
        raise ValueError("give --gold and --answer, or --file CASES, or --selftest NAME")
    answer = sys.stdin.read() if args.answer == "-" else args.answer
    gold = _gold(args.gold)
    get(args.verifier, **policy).check(Task("gold", (), gold, args.verifier))
    (verdict,) = verify_many(args.verifier, [(gold, answer)], timeout=args.timeout, **policy)
    return _print_verdict(verdict, args.json)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f'--policy "{text}": write it as KEY=VALUE')
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _gold(text: str) -> Any:
    """A JSON object as such, all else as text: the set {1, 2} and the number 7 are math."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _read(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fits = isinstance(row["answer"], str) and isinstance(row["expected"], bool) and "gold" in row
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise ValueError(
                f'{file}:{number}: give {{"gold": ..., "answer": "...", "expected": true or false}}, not {line:.80}'
            )
        rows.append({**row, "line": number})
    if not rows:
        raise ValueError(f"{file}: holds no rows")
    return rows


def _cases(rows: Sequence[Mapping[str, Any]]) -> list[Case]:
    return [
        Case(row["gold"], (row["answer"],) if row["expected"] else (), () if row["expected"] else (row["answer"],))
        for row in rows
    ]


def _outcome(verdict: Verdict) -> str:
    return verdict.status if verdict.status != "scored" else "accepted" if verdict.correct else "refused"


def _print_verdict(verdict: Verdict, as_json: bool) -> int:
    if as_json:
        print(json.dumps(asdict(verdict), default=str))
    else:
        score = "" if verdict.score is None else f"  score {verdict.score:g}"
        print(f"{_outcome(verdict)}{score}  ({verdict.seconds * 1000:.1f} ms)")
        print(f"why       {verdict.why}")
        print(f"answer    {verdict.answer}")
        for key, value in verdict.evidence.items():
            print(f"{key:9} {value}")
    return 0 if verdict.correct else 1


def _print_table(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict], as_json: bool) -> int:
    """The confusion table and every disagreement. Refused, abstained and failed agree with expected = false."""
    counts = Counter((row["expected"], _outcome(verdict)) for row, verdict in zip(rows, verdicts, strict=True))
    disagree = [(row, v) for row, v in zip(rows, verdicts, strict=True) if row["expected"] != (v.correct is True)]
    if as_json:
        table = {str(want).lower(): {kind: counts[want, kind] for kind in OUTCOMES} for want in (True, False)}
        wrong = [{**row, "outcome": _outcome(v), "found": v.answer, "why": v.why} for row, v in disagree]
        print(
            json.dumps(
                {"rows": len(rows), "right": len(rows) - len(wrong), "table": table, "disagreements": wrong},
                default=str,
            )
        )
        return 1 if wrong else 0
    print(f"{'expected':10}" + "".join(f"{kind:>11}" for kind in OUTCOMES))
    for want in (True, False):
        print(f"{str(want).lower():10}" + "".join(f"{counts[want, kind]:>11}" for kind in OUTCOMES))
    print(f"{len(rows) - len(disagree)} of {len(rows)} as expected")
    for row, verdict in disagree:
        print(f"line {row['line']}: gold {row['gold']!r:.60}  answer {row['answer']!r:.60}")
        print(f"    expected {str(row['expected']).lower()}, {_outcome(verdict)}: {verdict.why}")
    return 1 if disagree else 0


def _print_checks(name: str, checks: Sequence[Check], as_json: bool) -> int:
    passed = all(not check.against for check in checks)
    if as_json:
        print(json.dumps({"verifier": name, "passed": passed, "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(
                f"{'FAILED' if check.against else 'ok':7} {check.name}"
                + (f"\n        {check.against}" if check.against else "")
            )
        print(f'verifier "{name}": {"passed" if passed else "failed"}')
    return 0 if passed else 1
