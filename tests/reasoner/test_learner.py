"""What a batch becomes, and that a step of TRL's trainer moves the policy the way the advantages say."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from reasoner.config import Learner
from reasoner.credit import Sample
from reasoner.learner import importance_ratio, learn, prefer, supervise
from reasoner.samples import collate, logprobs, mismatch


def test_a_step_raises_what_earned_more_and_lowers_what_earned_less(tmp_path, model, sample, run):
    policy = model()
    good, bad = sample("7", 0.5, policy), sample("9", -0.5, policy)
    before = [sum(s.logprobs) for s in (good, bad)]
    heard = run(policy, [[good, bad]] * 3, tmp_path)
    after = [sum(sample(a, 0, policy).logprobs) for a in ("7", "9")]
    assert after[0] > before[0] + 0.01 and after[1] < before[1] - 0.01
    assert len(heard) == 3 and heard[0]["mismatch"] < 1e-5 and heard[0]["grad_norm"] > 0


def test_the_generator_runs_to_its_end_and_may_end_early(tmp_path, model, sample, tokenizer):
    policy = model()
    batch = [sample("7", 0.5, policy), sample("9", -0.5, policy)]
    ended = []

    def generator():
        yield batch
        ended.append(True)

    options = dict(seed=0, temperature=1.0, max_completion=16, folder=tmp_path)
    learn(policy, tokenizer, lambda _: generator(), Learner(lr=1e-3), steps=5, **options)
    assert ended == [True]


def test_the_importance_correction_is_on(tmp_path, model, sample, run):
    """Samplers' log-probabilities that are too high by 0.7 halve every ratio, and with it the gradient."""
    norms = {}
    for shift in (0.0, -0.7):
        policy = model()
        batch = [sample("7", 0.5, policy, shift=shift), sample("9", -0.5, policy, shift=shift)]
        (heard,) = run(policy, [batch], tmp_path / str(shift), max_grad_norm=1e9)
        norms[shift] = heard["grad_norm"]
        assert heard["mismatch"] == pytest.approx(abs(shift), abs=1e-4)
    assert norms[-0.7] / norms[0.0] == pytest.approx(0.4966, rel=1e-3)  # e^-0.7


def test_without_correction_the_samplers_log_probabilities_do_not_matter(tmp_path, model, sample, run):
    norms = []
    for shift in (0.0, -0.7):
        policy = model()
        batch = [sample("7", 0.5, policy, shift=shift), sample("9", -0.5, policy, shift=shift)]
        (heard,) = run(policy, [batch], tmp_path / str(shift), max_grad_norm=1e9, importance="none")
        norms.append(heard["grad_norm"])
        assert heard["mismatch"] == pytest.approx(abs(shift), abs=1e-4)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_reads_its_batch_once(tmp_path, micro_batches, model, sample, run):
    policy, seen = model(), []
    policy.base_model.register_forward_pre_hook(
        lambda module, args, options: seen.append(len(options["input_ids"])), with_kwargs=True
    )
    batch = [sample("7", 0.5, model()), sample("9", -0.5, model())] * 2
    run(policy, [batch], tmp_path, micro_batches=micro_batches)
    assert sum(seen) == len(batch)


def test_pieces_of_a_batch_keep_the_samples_of_a_question_together(tmp_path, model, sample, run):
    """What the samples of a question begin with is read once in the step, though it is cut into pieces."""
    policy, read = model(), []
    first = [sample(answer, 0.5, policy) for answer in ("77", "78", "9", "99")]
    policy.model.layers[0].register_forward_pre_hook(lambda module, given: read.append(len(given[0])))
    other = [replace(s, ids=(s.ids[1], *s.ids[1:])) for s in first]  # another question
    assert first[0].ids[0] != other[0].ids[0]
    run(policy, [first + other], tmp_path, micro_batches=2)
    beginnings = {s.ids[: i + 1] for s in first + other for i in range(len(s.ids))}
    assert len(read) == 2 and sum(read) == len(beginnings)


def test_advantages_act_per_token(tmp_path, model, sample, run):
    """One token of the answer earned, the next cost: they must move apart."""
    policy = model()
    whole = sample("79", 1.0, policy)
    start = whole.loss_mask.index(True)
    signs = {start: 1.0, start + 1: -1.0}
    split = Sample(whole.ids, whole.loss_mask, whole.logprobs, tuple(signs.get(i, 0.0) for i in range(len(whole.ids))))
    before = copy.deepcopy(policy)
    run(policy, [[split, split]], tmp_path)
    with torch.no_grad():
        ids = torch.tensor([whole.ids])
        gain = policy(input_ids=ids).logits.log_softmax(-1) - before(input_ids=ids).logits.log_softmax(-1)
    first, second = (gain[0, i - 1, whole.ids[i]].item() for i in (start, start + 1))
    assert first > 0.002 > -0.002 > second


def test_micro_batches_change_memory_not_the_step(tmp_path, model, sample, run):
    results = []
    for pieces in (1, 2):
        policy = model()
        batch = [
            sample(a, adv, policy) for a, adv in (("7", 0.7), ("9", -0.2), ("12", -0.5))
        ]  # 3 rows do not divide by 2
        run(policy, [batch], tmp_path / str(pieces), micro_batches=pieces, lr=1e-2)
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    # a tenth of a step: Adam makes one of every gradient, rounding errors too
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


def test_collating_pads_prompts_left_and_completions_right():
    first = Sample(
        (1, 2, 5, 6, 7), (False, False, True, False, True), (0.0, 0.0, -1.0, 0.0, -2.0), (0.0, 0.0, 0.5, 0.0, 0.5)
    )
    second = Sample((3, 8), (False, True), (0.0, -3.0), (0.0, -0.5))
    batch = collate([first, second, second], pad=0, rows=4)
    assert batch["prompt_ids"].tolist()[:2] == [[1, 2], [0, 3]] and batch["prompt_mask"].tolist()[:2] == [
        [1, 1],
        [0, 1],
    ]
    assert batch["completion_ids"].tolist()[:2] == [[5, 6, 7], [8, 0, 0]]
    assert batch["completion_mask"].tolist()[:2] == [[1, 1, 1], [1, 0, 0]]
    assert batch["tool_mask"].tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]  # the filler teaches nothing
    assert batch["advantages"].tolist()[3] == [0, 0, 0]
    assert batch["sampling_per_token_logps"].tolist()[0] == [-1.0, 0.0, -2.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 3.0]]),
        ("token_mask", [[2.0, 0.5, 0.0]]),
        ("sequence_truncate", [[3.0]]),
        ("sequence_mask", [[0.0]]),
    ],
)
def test_ratios_are_capped_or_masked(mode, expected):
    difference = torch.tensor([[2.0, 0.5, 8.0]]).log()
    torch.testing.assert_close(importance_ratio(difference, mode, 3.0), torch.tensor(expected))


def test_mismatch_is_the_mean_distance_to_the_samplers_logprobs(model, sample):
    policy = model()
    assert mismatch(policy, [sample("7", 0, policy), sample("12", 0, policy)], 0) < 1e-5
    assert mismatch(policy, [sample("7", 0, policy, shift=0.3)], 0) == pytest.approx(0.3, abs=1e-5)


def test_supervision_learns_the_completion_and_balances_the_experts(tmp_path, model, tokenizer):
    policy = model()
    prompt, answer = tokenizer.encode("3+4=\n"), [*tokenizer.encode("7"), tokenizer.eos_token_id]
    row = (prompt + answer, [False] * len(prompt) + [True] * len(answer))
    losses = []
    supervise(
        policy,
        tokenizer,
        [row] * 64,
        steps=8,
        batch=8,
        lr=1e-2,
        seed=0,
        folder=tmp_path,
        progress=lambda s, x: losses.append(x),
    )
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    biases = [b for name, b in policy.named_buffers() if name.endswith("e_score_correction_bias")]
    assert any(b.abs().sum() > 0 for b in biases)


def test_preference_raises_the_chosen_answer_over_the_rejected_one(tmp_path, model, sample, tokenizer):
    policy = model()
    prompt, right, wrong = (tokenizer.encode(text) for text in ("3+4=\n", "Answer: 7", "Answer: 8"))
    pairs = [{"prompt": prompt, "chosen": right, "rejected": wrong}] * 4

    def margin():
        first, second = logprobs(policy, [sample("Answer: 7", 0.0, policy), sample("Answer: 8", 0.0, policy)], 0)
        return first - second

    before = margin()
    losses = []
    settings = {"steps": 8, "batch": 4, "lr": 1e-3, "beta": 0.1, "seed": 0, "folder": tmp_path}
    prefer(policy, tokenizer, pairs, **settings, progress=lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the model as it was given is the reference
    assert margin() > before + 0.5 and losses[-1] < losses[0]
