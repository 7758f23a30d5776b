"""What a search may know: the key never reaches an evaluation, and each score says what it should of a path."""

import asyncio
import gc
import math
import types
from dataclasses import replace

import pytest

from rollouts.roll_out import roll_out
from rollouts.score import (
    Confidence,
    Open,
    Process,
    Question,
    SelfJudgement,
    VerifierScore,
    WithKey,
    question_of,
    whole_steps,
)
from search import Adaptive, Beam, BestOf, Mcts
from search.base import END, Sampling, Step, Trajectory
from search.sample import Sample
from search.scripted import Scripted
from verifiers import Pool
from verifiers.base import Task

SECRET = "918273645546372819"  # the reference: nothing that is given to a search may lead to it
WORKED, BLURTED = "3+4=7\n7-2=5\nAnswer: 5", "Answer: 7"


class Letters:
    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        return [ord(c) for message in messages for c in message["content"]]


def task(reference: str = "5") -> Task:
    meta = {"solution": reference, "difficulty": 1}
    return Task("t/1", ({"role": "user", "content": "3 + 4 - 2 ="},), reference, "math", meta)


def engine(*replies: str) -> Scripted:
    def reply(text: str, child: int) -> str:
        fits = [r for r in replies if r.startswith(text)]
        return fits[child % len(fits)][len(text) :]

    return Scripted(reply, Sampling(max_tokens=60))


@pytest.fixture(scope="module")
def pools():
    with Pool(1) as judging, Pool(1) as open_:
        yield judging, open_


def run(search, pools, guide, said=(WORKED, BLURTED), reference="5"):
    made = engine(*said)
    return asyncio.run(roll_out([task(reference)], search, made, pools[0], Letters(), seed=0, guide=guide(made)))[0]


# -- the key --------------------------------------------------------------------------------------------------------


def test_a_score_with_the_key_is_refused_where_it_would_be_bound_for_evaluation(pools):
    with pytest.raises(ValueError, match="answer key.*score.kind = 'process'"):
        Open(pools[1], engine(WORKED), VerifierScore())


def test_a_question_has_no_reference_and_no_meta():
    assert set(Question.__slots__) == {"id", "prompt", "verifier"}
    assert SECRET not in repr(question_of(task(SECRET)))


def reachable(roots) -> str:
    """All text that code can reach from these objects by attributes, closures, cells, containers and bound methods.

    Not followed: modules, classes, and the interpreter's own running state (frames, tasks, event loops), from where
    any code in a process reaches everything.
    """
    running = (types.ModuleType, type, types.FrameType, asyncio.AbstractEventLoop, asyncio.Future, types.CoroutineType)
    seen, texts, stack = set(), [], list(roots)
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, running):
            continue
        seen.add(id(thing))
        if isinstance(thing, str | bytes):
            texts.append(str(thing))
        if isinstance(thing, types.FunctionType):  # its globals are a module
            stack += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
            continue
        stack += gc.get_referents(thing)
    return "\n".join(texts)


class Thief(Mcts):
    """Looks for the key in all that it is given, before, between and after its calls."""

    def __init__(self):
        super().__init__(simulations=2, branch=2)
        object.__setattr__(self, "loot", [])

    async def run(self, root, engine, score):
        async def peeking(path):
            value = await score(path)
            self.loot.append(reachable([root, engine, score, path]))
            return value

        self.loot.append(reachable([root, engine, score]))
        return await super().run(root, engine, peeking)


def test_a_thief_finds_no_key_in_what_an_evaluation_gives_it(pools):
    thief = Thief()
    group = run(thief, pools, lambda e: Open(pools[1], e, Process()), reference=SECRET)
    assert len(thief.loot) > 2 and "3 + 4 - 2 =" in thief.loot[0]  # it sees the question
    assert not any(SECRET in text for text in thief.loot)
    assert SECRET in repr(group)  # it was there to be stolen


def test_the_same_thief_finds_the_key_where_training_binds_it(pools):
    thief = Thief()
    run(thief, pools, lambda e: WithKey(pools[0], e, VerifierScore()), reference=SECRET)
    assert any(SECRET in text for text in thief.loot)


def test_what_reads_answers_for_a_search_has_no_key_either(pools):
    found = []

    class Reader(Adaptive):
        async def run(self, root, engine, score):
            found.append(reachable([self.answer, self.equal]))
            assert self.answer("so \\boxed{5}") == "5" and self.equal("5", "5.0") and not self.equal("5", "6")
            return await super().run(root, engine, score)

    run(Reader(n=2, least=1, lanes=1), pools, lambda e: Open(pools[1], e), reference=SECRET)
    assert found and SECRET not in found[0]


# -- scores ---------------------------------------------------------------------------------------------------------


def test_each_task_is_scored_by_its_own_key(pools):
    tasks = [Task(f"t/{n}", ({"role": "user", "content": "?"},), str(n), "math") for n in (5, 7)]
    made = engine("Answer: 5", "Answer: 7")
    guide = WithKey(pools[0], made, VerifierScore())
    groups = asyncio.run(roll_out(tasks, BestOf(n=2), made, pools[0], Letters(), seed=0, guide=guide))
    assert [[r.verdict.answer for r in g.rollouts] for g in groups] == [["5", "7"], ["7", "5"]]


def test_process_scores_guide_a_beam_to_the_work_that_holds(pools):
    wrong = "3+4=9\n9-2=7\nAnswer: 7"
    group = run(Beam(width=1, branch=3), pools, lambda e: Open(pools[1], e, Process()), (wrong, BLURTED, WORKED))
    assert [r.trajectory.text for r in group.rollouts] == [WORKED] and group.rollouts[0].verdict.correct


def path(*steps: tuple[str, bool], end=None) -> Trajectory:
    made = tuple(Step(tuple(map(ord, text)), (0.0,) * len(text), text, sampled=own) for text, own in steps)
    return Trajectory((1,), made, end=end)


def test_a_step_that_may_go_on_is_not_judged_and_a_written_part_begins_anew():
    assert whole_steps(path(("3+4=7\n7-2=", True)), "\n") == "3+4=7\n"
    assert whole_steps(path(("3+4=7", True), end="stop"), "\n") == "3+4=7"
    assert whole_steps(path(("3+4=7", True), end="length"), "\n") == ""
    assert whole_steps(path(("3+4=8\n", True), ("\ncheck\n", False), ("3+4=7\n", True)), "\n") == "3+4=7\n"


def test_a_path_that_ran_into_the_limit_is_worth_nothing_and_one_that_goes_on_its_steps(pools):
    made = engine(WORKED)
    score = WithKey(pools[0], made, VerifierScore()).score_of(task())
    values = [("Answer: 5", "stop"), ("Answer: 6", "stop"), ("Answer: 5", "length"), ("3+4=7\n", None)]
    found = [asyncio.run(score(path((text, True), end=end))) for text, end in values]
    assert found == [1.0, 0.0, 0.0, 1.0]


def sure(*steps: str, end: str | None = None, doubts: dict[int, float] = {}, whole: bool = False, written: str = ""):  # noqa: B006
    """A path whose tokens were certain but for `doubts`: probability by position in the text."""
    text = "".join(steps)
    logprobs = [math.log(doubts.get(i, 1.0)) for i in range(len(text))]
    cuts = [text] if whole else steps
    made, at = [Step(tuple(map(ord, written)), (0.0,) * len(written), written, sampled=False)] if written else [], 0
    for piece in cuts:
        ids = tuple(map(ord, piece))
        made.append(Step(ids, tuple(logprobs[at : at + len(piece)]), piece))
        at += len(piece)
    return Trajectory((1,), tuple(made), end=end)


def confident(path: Trajectory, join: str = "min") -> float:
    made = engine(WORKED)
    return asyncio.run(Confidence(join).open(question_of(task()), made, None)(path))


def test_a_slip_and_a_guess_are_worth_less_than_sure_work():
    slip = {3: 0.2}  # a digit that the model gave 20%
    assert confident(sure("3+9=1\n", "7\n", doubts=slip)) == pytest.approx(0.2)
    assert confident(sure("3+4=7\n", "5\n")) == 1.0
    assert confident(sure("Answer: 7", end="stop", doubts={8: 0.1})) == pytest.approx(0.1)


@pytest.mark.parametrize(("join", "value"), [("min", 0.2), ("mean", 1.7 / 3), ("product", 0.1), ("last", 0.5)])
@pytest.mark.parametrize("whole", [False, True])
def test_confidence_joins_the_least_sure_token_of_each_step_however_the_path_was_drawn(join, value, whole):
    drawn = sure("3+4=7\n", "7-2=5\n", "5", doubts={2: 0.2, 4: 0.9, 12: 0.5}, whole=whole)
    assert confident(drawn, join) == pytest.approx(value)


def test_what_a_search_wrote_is_no_confidence_of_the_model():
    assert confident(sure("7\n", doubts={0: 0.4}, written="check\n"), "mean") == pytest.approx(0.4)
    before = sure("3+4=8\n", doubts={4: 0.1})
    written = engine(WORKED).write(before, "check\n")
    assert confident(before) == pytest.approx(0.1) and confident(written) == 1.0


def test_confidence_guides_a_beam_to_what_the_model_is_sure_of(pools):
    class Doubtful(Scripted):
        """Gives what it blurts a probability of 10% a token."""

        async def extend(self, path, *, n=1, until=END):
            kids = await super().extend(path, n=n, until=until)
            return [unsure(kid) if kid.text.startswith("Answer") else kid for kid in kids]

    def unsure(kid):
        last = replace(kid.steps[-1], logprobs=(math.log(0.1),) * len(kid.steps[-1].ids))
        return replace(kid, steps=(*kid.steps[:-1], last))

    made = Doubtful(engine(WORKED, BLURTED).reply, Sampling(max_tokens=60))
    guide = Open(pools[1], made, Confidence())
    (group,) = asyncio.run(roll_out([task()], Beam(1, 4), made, pools[0], Letters(), seed=0, guide=guide))
    assert [r.trajectory.text for r in group.rollouts] == [WORKED]


def test_confidence_is_refused_without_log_probabilities():
    mute = replace(engine(WORKED), offers=frozenset({"write"}))
    with pytest.raises(ValueError, match="log-probabilities.*'logprobs'.*'process'"):
        Confidence().check(mute)
    with pytest.raises(ValueError, match="sampling.step is empty"):
        Confidence("mean").check(engine(WORKED).at(step=""))
    with pytest.raises(ValueError, match="join='sum' is none of last, min"):
        Confidence("sum")
    untold = sure("7", doubts={0: math.nan})
    with pytest.raises(ValueError, match="no log-probability of a token of '7'"):
        confident(untold)


def test_a_score_says_what_its_engine_lacks():
    with pytest.raises(ValueError, match="top"):
        SelfJudgement().check(engine(WORKED))
    for kind in (Process(), VerifierScore()):
        with pytest.raises(ValueError, match="sampling.step is empty"):
            kind.check(engine(WORKED).at(step=""))
    with pytest.raises(ValueError, match="join"):
        Process(join="sum")


def test_no_guide_binds_nothing(pools):
    seen = []

    class Peeking(Sample):
        async def run(self, root, engine, score):
            seen.append(score)
            return await super().run(root, engine, score)

    run(Peeking(n=1), pools, lambda e: None)
    assert seen == [None]
