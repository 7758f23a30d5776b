"""The numbers in [0, 1) that decide the tokens of one path, and the draw itself.

Every engine that samples by itself draws here: a token is the inverse of the cumulative distribution at the path's next
number, so one seed gives one path, in any batch and on any of them, but where float rounding decides.

Letters of shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

CODE_BITS = 32  # of a 53-bit arithmetic code that may be spent: what is left must stay far above rounding
ALMOST_ONE = math.nextafter(1.0, 0.0)


class Noise:
    """A path's stream of numbers: first what its arithmetic code says, if it has one, then those of its seed.

    code: in [0, 1), evenly spaced over the children of one call (Vilnis et al. 2023, arXiv:2210.15458); spent when 32
    bits of it are.
    """

    def __init__(self, seed: int, code: float | None = None) -> None:
        self._stream = random.Random(seed)
        self._code = code
        self._bits = 0.0  # of the code that are spent

    def next(self) -> float:
        return self._stream.random() if self._code is None else self._code

    @property
    def coded(self) -> bool:
        return self._code is not None

    def narrow(self, low: float, high: float) -> None:
        """Leave of the code what decides the tokens after the one that took [low, high)."""
        self._bits -= math.log2(high - low)
        rest = (self._code - low) / (high - low)
        self._code = min(max(rest, 0.0), ALMOST_ONE) if self._bits < CODE_BITS else None


def draw(law_BV: Tensor, noises: Sequence[Noise | None]) -> Tensor:
    """One token per row, from its log-probabilities. A row without noise is drawn at the middle and to be ignored."""
    cdf_BV = law_BV.double().exp().cumsum(-1)
    cdf_BV /= cdf_BV[:, -1:].clone()  # so that it ends at 1, which no number reaches
    uniform_B = cdf_BV.new_tensor([0.5 if noise is None else noise.next() for noise in noises])
    tokens_B = torch.searchsorted(cdf_BV, uniform_B[:, None], right=True)[:, 0]
    for i, noise in enumerate(noises):
        if noise is not None and noise.coded:
            token = int(tokens_B[i])
            noise.narrow(cdf_BV[i, token - 1].item() if token else 0.0, cdf_BV[i, token].item())
    return tokens_B
