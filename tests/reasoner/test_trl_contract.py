"""What we rely on in TRL 1.16: private names and behaviours that a new version may change without notice."""

import inspect
import subprocess
import sys
from importlib.metadata import version

from transformers import Trainer
from trl import GRPOTrainer

import reasoner.learner  # noqa: F401 (first: it keeps TRL from importing vllm)


def test_the_version_is_the_one_that_was_read():
    assert version("trl").startswith("1.16.")


def test_learning_keeps_vllm_out_of_its_process():
    code = "import sys, reasoner.learner; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_one_method_hands_out_the_pieces_of_a_batch_in_their_turn():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "self._generate_and_score_completions(generation_batch)" in source  # ours takes the next one
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in source
    assert "self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "self._step += 1" in inspect.getsource(GRPOTrainer.training_step)


def test_the_loss_takes_advantages_per_token_and_our_keys():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "if advantages.dim() == 1" in source
    for key in ("tool_mask", "old_per_token_logps", "importance_sampling_ratio", "num_items_in_batch"):
        assert f'"{key}"' in source
    assert 'if self.use_vllm and self.vllm_importance_sampling_correction and self.loss_type != "vespo"' in source


def test_logprobs_come_from_the_method_we_call():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def test_we_override_these_three_methods_alone():
    from reasoner.learner import PolicyTrainer

    own = {name for name in vars(PolicyTrainer) if hasattr(GRPOTrainer, name)}
    assert own - {"__module__", "__doc__", "__init__"} == {
        "_prepare_inputs",
        "_compute_loss",  # to know the experts of the rows in it
        "_get_per_token_logps_and_entropies",
    }


def test_distillation_asks_one_method_for_the_ids_of_its_prompts():
    from trl import DistillationTrainer

    source = inspect.getsource(DistillationTrainer._generate)
    assert "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)" in source
