import asyncio
import importlib.util
import time
from dataclasses import dataclass, replace

import pytest

from reasoner.credit import GRPO
from rollouts import environment
from rollouts.base import Group
from rollouts.environment import Observation, PuzzleTasks
from rollouts.episode import Episode
from rollouts.journal import Journal, read
from rollouts.roll_out import roll_out
from search.base import Sampling
from search.scripted import Scripted
from verifiers import Pool
from verifiers.base import Task


class Letters:
    """A tokenizer of the two methods that rolling out needs: every character is its code."""

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        return [ord(c) for message in messages for c in message["content"]]


@dataclass
class Guess:
    """Guess a number: the world says higher or lower. Breaks or hangs when the task says so."""

    number: int
    fault: str = ""

    def reset(self):
        return "Guess."

    def step(self, message):
        if self.fault == "raise":
            raise KeyError("no such room")
        if self.fault == "hang":
            time.sleep(30)
        guess = int(message.split()[-1])
        if guess == self.number:
            return Observation("", done=True, score=1.0)
        return Observation("higher" if guess < self.number else "lower", score=0.0)

    def close(self):
        pass


environment.WORLDS["guess"] = Guess


def world_task(number, **fields):
    reference = {"kind": "guess", "number": number, **fields}
    return Task(f"guess/{number}", ({"role": "user", "content": "Guess."},), reference, "environment")


@pytest.fixture(scope="module")
def pool():
    with Pool(1) as pool:
        yield pool


PLAIN = Episode(n=1, plan="", act="", reflect="")


def play(tasks, policy, reply, pool, max_tokens=40):
    engine = Scripted(reply, Sampling(max_tokens=max_tokens))
    return asyncio.run(roll_out(tasks, policy, engine, pool, Letters(), seed=1))


def bisect(text, child):
    """Says 4, then one more or less, as it is told."""
    told = [line for line in text.splitlines() if line.endswith(("higher", "lower"))]
    return str(4 + sum(1 if line.endswith("higher") else -1 for line in told))


def test_an_environment_that_raises_fails_its_episode_and_scores_nothing(pool):
    group = play([world_task(6, fault="raise")], PLAIN, bisect, pool)[0]
    verdict = group.rollouts[0].verdict
    assert (verdict.status, verdict.score) == ("failed", None)
    assert "guess raised KeyError" in verdict.why and group.scored == ()


def test_an_environment_that_hangs_is_given_up_at_the_deadline(pool):
    verdict = play([world_task(6, fault="hang")], replace(PLAIN, seconds=0.2), bisect, pool)[0].rollouts[0].verdict
    assert verdict.status == "failed" and "no reply within 0.2 s" in verdict.why


def test_an_environment_that_cannot_open_fails_its_episode(pool):
    verdict = play([world_task(6, colour="red")], PLAIN, bisect, pool)[0].rollouts[0].verdict
    assert verdict.status == "failed" and "TypeError" in verdict.why


def test_the_episode_ends_when_the_world_is_solved(pool):
    rollout = play([world_task(6)], PLAIN, bisect, pool)[0].rollouts[0]
    assert rollout.verdict.correct and rollout.verdict.evidence["turns"] == 3


def test_replies_of_the_world_are_never_trained_on(pool):
    group = play([world_task(6), world_task(3)], replace(PLAIN, n=2), bisect, pool)[0]
    path = group.rollouts[0].trajectory
    assert [s.text for s in path.steps if not s.sampled] == ["\n[user] higher\n", "\n[user] higher\n"]
    wrong = replace(group.rollouts[0], verdict=replace(group.rollouts[0].verdict, score=0.0, correct=False))
    sample = GRPO()(Group(group.task, (group.rollouts[0], wrong)))[0]
    learned = "".join(chr(i) for i, on in zip(sample.ids, sample.loss_mask, strict=True) if on)
    assert learned == "456\x00"


def test_an_unsolved_episode_ends_after_its_turns_with_the_score_so_far(pool):
    verdict = play([world_task(6)], replace(PLAIN, turns=2), bisect, pool)[0].rollouts[0].verdict
    assert (verdict.status, verdict.score, verdict.correct) == ("scored", 0.0, False)


def thinker(text, child):
    """Plans one line, acts, and after each reply states what it found; the first finding is wrong."""
    last = text.rsplit("\n", 1)[-1]
    if last.endswith("Plan:"):
        return " ask\n"
    if last.endswith("Finding:"):
        return " 4 + 1 = 6\n" if text.count("Finding:") == 1 and "Found" not in text else " 4 + 1 = 5\n"
    return bisect(text, child)


def test_only_findings_that_a_verifier_confirms_are_kept(pool):
    rollout = play([world_task(6)], Episode(n=1), thinker, pool)[0].rollouts[0]
    assert rollout.verdict.correct
    assert rollout.verdict.evidence["findings"] == ("4 + 1 = 5",)
    assert rollout.verdict.evidence["findings_rejected"] == 1


def test_a_named_verifier_of_findings_never_sees_the_reference(pool):
    seen = []

    class Spy:
        async def verify(self, task, responses):
            seen.append(task.reference)
            return await pool.verify(task, responses)

    policy = Episode(n=1, verifier="math")
    play([world_task(6)], policy, thinker, Spy())
    assert seen and set(seen) == {None}


def test_a_context_that_grows_too_long_is_left_for_a_fresh_one_with_the_findings(pool):
    def steady(text, child):
        return " 2 + 2 = 4\n" if text.endswith("Finding:") else str(len(text) % 7)

    policy = Episode(n=1, turns=6, context=110, plan="", act="")
    rollout = play([world_task(99)], policy, steady, pool)[0].rollouts[0]
    assert len(rollout.earlier) >= 1
    prompts = ["".join(map(chr, path.prompt)) for path in rollout.contexts]
    assert prompts[0] == "Guess." and "Found so far:\n2 + 2 = 4\nhigher" in prompts[1]
    assert all(len(path.ids) <= 110 for path in rollout.contexts)


def test_every_context_of_an_episode_is_learned_from_with_its_verdict(pool, tmp_path):
    def steady(text, child):
        return " 2 + 2 = 4\n" if text.endswith("Finding:") else str(len(text) % 7)

    policy = Episode(n=2, turns=6, context=110, plan="", act="")
    group = play([world_task(99)], policy, steady, pool)[0]
    better = replace(group.rollouts[0], verdict=replace(group.rollouts[0].verdict, score=1.0, correct=True))
    group = replace(group, rollouts=(better, group.rollouts[1]))
    samples = GRPO()(group)
    assert len(samples) == sum(len(r.contexts) for r in group.rollouts) > 2
    assert {max(s.advantages) for s in samples[: len(better.contexts)]} == {0.5}
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append(group, step=0, version=0)
    again = next(read(tmp_path / "journal.jsonl"))[2].rollouts[0]
    assert [path.ids for path in again.contexts] == [path.ids for path in better.contexts]


def test_same_seed_same_episodes(pool):
    def paths():
        return [r.trajectory for g in play([world_task(6)], Episode(n=3), thinker, pool) for r in g.rollouts]

    assert paths() == paths() and len({p.seed for p in paths()}) == 3


def test_a_program_is_run_in_the_sandbox_and_its_output_read(pool):
    def coder(text, child):
        return "```python\nprint(2**20 + 1)\n```" if "1048577" not in text else "Answer: 1048577"

    task = Task("big", ({"role": "user", "content": "2^20 + 1 ="},), "1048577", "math")
    rollout = play([task], replace(PLAIN, tool="python"), coder, pool, 80)[0].rollouts[0]
    assert rollout.verdict.correct and "1048577" in rollout.trajectory.steps[1].text
    assert not rollout.trajectory.steps[1].sampled


def test_a_program_that_fails_shows_its_error_and_ends_nothing(pool):
    def coder(text, child):
        return "```python\nprint(1/0)\n```" if "ZeroDivisionError" not in text else "Answer: 3"

    task = Task("three", ({"role": "user", "content": "1 + 2 ="},), "3", "math")
    assert play([task], replace(PLAIN, tool="python"), coder, pool, 80)[0].rollouts[0].verdict.correct


def test_a_task_without_a_world_names_the_remedy(pool):
    task = Task("three", ({"role": "user", "content": "1 + 2 ="},), "3", "math")
    with pytest.raises(ValueError, match="set search.tool"):
        play([task], PLAIN, bisect, pool)


def test_a_puzzle_tells_the_score_and_never_the_answer(pool):
    train, heldout = PuzzleTasks("chain_sum", {"max_terms": 2}, tries=2, train=4, heldout=2).load()
    key = train[0].reference["entry"]["answer"]
    group = play([train[0]], PLAIN, lambda text, child: key if "Tries left: 1" in text else "999999", pool)[0]
    rollout = group.rollouts[0]
    assert rollout.verdict.correct and key not in rollout.trajectory.steps[1].text
    assert not {t.question for t in train} & {t.question for t in heldout}


@pytest.mark.skipif(importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed")
def test_a_gymnasium_world_is_played_as_text(pool):
    source = environment.GymnasiumTasks("Blackjack-v1", ("stick", "hit"), low=-1.0, train=20, heldout=5)
    train, _ = source.load()
    group = play([train[0]], replace(PLAIN, n=2), lambda text, child: "hit" if "[user]" in text else "dance", pool)[0]
    assert {r.verdict.status for r in group.rollouts} == {"scored"}
    assert any("is no action: end with one of stick, hit" in s.text for s in group.rollouts[0].trajectory.steps)


@pytest.mark.skipif(importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed")
def test_wrong_action_names_and_unknown_worlds_are_named():
    with pytest.raises(ValueError, match="names 1"):
        environment.GymnasiumTasks("Blackjack-v1", ("stick",), train=2, heldout=2).load()
    with pytest.raises(ValueError, match="cannot open 'Nowhere-v0'"):
        environment.GymnasiumTasks("Nowhere-v0", ("a",), train=2, heldout=2).load()
