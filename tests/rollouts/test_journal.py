import json

import pytest

from rollouts.base import Group, Rollout
from rollouts.journal import Journal, read
from search.base import Step, Trajectory
from verifiers.base import Task, Verdict

TASK = Task("t/1", ({"role": "user", "content": "3 + 4 ="},), "7", "math", {"source": "test"})


def group(text: str) -> Group:
    step = Step((5, 6), (-0.25, -1.5), text, versions=((3, 0, 2),))
    verdict = Verdict("scored", 1.0, True, answer=text, steps=(1.0, 0.5), why="equal", seconds=0.01)
    return Group(TASK, (Rollout(TASK, Trajectory((1, 2), (step,), "stop", seed=9), verdict),))


def test_what_is_written_is_read_back_as_the_same_values(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(group("7"), step=0, version=3)
        journal.append(group("8"), step=1, version=4)
    assert list(read(tmp_path / "j.jsonl")) == [(0, 3, group("7")), (1, 4, group("8"))]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_left_out_when_read_and_cut_when_opened(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(group("7"), step=0, version=0)
        journal.append(group("8"), step=1, version=0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [step for step, _, _ in read(path)] == [0]
    with Journal(path) as journal:
        journal.append(group("9"), step=2, version=0)
    assert [step for step, _, _ in read(path)] == [0, 2]


def test_each_line_is_json_a_person_can_grep(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append(group("7"), step=0, version=3)
    row = json.loads((tmp_path / "j.jsonl").read_text())
    assert row["task"]["id"] == "t/1" and row["rollouts"][0]["steps"][0]["versions"] == [[3, 0, 2]]
