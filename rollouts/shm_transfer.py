"""The worker's half of weight transfer through shared memory: backend `shm` of vLLM's weight-transfer protocol.

vLLM ships no weight-transfer backend for the CPU. This one reads safetensors from a file that its actor (`cluster.py`)
holds in memory, checks their digest, and loads them layer by layer: a plain `model.load_weights` would meet tensors
that oneDNN prepacking has emptied. It works for GPU workers too. Loaded into every vLLM worker through
`worker_extension_cls`, which imports this module before the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class ShmInit(WeightTransferInitInfo):
    """Nothing to agree on: each update names its own file."""


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    """One file of tensors under their checkpoint names, and the digest it must have."""

    path: str
    digest: str


class ShmTransfer(WeightTransferEngine[ShmInit, ShmUpdate]):
    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        pass  # no rendezvous: the file system is the meeting place

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            _forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdate) -> None:
        digest = hashlib.blake2b(Path(update_info.path).read_bytes(), digest_size=16).hexdigest()
        if digest != update_info.digest:
            raise RuntimeError(f"{update_info.path} has digest {digest}, the sender wrote {update_info.digest}")
        self.model.load_weights(load_file(update_info.path, device=str(self.device)).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Make the next load of each expert layer count as its first.

    vLLM 0.32 prepacks expert weights for the CPU at the first load only; an update is copied unpacked over packed
    storage and every later log-probability is silently wrong (0.02 to 0.1 nats on a small model).
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class ShmWorker:
    """Mixed into each vLLM worker; importing this module is what registers the backend."""


if "shm" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("shm", ShmTransfer)
