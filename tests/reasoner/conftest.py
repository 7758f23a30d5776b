"""Fixtures that several files share: the kernels' thread orders, and a small policy with what a learner is given."""

import pytest
import torch

from reasoner.kernels import build


@pytest.fixture
def thread_orders():
    """`for _ in thread_orders("head")`: the body runs under four thread orders of the emulator."""

    def orders(source):
        library = build.load(build.SOURCES / f"{source}.cu", build.EMULATOR)
        for seed in range(4):
            library.set_thread_order(seed)
            yield seed

    return orders


@pytest.fixture(scope="session")
def tokenizer():
    from reasoner.model import char_tokenizer

    return char_tokenizer("0123456789+-= :\nAnswer")


@pytest.fixture(scope="session")
def model(tokenizer):
    """`model(seed)`: a new small mixture of experts."""
    from reasoner.model import ReasonerConfig, ReasonerForCausalLM

    sizes = dict(
        hidden_size=64, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8
    )

    def make(seed=0):
        torch.manual_seed(seed)
        return ReasonerForCausalLM(ReasonerConfig.small(len(tokenizer), num_experts_per_tok=2, **sizes))

    return make


@pytest.fixture(scope="session")
def sample(tokenizer):
    """`sample(answer, advantage, policy)`: an answer to one question, with the policy's own log-probabilities, moved by
    `shift` nats."""
    from reasoner.credit import Sample

    def make(answer, advantage, policy, *, shift=0.0):
        prompt = tokenizer.encode("3+4=\n")
        response = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        with torch.no_grad():
            logps = policy(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        own = [logps[len(prompt) - 1 + i, t].item() - shift for i, t in enumerate(response)]
        blank, full = len(prompt), len(response)
        return Sample(
            ids=(*prompt, *response),
            loss_mask=(False,) * blank + (True,) * full,
            logprobs=(0.0,) * blank + tuple(own),
            advantages=(0.0,) * blank + (advantage,) * full,
        )

    return make


@pytest.fixture(scope="session")
def run(tokenizer):
    """`run(policy, batches, folder, **settings)`: learn from the batches; returns what was sent back after each."""
    from reasoner.config import Learner
    from reasoner.learner import learn

    def learned(policy, batches, folder, **settings):
        heard = []

        def generator():
            for batch in batches:
                heard.append((yield batch))

        settings = {"lr": 1e-3, "lr_warmup": 0, "balance_rate": 0.0} | settings
        common = dict(steps=len(batches), seed=0, temperature=1.0, max_completion=16, folder=folder)
        learn(policy, tokenizer, lambda _: generator(), Learner(**settings), **common)
        return heard

    return learned
