"""Task sources: what they refuse, what they never let leak, and that they give the same tasks every time."""

import json
import re

import pytest

from rollouts.tasks import SOURCES, Addition, Datasets, Jsonl, ReasoningGym

SUMS = {"min_terms": 3, "max_terms": 4, "max_digits": 1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count, start=0):
    return [{"question": f"{i} + 1 =", "answer": str(i + 1), "name": f"n{i}"} for i in range(start, start + count)]


def questions(tasks):
    return [task.question for task in tasks]


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "chain_sun"}, "Did you mean chain_sum"),
        ({"params": {"max_term": 3}}, "Did you mean max_terms"),
        ({"params": {"seed": 3}}, "params.seed = 3 would be overwritten"),
        ({"params": {"size": 9}}, "params.size = 9 would be overwritten"),
        ({"params": {"min_terms": 5, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"prompt": "{answer}"}, "would show the reference"),
        ({"prompt": "{expresion} ="}, "Did you mean expression"),
        ({"prompt": "{question} \\boxed{}"}, re.escape("write {{ and }}")),
        ({"prompt": "{question"}, re.escape("write {{ and }}")),
        ({"heldout": 0}, "heldout=0"),
        ({"train": 0}, "train=0"),
    ],
)
def test_reasoning_gym_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(**{"train": 5, "heldout": 5, **change}).load()


def test_prompt_cannot_show_an_answer_kept_in_the_metadata():
    with pytest.raises(ValueError, match="would show the reference"):
        ReasoningGym("gsm_symbolic", train=2, heldout=2, prompt="{question} {answer_value}").load()


def test_exhausted_generator_says_how_many_it_gave_and_what_to_widen():
    narrow = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # a + b or a - b of one digit: 200 questions
    with pytest.raises(ValueError, match=r"gave 200 distinct questions of the 260 .*max_terms=2, max_digits=1"):
        ReasoningGym("chain_sum", narrow, train=200, heldout=60).load()


def test_generator_can_be_used_up_to_its_last_question():
    narrow = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    train, heldout = ReasoningGym("chain_sum", narrow, train=140, heldout=60).load()
    assert len(set(questions(train + heldout))) == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "1", "answer": "1"}\n{"question": \n', "train.jsonl, line 2"),
        ("\n\n[1]\n", "line 3: list instead of an object"),
        ('{"question": "1", "anwser": "1"}\n', "row 1: no field 'answer'. Did you mean anwser"),
        ('{"questions": "1", "answer": "1"}\n', "Did you mean questions"),
        ("", "no training tasks"),
    ],
)
def test_jsonl_refuses(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    heldout = write(tmp_path / "test.jsonl", sums(3))
    with pytest.raises(ValueError, match=message):
        Jsonl(str(tmp_path / "train.jsonl"), heldout_path=heldout).load()


def test_jsonl_refuses_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match="line 1: .*UTF-8"):
        Jsonl(str(tmp_path / "train.jsonl"), heldout=0.5).load()


def test_jsonl_names_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no file .*nowhere.jsonl"):
        Jsonl(str(tmp_path / "nowhere.jsonl"), heldout=0.5).load()


@pytest.mark.parametrize("change", [{}, {"heldout": 1.0}, {"heldout_path": "test.jsonl", "heldout": 0.5}])
def test_jsonl_wants_a_heldout_file_or_a_fraction(change):
    with pytest.raises(ValueError, match="give one of them"):
        Jsonl("train.jsonl", **change).load()


def test_heldout_question_in_training_is_refused(tmp_path):
    train, heldout = write(tmp_path / "a.jsonl", sums(5)), write(tmp_path / "b.jsonl", sums(5, start=3))
    with pytest.raises(ValueError, match="2 of 5 held-out questions occur in training, the first is b/1 = a/4"):
        Jsonl(train, heldout_path=heldout).load()


def test_ids_that_are_not_unique_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "name": "same"} for row in sums(9)])
    with pytest.raises(ValueError, match="9 tasks have the id 'a/same'"):
        Jsonl(path, heldout=0.5, id="name").load()


def test_message_without_content_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user"}], "answer": "1"}])
    with pytest.raises(ValueError, match="is not a message"):
        Jsonl(path, heldout=0.5, prompt="{messages}").load()


def test_reference_field_cannot_be_shown(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(9))
    with pytest.raises(ValueError, match="would show the reference"):
        Jsonl(path, heldout=0.5, prompt="{question} {answer}").load()


def test_datasets_names_a_split_that_is_not_there(tmp_path):
    write(tmp_path / "train.jsonl", sums(4))
    with pytest.raises(ValueError, match="cannot load split 'test'"):
        Datasets(str(tmp_path)).load()


# --- what they give


def test_no_question_occurs_twice_or_on_both_sides():
    train, heldout = ReasoningGym("chain_sum", SUMS, train=2000, heldout=300).load()
    assert (len(train), len(heldout)) == (2000, 300)
    assert len(set(questions(train + heldout))) == 2300


def test_same_seed_gives_the_same_tasks_and_another_seed_does_not():
    first, again, other = (ReasoningGym("chain_sum", SUMS, 50, 20, seed).load() for seed in (1, 1, 2))
    assert first == again
    assert questions(first[0]) != questions(other[0])


def test_heldout_tasks_do_not_depend_on_the_size_of_the_training_set():
    assert ReasoningGym("chain_sum", SUMS, 50, 20).load()[1] == ReasoningGym("chain_sum", SUMS, 500, 20).load()[1]


def test_prompt_reshapes_the_question_and_the_reference_still_fits():
    train, _ = ReasoningGym("chain_sum", SUMS, 30, 5, prompt="{expression} =").load()
    assert train[17].id == "chain_sum/train/17"
    for task in train:
        assert re.fullmatch(r"\d( [+-] \d){2,3} =", task.question)
        assert eval(task.question.removesuffix("=")) == int(task.reference)
        assert task.meta["num_terms"] in (3, 4)


def test_reasoning_gym_verifier_gets_the_whole_entry():
    import reasoning_gym

    train, _ = ReasoningGym("chain_sum", SUMS, 5, 5, verifier="reasoning_gym").load()
    reference = train[0].reference
    assert reference["dataset"] == "chain_sum"
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    assert score(reference["entry"]["answer"], json.loads(json.dumps(reference["entry"]))) == 1.0
    assert score("no", reference["entry"]) == 0.0


def test_jsonl_fraction_splits_all_lines_by_question(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(400))
    train, heldout = Jsonl(path, heldout=0.25, id="name").load()
    assert len(train) + len(heldout) == 400 and 70 <= len(heldout) <= 130  # 100 expected, deviation 8.7
    assert {t.id for t in train + heldout} == {f"a/n{i}" for i in range(400)}
    assert all(t.meta == {"question": t.question, "name": t.id[2:]} for t in train)


def test_added_lines_move_no_question_to_the_other_side(tmp_path):
    few, many = write(tmp_path / "a.jsonl", sums(100)), write(tmp_path / "b.jsonl", sums(200))
    held_few, held_many = (set(questions(Jsonl(path, heldout=0.3).load()[1])) for path in (few, many))
    assert held_few < held_many


def test_messages_field_is_used_as_it_is(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"messages": messages, "answer": "2"}]
    heldout = write(tmp_path / "b.jsonl", [{"messages": messages[1:], "answer": "2"}])
    train, _ = Jsonl(write(tmp_path / "a.jsonl", rows), heldout_path=heldout, prompt="{messages}").load()
    assert list(train[0].prompt) == messages


@pytest.mark.parametrize("saved", [False, True])
def test_datasets_loads_local_files_and_saved_sets(tmp_path, saved):
    write(tmp_path / "train.jsonl", sums(6))
    write(tmp_path / "test.jsonl", sums(3, start=50))
    name = str(tmp_path)
    if saved:
        import datasets

        files = {split: f"{tmp_path}/{split}.jsonl" for split in ("train", "test")}
        name = str(tmp_path / "saved")
        datasets.load_dataset("json", data_files=files).save_to_disk(name)
    train, heldout = Datasets(name, prompt="{question} ?").load()
    assert questions(train) == [f"{i} + 1 = ?" for i in range(6)]
    assert [t.reference for t in heldout] == ["51", "52", "53"]
    assert heldout[2].id.endswith("/test/2")


def test_every_source_is_registered_under_its_toml_name():
    assert SOURCES == {
        "reasoning_gym": ReasoningGym,
        "jsonl": Jsonl,
        "datasets": Datasets,
        "addition": Addition,
    }


# --- sums of two numbers


def test_sums_have_every_length_and_no_question_is_on_both_sides():
    train, heldout = Addition(digits=3, train=900, heldout=200, seed=1).load()
    assert len(train) == 900 and len(heldout) == 200
    assert [sum(t.meta["level"] == d for t in train) for d in (1, 2, 3)] == [80, 410, 410]
    assert not set(questions(train)) & set(questions(heldout))
    for task in train + heldout:
        a, b = task.meta["terms"]
        assert task.question == f"{a} + {b} =" and task.reference == str(a + b)
        assert len(str(a)) == len(str(b)) == task.meta["level"]


def test_the_held_out_sums_do_not_change_with_the_number_of_training_ones():
    few, many = Addition(train=30).load()[1], Addition(train=3000).load()[1]
    assert questions(few) == questions(many)


@pytest.mark.parametrize("wrong", [{"digits": 0}, {"digits": 3, "train": 2}, {"digits": 3, "heldout": 2}])
def test_sums_without_a_length_or_a_task_for_each_are_refused(wrong):
    with pytest.raises(ValueError, match="give at least 1 digit"):
        Addition(**wrong)
