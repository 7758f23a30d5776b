"""The model on its CUDA kernels, run by the emulator on the CPU, agrees with the model in plain PyTorch."""

import copy
import shutil

import pytest
import torch

from reasoner import kernels
from reasoner.model import ReasonerConfig, ReasonerForCausalLM

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


@pytest.mark.parametrize(
    "groups", [dict(), dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)], ids=["flat", "grouped"]
)
def test_model_on_kernels_gives_the_same_loss_and_gradients(groups, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, hidden_size=64, n_routed_experts=16, num_experts_per_tok=4) | groups
    plain = ReasonerForCausalLM(ReasonerConfig.small(vocab_size=32, **sizes))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    plain.to(torch.bfloat16).train()
    emulated = copy.deepcopy(plain)
    ids = torch.randint(3, 32, (2, 7))
    wanted = plain(ids, labels=ids).loss
    wanted.backward()

    launched = []
    call = kernels.dispatch.call
    monkeypatch.setattr(
        kernels.dispatch, "call", lambda library, name, *rest: (launched.append(name), call(library, name, *rest))
    )
    with kernels.using("emulate"):
        loss = emulated(ids, labels=ids).loss
        loss.backward()
    assert {"router_route", "experts_forward", "router_gradient", "experts_backward"} <= set(launched)
    assert abs(loss - wanted) < 0.01
    for (name, parameter), other in zip(plain.named_parameters(), emulated.parameters(), strict=True):
        error = (parameter.grad - other.grad).float().norm() / parameter.grad.float().norm()
        assert error < 0.05, name
    assert torch.equal(plain.model.layers[1].mlp.load_E, emulated.model.layers[1].mlp.load_E)
