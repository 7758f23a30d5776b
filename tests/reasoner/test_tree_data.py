"""Trees as training data: only training tasks, every path that ended, and columns that trainers take as they are."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import reasoner.learner  # noqa: F401 (it keeps TRL from importing vllm)
from reasoner.compare import load_tasks
from reasoner.config import ConfigError, load_comparison
from reasoner.model import ReasonerConfig, ReasonerForCausalLM, char_tokenizer
from reasoner.step_labels import read
from reasoner.tree_data import Rows, rows_of
from rollouts.roll_out import encode, search_tasks
from rollouts.score import Open, Process
from search import Beam, Mcts, Revise, Sample
from search.base import END, Sampling
from search.scripted import Scripted
from verifiers import Pool
from verifiers.base import Task

CONFIG = Path(__file__).parents[2] / "configs" / "search.toml"
RIGHT, WRONG, BLURTED = "3+4=7\n7-2=5\nAnswer: 5", "3+4=7\n7-2=6\nAnswer: 6", "Answer: 7"
LETTERS = "0123456789+-=\nAnswer: ?abcdefghijklmopqtuvxyz"


class Spelling:
    """Text as the scripted engine has it: a token is a character, and id 0 ends a path."""

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        return [ord(c) for message in messages for c in message["content"]]

    def decode(self, ids, *, skip_special_tokens):
        return "".join(chr(i) if i else "" if skip_special_tokens else "<end>" for i in ids)


def task(number: int = 1) -> Task:
    return Task(f"t/{number}", ({"role": "user", "content": "3+4-2="},), "5", "math")


def grown(search, pools, replies=(RIGHT, WRONG, BLURTED), tasks=None):
    def reply(text: str, child: int) -> str:
        fits = [r for r in replies if r.startswith(text)] or [text + "\nAnswer: 5"]
        return fits[child % len(fits)][len(text) :]

    made = Scripted(reply, Sampling(max_tokens=60))
    guide = Open(pools[1], made, Process())
    return asyncio.run(search_tasks(tasks or [task()], search, made, pools[0], Spelling(), seed=0, guide=guide))


@pytest.fixture(scope="module")
def pools():
    with Pool(1) as judges, Pool(1) as open_:
        yield judges, open_


def rows(pools, *searches, **how) -> Rows:
    return asyncio.run(rows_of([grown(s, pools, **how) for s in searches], pools[0], Spelling(), "\n"))


def text(ids) -> str:
    return Spelling().decode([i for i in ids if i != -100], skip_special_tokens=True)


def test_wrong_paths_are_never_imitated_and_the_question_is_not_learnt(pools):
    made = rows(pools, Sample(n=3))
    (row,) = made.sft
    assert text(row["labels"]) == RIGHT and text(row["input_ids"]) == "3+4-2=" + RIGHT
    assert len(row["labels"]) == len(row["input_ids"]) and row["task"] == "t/1" and row["weight"] == 1


def test_paths_that_a_search_dropped_are_judged_too(pools):
    search = Beam(width=1, branch=3)
    (found,) = grown(search, pools)
    assert [r.trajectory.text for r in found.group.rollouts] == [RIGHT]
    made = rows(pools, search)
    assert {tuple(row["steps"]) for row in made.steps} == {tuple(RIGHT.split("\n")), (BLURTED,)}


def test_a_pair_shares_its_prefix_and_parts_at_once(pools):
    made = rows(pools, Sample(n=3))
    (row,) = made.dpo
    assert row["prompt"] == "3+4-2=3+4=7\n7-2=" and row["chosen"] == "5\nAnswer: 5<end>"
    assert row["rejected"] == "6\nAnswer: 6<end>"
    assert text(row["prompt_ids"] + row["chosen_ids"]) == "3+4-2=" + RIGHT


def test_a_path_that_several_methods_found_counts_once(pools):
    once, twice = rows(pools, Sample(n=3)), rows(pools, Sample(n=3), Mcts(simulations=4, branch=3))
    assert [row["input_ids"] for row in once.sft] == [row["input_ids"] for row in twice.sft]
    assert len(twice.steps) == len({tuple(row["ids"]) for row in twice.steps}) >= len(once.steps)


def test_a_step_is_worth_the_share_of_paths_through_it_that_were_right(pools):
    by_text = {tuple(row["steps"]): row["values"] for row in rows(pools, Sample(n=3)).steps}
    assert by_text[tuple(RIGHT.split("\n"))] == [0.5, 1.0, 1.0]
    assert by_text[tuple(WRONG.split("\n"))] == [0.5, 0.0, 0.0] and by_text[(BLURTED,)] == [0.0]


def test_nobody_learns_to_say_what_a_search_said(pools):
    found = rows(pools, Revise(rounds=1, critique="wrong?", request="again"), replies=(WRONG,))
    assert found.sft and all("again" not in text(row["labels"]) for row in found.sft)
    assert any("again" in text(row["input_ids"]) for row in found.sft)
    written = [row for row in found.dpo + found.steps if "again" in json.dumps(row)]
    assert not [row for row in written if "chosen" in row and "again" in row["chosen"] + row["rejected"]]
    assert not [row for row in written if "steps" in row]


def test_tasks_that_nothing_solved_give_labels_and_nothing_to_imitate(pools):
    made = rows(pools, Sample(n=2), replies=(WRONG,), tasks=[task(1), task(2)])
    assert not made.sft and not made.dpo and [row["values"][-1] for row in made.steps] == [0.0, 0.0]


def test_more_tasks_than_there_are_is_a_mistake_that_is_named():
    few = ["tasks.train=20", "tasks.heldout=200"]
    with pytest.raises(ConfigError, match="export = 21 exceeds the 20 training tasks"):
        load_tasks(load_comparison(CONFIG, ["export=21", *few]))
    with pytest.raises(ConfigError, match="export = -1: give a number of training tasks"):
        load_comparison(CONFIG, ["export=-1"])


# -- in TRL ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(pools, tmp_path_factory) -> tuple:
    """The folder with the rows of one searched task in a real tokenizer's ids, that tokenizer, the task's prompt."""
    tokenizer = char_tokenizer("".join(dict.fromkeys(LETTERS)))
    ids = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in set(RIGHT + WRONG + BLURTED)}

    class Spelled(Scripted):
        """The script in the tokenizer's ids."""

        async def extend(self, path, *, n=1, until=END):
            kids = await super().extend(path, n=n, until=until)
            spell = lambda step: tuple(ids[chr(i)] if i else tokenizer.eos_token_id for i in step.ids)  # noqa: E731
            return [replace(kid, steps=tuple(replace(s, ids=spell(s)) for s in kid.steps)) for kid in kids]

    replies = (RIGHT, WRONG, BLURTED)
    made = Spelled(lambda text, child: replies[child % 3][len(text) :], Sampling(max_tokens=60))
    found = asyncio.run(search_tasks([task()], Sample(n=3), made, pools[0], tokenizer, seed=0))
    folder = tmp_path_factory.mktemp("rows") / "training"
    asyncio.run(rows_of([found], pools[0], tokenizer, "\n")).write(folder)
    return folder, tokenizer, encode(tokenizer, task())


def tiny(tokenizer) -> ReasonerForCausalLM:
    torch.manual_seed(0)
    return ReasonerForCausalLM(ReasonerConfig.small(len(tokenizer), hidden_size=32, num_hidden_layers=2))


def trained(trainer) -> float:
    return trainer.train().training_loss


def settings(tmp_path) -> dict:
    return dict(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False)


def test_trl_trains_on_the_paths_as_they_are(files, tmp_path):
    folder, tokenizer, prompt = files
    data = load_dataset("json", data_files=str(folder / "sft.jsonl"), split="train", cache_dir=str(tmp_path))
    args = SFTConfig(**settings(tmp_path), max_length=None, per_device_train_batch_size=1)
    trainer = SFTTrainer(model=tiny(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt, skip_special_tokens=True) == RIGHT
    assert (batch["labels"][0] == -100).sum() == len(prompt)
    assert trained(trainer) > 0


def test_trl_trains_on_the_pairs_and_reads_the_ids_that_were_sampled(files, tmp_path):
    folder, tokenizer, _ = files
    data = load_dataset("json", data_files=str(folder / "dpo.jsonl"), split="train", cache_dir=str(tmp_path))
    (row,) = list(data)
    args = DPOConfig(**settings(tmp_path), max_length=None, per_device_train_batch_size=1)
    models = {"model": tiny(tokenizer), "ref_model": tiny(tokenizer)}
    trainer = DPOTrainer(**models, args=args, train_dataset=data, processing_class=tokenizer)
    (theirs,) = list(trainer.train_dataset)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert theirs[name] == row[name]
    assert trained(trainer) > 0


def test_our_own_process_model_reads_the_labels(files):
    folder, _, _ = files
    assert len(read(folder / "steps.jsonl")) == 3
