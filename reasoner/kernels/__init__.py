"""The model's inner loops: one Python function per op, CUDA where it is built, PyTorch elsewhere.

`reference` is the specification of every op; `csrc` holds the kernels; `dispatch` tells the modes ("auto", "reference",
"require", "emulate"). Imports with torch alone. Neighbours: `reasoner.model` is built on these ops, the learner uses
`token_logprob`.
"""

from .attention import attention
from .decode import latent_decode
from .dispatch import set_mode, using
from .experts import moe_experts
from .head import token_logprob
from .norm import rms_norm, write_latent
from .router import route, sort_by_expert
from .sample import sample
from .swiglu import swiglu

__all__ = [
    "attention",
    "latent_decode",
    "moe_experts",
    "rms_norm",
    "route",
    "sample",
    "set_mode",
    "sort_by_expert",
    "swiglu",
    "token_logprob",
    "using",
    "write_latent",
]
