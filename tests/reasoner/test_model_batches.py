"""Padding, packing, checkpointing and caching change where tokens stand, never what the model says of them."""

import pytest
import torch

from reasoner.model import ReasonerConfig, ReasonerForCausalLM


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=32, num_hidden_layers=3, hidden_size=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


def sequences(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 32, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    rows = sequences(5, 17, 1, 11)
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for row, got, real in zip(rows, logits, mask.bool(), strict=True):
        assert largest(got[real] - model(row[None]).logits[0]) < 1e-5


def test_padding_gets_no_gradient_and_gives_none(model):
    rows = sequences(5, 9)
    ids, mask = padded(rows, "left")
    model(ids, attention_mask=mask).logits[mask.bool()].logsumexp(-1).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        model(row[None]).logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert largest(parameter.grad - together[name]) <= 1e-4 * largest(parameter.grad), name


def test_packed_sequences_do_not_see_each_other(model):
    rows = sequences(5, 17, 1, 11)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    packed = model(torch.cat(rows)[None], position_ids=positions[None]).logits[0]
    for row, got in zip(rows, packed.split([len(row) for row in rows]), strict=True):
        assert largest(got - model(row[None]).logits[0]) < 1e-5


def test_positions_given_with_a_mask_do_not_split_rows(model):
    ids, mask = padded(sequences(5, 9), "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = model(ids, attention_mask=mask).logits
    assert largest(model(ids, attention_mask=mask, position_ids=positions).logits - plain) < 1e-6


@pytest.mark.parametrize("pieces", [(8, 1, 1, 1), (4, 4, 3), (1, 10)])
def test_cache_filled_in_pieces_gives_the_logits_of_one_pass(model, pieces):
    ids, mask = padded(sequences(11, 7, 11), "left")
    whole = model(ids, attention_mask=mask).logits
    past, start = None, 0
    for piece in pieces:
        stop = start + piece
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
        real = mask[:, start:stop, None]
        assert largest((out.logits - whole[:, start:stop]) * real) < 1e-5
        past, start = out.past_key_values, stop


def test_gradient_checkpointing_changes_neither_loss_gradient_nor_load(model):
    ids, mask = padded(sequences(5, 9), "right")
    labels = ids.masked_fill(mask == 0, -100)
    seen = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        loads = [block.mlp.load_E for block in model.model.layers[1:]]
        for block in model.model.layers[1:]:
            block.mlp.load_E = None
        seen.append((loss, [p.grad.clone() for p in model.parameters()], loads))
    (loss, gradients, loads), (loss2, gradients2, loads2) = seen
    assert torch.equal(loss, loss2)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loads, loads2, strict=True))
    assert all(load.sum() == mask.sum() * 8 for load in loads)


def test_logits_to_keep_are_the_last_columns(model):
    ids, mask = padded(sequences(5, 9), "left")
    whole = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_loss_is_the_mean_over_the_items_the_trainer_counts(model):
    (row,) = sequences(9)
    logprobs = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])
    assert torch.allclose(model(row[None], labels=row[None]).loss, -logprobs.mean())
    assert torch.allclose(model(row[None], labels=row[None], num_items_in_batch=4).loss, -logprobs.sum() / 4)


def test_both_ids_and_embeddings_are_refused(model):
    (row,) = sequences(3)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(row[None], inputs_embeds=model.get_input_embeddings()(row[None]))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_cache_of_fixed_size_is_refused(model):
    with pytest.raises(ValueError, match="StaticCache is not supported"):
        model.generate(sequences(4)[0][None], max_new_tokens=3, cache_implementation="static")


def test_beam_search_reorders_the_cache(model):
    (row,) = sequences(5)
    out = model.generate(
        row[None], max_new_tokens=6, num_beams=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    answer = out.sequences[0, 5:]
    logprobs = model(out.sequences[:, :-1]).logits[0, 4:].log_softmax(-1).gather(1, answer[:, None])
    assert abs(logprobs.mean() - out.sequences_scores[0]) < 1e-5


def test_sampling_goes_through_generate(model):
    ids, mask = padded(sequences(4, 6), "left")
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 6 and torch.equal(out[:, :6], ids.repeat_interleave(3, 0))
