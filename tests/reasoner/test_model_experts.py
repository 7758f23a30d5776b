"""The router, its balancing bias and the grouped experts, against plain loops."""

import pytest
import torch
import torch.nn.functional as F

from reasoner.model import ReasonerConfig, ReasonerForCausalLM, balance
from reasoner.model.moe import MoE, sequence_loss


def layer(seed: int = 0, **changes) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(ReasonerConfig.small(vocab_size=8, hidden_size=64, **changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def by_loop(moe: MoE, x, weights, experts):
    rows = []
    for token, ws, es in zip(x, weights, experts, strict=True):
        total = moe.shared_experts(token[None])[0]
        for weight, expert in zip(ws, es, strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
            total = total + weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_grouped_experts_equal_a_loop_over_tokens(count):
    moe = layer()
    x = torch.randn(count, 64, requires_grad=True)
    weights, experts, _ = moe.gate(x)
    wanted = by_loop(moe, x, weights, experts)
    got, used, _ = moe(x)
    assert torch.equal(used.sort(1).values, experts.sort(1).values)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    inputs = [x, *moe.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_bias_decides_who_is_chosen_but_not_how_much_they_count():
    moe = layer()
    x = torch.randn(20, 64)
    moe.gate.e_score_correction_bias[:8] = 10
    weights, experts, _ = moe.gate(x)
    assert torch.equal(experts.sort(1).values, torch.arange(8).expand(20, 8))
    scores = F.linear(x, moe.gate.weight).sigmoid().gather(1, experts)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))


def test_experts_come_only_from_the_best_groups():
    moe = layer(n_group=4, topk_group=1)
    _, experts, _ = moe.gate(torch.randn(50, 64))
    groups = experts // 8
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique()) > 1


def test_weights_are_scaled_and_normalised_as_configured():
    x = torch.randn(20, 64)
    weights, _, _ = layer(routed_scaling_factor=2.5).gate(x)
    torch.testing.assert_close(weights.sum(1), torch.full((20,), 2.5))
    plain, experts, _ = (moe := layer(norm_topk_prob=False, routed_scaling_factor=2.0)).gate(x)
    torch.testing.assert_close(plain, 2 * F.linear(x, moe.gate.weight).sigmoid().gather(1, experts))


def test_recorded_experts_are_used_and_their_weights_still_learn():
    moe = layer()
    recorded = torch.rand(20, 32).topk(8).indices
    weights, experts, _ = moe.gate(torch.randn(20, 64), recorded)
    assert torch.equal(experts, recorded)
    weights.square().sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0


def test_router_bias_stays_float32_in_a_bfloat16_model():
    model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=8, num_hidden_layers=2))
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias += 1.001
    model.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert (gate.e_score_correction_bias == torch.tensor(1.001)).all()
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def model_with_favourites() -> ReasonerForCausalLM:
    torch.manual_seed(0)
    model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=32, num_hidden_layers=2)).train()
    torch.nn.init.normal_(model.model.layers[1].mlp.gate.weight, std=0.5)
    return model


def imbalance(model: ReasonerForCausalLM, ids: torch.Tensor) -> float:
    """Load of the busiest expert over the mean; forgets the counts."""
    moe = model.model.layers[1].mlp
    moe.load_E = None
    model(ids)
    load = moe.load_E.float()
    moe.load_E = None
    return (load.max() / load.mean()).item()


def test_balancing_evens_the_load_and_keeps_the_mean_bias_at_zero():
    model = model_with_favourites()
    ids = torch.randint(3, 32, (16, 32))
    before = imbalance(model, ids)
    for _ in range(60):
        model(ids)
        balance(model, 0.02)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert abs(bias.mean()) < 1e-5 < bias.abs().max()
    assert before > 1.8 and imbalance(model, ids) < 1 + 0.5 * (before - 1)


def test_biases_stand_still_without_balance_and_without_training_forwards():
    model = model_with_favourites()
    ids = torch.randint(3, 32, (4, 8))
    with torch.no_grad():
        model(ids)  # scoring old log-probabilities in the midst of training
    model.eval()(ids)
    balance(model, 0.1)
    model.train()(ids)
    assert model.model.layers[1].mlp.load_E.sum() == 4 * 8 * 8
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()


def test_experts_recorded_in_one_forward_are_replayed_in_another():
    model = model_with_favourites().eval()
    ids = torch.randint(3, 32, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    first = model(ids, attention_mask=mask, output_experts=True)
    assert first.experts.shape == (2, 9, 2, 8)
    assert (first.experts[:, :, 0] == -1).all() and (first.experts[0, :3] == -1).all()
    assert (first.experts[mask.bool()][:, 1] >= 0).all()
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_(std=0.3)  # would choose others now
    free = model(ids, attention_mask=mask, output_experts=True)
    replayed = model(ids, attention_mask=mask, experts=first.experts, output_experts=True)
    assert torch.equal(replayed.experts, first.experts) and not torch.equal(free.experts, first.experts)
    assert torch.equal(replayed.logits, first.logits) and not torch.equal(free.logits, first.logits)


def test_tokens_without_a_record_choose_for_themselves():
    model = model_with_favourites().eval()
    ids = torch.randint(3, 32, (1, 6))
    free = model(ids, output_experts=True).experts
    record = torch.full_like(free, -1)
    record[:, :3, 1] = torch.arange(8)
    used = model(ids, experts=record.to(torch.int16), output_experts=True).experts
    assert torch.equal(used[:, :3, 1], record[:, :3, 1])
    assert torch.equal(used[:, 3:], free[:, 3:])


def test_record_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"experts is \(1, 6, 1, 8\) but .* is \(1, 6, 2, 8\)"):
        model_with_favourites()(torch.randint(3, 32, (1, 6)), experts=torch.zeros(1, 6, 1, 8, dtype=torch.long))


def test_sequence_loss_is_the_formula_of_the_paper():
    scores, experts = torch.rand(13, 6), torch.rand(13, 6).topk(2).indices
    sequences = torch.tensor([0] * 5 + [1] * 8)
    total = 0.0
    for n, length in ((0, 5), (1, 8)):
        s, used = scores[sequences == n], experts[sequences == n]
        for i in range(6):
            f = 6 / (2 * length) * (used == i).any(1).sum()
            p = (s[:, i] / s.sum(1)).sum() / length
            total += f * p / 2
    torch.testing.assert_close(sequence_loss(scores, experts, sequences), total)


def test_sequence_loss_of_even_use_is_one():
    scores = torch.full((6, 6), 0.5)
    experts = torch.arange(6).view(6, 1).repeat(1, 2)
    experts[:, 1] = (experts[:, 1] + 1) % 6
    torch.testing.assert_close(sequence_loss(scores, experts, torch.zeros(6, dtype=torch.long)), torch.tensor(1.0))


def test_sequence_loss_ignores_padding_and_is_added_with_its_weight():
    model = model_with_favourites()
    ids = torch.randint(3, 32, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, aux_weight=0.01)
    alone = [
        model(row[m.bool()][None], labels=row[m.bool()][None], aux_weight=1.0).aux_loss
        for row, m in zip(ids, mask, strict=True)
    ]
    torch.testing.assert_close(out.aux_loss, torch.stack(alone).mean())
    plain = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(out.loss, plain + 0.01 * out.aux_loss)
    gradient = torch.autograd.grad(out.aux_loss, model.model.layers[1].mlp.gate.weight)[0]
    assert gradient.abs().sum() > 0


def balance_in_a_group(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    moe = layer()
    if rank == 0:  # the other process saw no token, and must neither hang nor differ
        moe.count(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]]))
    balance(moe, 0.1)
    torch.save(moe.gate.e_score_correction_bias, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_balancing_adds_up_the_loads_of_all_processes(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=balance_in_a_group, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert torch.equal(first, second)
    assert (first[:8] < 0).all() and (first[8:] > 0).all() and first.mean().abs() < 1e-6


def test_autocast_rounds_the_experts_and_not_the_router():
    moe = layer()
    x = torch.randn(40, 64)
    wanted, experts, scores = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, rounded_experts, rounded_scores = moe(x)
    got.float().square().sum().backward()
    assert got.dtype == torch.bfloat16 and moe.experts.gate_up_proj.grad.dtype == torch.float32
    assert torch.equal(rounded_experts, experts) and torch.equal(rounded_scores, scores)
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.02


def test_model_trains_under_autocast():
    model = model_with_favourites()
    ids = torch.randint(3, 32, (2, 9))
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, labels=ids).loss
    rounded.backward()
    assert 0 < abs(exact - rounded) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters())
