"""Learning, on TRL: the only file that imports trl.

`PolicyTrainer` is TRL's GRPOTrainer fed with finished samples instead of its own generation; `supervise` is its
SFTTrainer and `prefer` its DPOTrainer, both on token ids. Knows nothing of engines, verifiers or tasks. What it relies
on in TRL 1.16 is pinned by tests/reasoner/test_trl_contract.py.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import import_utils

import_utils.is_vllm_available = lambda min_version=None: False  # engines live in actors: keep vllm out of here
from trl import (  # noqa: E402
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from reasoner.config import Learner  # noqa: E402
from reasoner.credit import Sample  # noqa: E402
from reasoner.logprobs import is_plain, token_logprobs  # noqa: E402
from reasoner.lora import adapt, adapters, fold, inside  # noqa: E402
from reasoner.model import balance  # noqa: E402
from reasoner.samples import collate  # noqa: E402

# Shape suffixes: B samples, P prompt tokens (padded on the left), T completion tokens (padded on the right).

Batches = Generator[list[Sample], dict[str, float], None]
State = Mapping[str, Any]  # optimizer, learning-rate schedule, updates so far, random state


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loop: Callable[[Callable[[], State]], Batches],
    learner: Learner,
    *,
    steps: int,
    seed: int,
    temperature: float,
    max_completion: int,
    folder: Path,
    start: State | None = None,
    base: PreTrainedModel | None = None,
) -> None:
    """One optimizer step per batch that the generator yields, at most `steps`; each step's metrics are sent back to it.

    The generator owns the loop: what it does after a `yield` happens when the step is done.

    Args:
        loop: makes the generator. It is given a function that returns the trainer's state as it is between two steps.
        start: such a state: go on from there, bit for bit.
        base: what `learner.kl` holds the model to and adapters adapt; None: the model as it is now.
    """
    base = base or model
    reference = copy.deepcopy(base).eval() if learner.kl else None
    trained = adapt(base, learner.lora, seed) if learner.lora else model

    def after_step() -> None:
        balance(trained, learner.balance_rate)
        if learner.lora:
            fold(trained, model)

    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_accumulation_steps=learner.micro_batches,
        steps_per_generation=learner.micro_batches,
        max_completion_length=max_completion,
        temperature=temperature,
        learning_rate=learner.lr,
        lr_scheduler_type="linear",
        warmup_steps=learner.lr_warmup,
        weight_decay=0.0,
        max_grad_norm=learner.max_grad_norm,
        loss_type=learner.loss,
        importance_sampling_level=learner.ratio,
        beta=0.0,  # TRL would load the reference by the model's name: PolicyTrainer has it from here
        vllm_importance_sampling_correction=learner.importance != "none",
        vllm_importance_sampling_mode=learner.importance if learner.importance != "none" else "token_truncate",
        vllm_importance_sampling_clip_max=learner.importance_max,
        **_common(seed, learner.report_to),
    )
    trainer = PolicyTrainer(loop, start, model=trained, processing_class=tokenizer, args=args)
    trainer.beta, trainer.reference, trainer.mtp = learner.kl, reference, learner.mtp
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_AfterStep(after_step))
    trainer.add_callback(_OnLog(trainer.record))
    try:
        trainer.train()
        trainer.finish()
    except _NoMoreBatches:
        pass


class PolicyTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, its losses and its importance correction, on samples that were made elsewhere."""

    def __init__(
        self,
        loop: Callable[[Callable[[], State]], Batches],
        start: State | None = None,
        *,
        args: GRPOConfig,
        **options: Any,
    ) -> None:
        rows = 2 * args.world_size * args.steps_per_generation * max(1, args.max_steps)
        super().__init__(
            reward_funcs=_never_asked,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""] * rows}),  # only its length is used
            **options,
        )
        self.use_vllm = True  # the samples come from an engine: without this TRL ignores their log-probabilities
        self._batches = loop(self.snapshot)
        self._start = start
        self._started = False
        self.reference: PreTrainedModel | None = None
        self.mtp = 0.0  # weight of the MTP modules' own loss
        self._pieces: list[dict[str, Tensor]] = []  # of the batch
        self._inputs: dict[str, Tensor] = {}  # the piece now in work
        self._apart: list[tuple[Tensor, Tensor]] = []  # of each piece: nats between policy and sampler, tokens
        self.step_metrics: dict[str, float] = {}

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self._inputs = inputs
        if self.beta:
            inputs["ref_per_token_logps"] = self._of_reference(inputs)
        loss = super()._compute_loss(model, inputs)
        return loss + self.mtp * self._mtp_loss(inputs) / self.current_gradient_accumulation_steps if self.mtp else loss

    @torch.no_grad()
    def _of_reference(self, inputs: dict[str, Tensor]) -> Tensor:
        """Its log-probabilities of the completions (B, T), with experts of its own choice."""
        ids_BL, mask_BL = _whole(inputs)
        return self._read(self.reference, ids_BL, mask_BL, inputs["tool_mask"].shape[1])[0]

    def _mtp_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """Keeps MTP modules in step with the policy: they learn to foresee its samples; the trunk gets no gradient."""
        (ids_BL, mask_BL), model = _whole(inputs), inside(self.model)
        learned_BL = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["tool_mask"]], dim=1)
        with torch.no_grad():
            hidden_BLD = model.model(ids_BL, mask_BL, use_cache=False).last_hidden_state
        return model.mtp_loss(hidden_BLD, ids_BL, ids_BL.masked_fill(learned_BL == 0, -100), mask_BL, detached=True)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **rest: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """TRL's own on a CPU works the head out for every column, prompts too; here only completions cost one.

        An optimizer step is one pass over its batch, so the policy that the ratio is taken against is the one that
        these log-probabilities are of: the importance correction needs no pass of its own.
        """
        logps_BT, entropies_BT, auxiliary = self._read(
            model, input_ids, attention_mask, logits_to_keep, batch_size, self._inputs.get("experts"), **rest
        )
        self._correct(logps_BT.detach())
        return logps_BT, entropies_BT, auxiliary

    def _read(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, experts=None, **rest: Any
    ) -> tuple[Tensor, Tensor, Any]:
        if is_plain(inside(model)):
            options = {"temperature": self.temperature, "experts": experts}
            return *token_logprobs(inside(model), input_ids, attention_mask, logits_to_keep, **options), None
        return super()._get_per_token_logps_and_entropies(  # wrapped by accelerate, or with a head of its own
            model, input_ids, attention_mask, logits_to_keep, batch_size, **rest
        )

    def _correct(self, logps_BT: Tensor) -> None:
        """Give the piece now in work its importance ratios."""
        mask_BT = self._inputs["tool_mask"]
        difference_BT = (logps_BT - self._inputs["sampling_per_token_logps"]) * mask_BT
        self._apart.append((difference_BT.abs().sum(), mask_BT.sum()))
        self._inputs["importance_sampling_ratio"] = importance_ratio(
            difference_BT, self.vllm_importance_sampling_mode, self.vllm_importance_sampling_clip_max
        )

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The piece of the batch whose turn it is.

        TRL's own generates, and shuffles the rows before it cuts them into pieces. Here the samples of a question stay
        together, because what they have in common is read once for each piece.
        """
        pieces = self.args.steps_per_generation
        if self._step % pieces == 0:
            self._pieces = _cut(self._tensors(self._next_batch()), pieces)
        return self._pieces[self._step % pieces]

    def _next_batch(self) -> list[Sample]:
        try:
            if self._started:
                return self._batches.send(self.step_metrics)
            self._started = True
            if self._start:
                self._restore(self._start)
            return next(self._batches)
        except StopIteration:
            raise _NoMoreBatches from None

    def snapshot(self) -> State:
        """What the next step depends on besides the weights. To be asked for between two steps only."""
        return {
            "updates": self.state.global_step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "random": (torch.get_rng_state(), numpy.random.get_state(), random.getstate()),
            "adapters": adapters(self.model),
        }

    def _restore(self, start: State) -> None:
        self.state.global_step = self._globalstep_last_logged = start["updates"]
        self.optimizer.load_state_dict(start["optimizer"])
        self.model.load_state_dict(start.get("adapters", {}), strict=False)
        self.lr_scheduler.load_state_dict(start["schedule"])
        torch_state, numpy_state, python_state = start["random"]
        torch.set_rng_state(torch_state)
        numpy.random.set_state(numpy_state)
        random.setstate(python_state)

    def record(self, step: int, logs: dict[str, Any]) -> None:
        """Keep what TRL measured in a step for the generator."""
        names = {name: name for name in ("loss", "grad_norm", "entropy", "kl")}
        names["clip_ratio/region_mean"] = "clip_ratio"
        if "loss" in logs:
            found = {ours: float(logs[theirs]) for theirs, ours in names.items() if logs.get(theirs) is not None}
            own = torch.stack([sum(each).float() for each in zip(*self._apart, strict=True)])
            apart, tokens = self.accelerator.reduce(own).tolist()  # of all workers
            self.step_metrics, self._apart = found | {"mismatch": apart / tokens}, []

    def finish(self) -> None:
        """Let the generator run to its end after the last step."""
        while True:
            self._next_batch()

    def _tensors(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch in the form of TRL's own generation, with advantages (B, T)."""
        gather, pieces = self.accelerator.gather, self.args.steps_per_generation
        most = int(gather(torch.tensor([len(samples)], device=self.accelerator.device)).max())
        rows = -(-most // pieces) * pieces  # the same for every worker: TRL's metrics expect it
        batch = collate(samples, self._tokenizer.pad_token_id, rows=rows, config=self.model.config)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        return batch | {"num_items_in_batch": gather(batch["tool_mask"].sum()).sum()}


def _cut(batch: dict[str, Tensor], pieces: int) -> list[dict[str, Tensor]]:
    rows = len(batch["completion_ids"]) // pieces
    return [{name: t[i * rows :][:rows] if t.ndim else t for name, t in batch.items()} for i in range(pieces)]


def _whole(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts and completions, (B, P + T)."""
    ids_BL = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids_BL, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def importance_ratio(difference_BT: Tensor, mode: str, highest: float) -> Tensor:
    """Policy over sampler probability, per token (B, T) or per sequence (B, 1), truncated or masked at `highest`.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; modes as in TRL.
    """
    level, limit = mode.split("_")
    log_ratio = difference_BT if level == "token" else difference_BT.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    return ratio.clamp(max=highest) if limit == "truncate" else ratio.masked_fill(ratio > highest, 0.0)


def supervise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    folder: Path,
    balance_rate: float = 0.001,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    targets: Sequence[Sequence[int]] | None = None,
) -> None:
    """Next-token training on (token ids, loss mask) rows with TRL's SFTTrainer.

    targets: for each row, what is to be predicted at its places in place of its own tokens, which are still what the
        model reads (a process judge says + or - where the next step begins).
    """
    wanted = targets if targets is not None else [ids for ids, _ in rows]
    labels = [
        [i if learned else -100 for i, learned in zip(said, mask, strict=True)]
        for said, (_, mask) in zip(wanted, rows, strict=True)
    ]
    data = Dataset.from_dict({"input_ids": [list(ids) for ids, _ in rows], "labels": labels})
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 10),
        adam_beta2=0.95,
        weight_decay=0.0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **_common(seed, ()),
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_AfterStep(lambda: balance(model, balance_rate)))
    trainer.add_callback(_OnLog(lambda step, logs: progress(step, logs["loss"]) if "loss" in logs else None))
    trainer.train()


def imitate(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    folder: Path,
    max_completion: int = 64,
    temperature: float = 1.0,
    divergence: float = 1.0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """On-policy distillation with TRL's DistillationTrainer: the model continues `prompts` (token ids) by itself, and
    its next-token law is drawn to the teacher's along what it wrote (Agarwal et al. 2023, arXiv 2306.13649).

    divergence: 0 is KL(teacher || model), 1 KL(model || teacher), between them Jensen-Shannon. Trains what requires a
        gradient; both models must have one vocabulary.
    """
    args = DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        weight_decay=0.0,
        max_completion_length=max_completion,
        temperature=temperature,
        beta=divergence,
        **_common(seed, ()),
    )
    data = Dataset.from_dict({"prompt": [list(ids) for ids in prompts]})
    trainer = ImitationTrainer(
        model=model, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_OnLog(lambda step, logs: progress(step, logs["loss"]) if "loss" in logs else None))
    trainer.train()


class ImitationTrainer(DistillationTrainer):
    """TRL's DistillationTrainer on prompts that are token ids already."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict]:
        return prompts, None, {}


def prefer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict[str, list[int]]],
    *,
    steps: int,
    batch: int,
    lr: float,
    beta: float,
    seed: int,
    folder: Path,
    balance_rate: float = 0.001,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Preference training with TRL's DPOTrainer on token ids: {prompt, chosen, rejected}. The model as it is given is
    the reference."""
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    args = DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 10),
        weight_decay=0.0,
        beta=beta,
        max_length=None,
        precompute_ref_log_probs=True,
        **_common(seed, ()),
    )
    trainer = PairTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({theirs: [pair[ours] for pair in pairs] for ours, theirs in names.items()}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_AfterStep(lambda: balance(model, balance_rate)))
    trainer.add_callback(_OnLog(lambda step, logs: progress(step, logs["loss"]) if "loss" in logs else None))
    trainer.train()


class PairTrainer(DPOTrainer):
    """TRL's DPOTrainer on pairs that are token ids already: text would have to be tokenised again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def _common(seed: int, report_to: Sequence[str]) -> dict[str, Any]:
    return {
        "seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": list(report_to) or "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),  # said outright: else processes on CPUs are not joined
    }


def _never_asked(**_: Any) -> list[float]:
    raise AssertionError("rewards come with the samples")


class _NoMoreBatches(Exception):
    """The generator of batches has ended."""


class _AfterStep(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._act()


class _OnLog(TrainerCallback):
    def __init__(self, tell: Callable[[int, dict[str, Any]], Any]) -> None:
        self._tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self._tell(state.global_step, logs)
