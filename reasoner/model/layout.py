"""Where the real tokens of a batch stand: padding on either side and packed sequences, reduced to one picture.

Every layer works on the real tokens alone, (T, D). Attention alone needs a rectangle, one row per sequence, filled
from the left: then causal attention needs no mask, because what follows a sequence never reaches it. (It is as wide as
the longest sequence, so pack sequences of like lengths.) Rows with one prompt may share what they have in common: then
they are a tree, several trees fill one row, and a mask tells who sees whom (`tree`).
Knows no weights. Neighbours: `mla.py` moves tokens into the rectangle; `transformer.py` moves them back.

Shapes: B, L the input's rows and columns; T real tokens; N sequences of at most S tokens; P tokens already cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 1024  # nodes of a tree


@dataclass(frozen=True)
class Shared:
    """The T tokens as nodes of trees: a node is a token after all that came before it."""

    nodes_BL: Tensor  # which node stands where in the input; at padding: any
    parent_T: Tensor  # the node before; that of a first token: any
    copies_T: Tensor  # tokens of the input that the node stands for
    seen_NSS: Tensor  # whom each node looks back at, itself too


@dataclass(frozen=True)
class Layout:
    """T real tokens, as positions in the input (B, L) and in the rectangle of sequences (N, S)."""

    batch: int
    length: int
    source_T: Tensor | None  # index into B * L; None: every token is real
    sequences: int
    width: int
    slots_T: Tensor | None  # index into N * S; None: the rectangle is the input
    positions_T: Tensor  # for the rotary embedding
    mask_BLP: Tensor | None = None  # continuing a cache: which of the P + L keys a query may see; None: all
    continues: bool = False  # keys of earlier tokens are in the cache
    shared: Shared | None = None  # the rectangle holds trees

    def take(self, x_BL: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)"""
        flat = x_BL.flatten(0, 1)
        return flat if self.source_T is None else flat[self.source_T]

    def put(self, x_T: Tensor, fill: float = 0) -> Tensor:
        """(T, ...) -> (B, L, ...), `fill` where there is padding."""
        return _place(x_T, self.source_T, self.batch, self.length, fill)

    def rows(self, x_T: Tensor, fill: float = 0) -> Tensor:
        """(T, ...) -> (N, S, ...), `fill` where a sequence is shorter."""
        return _place(x_T, self.slots_T, self.sequences, self.width, fill)

    def unrow(self, x_NS: Tensor) -> Tensor:
        """(N, S, ...) -> (T, ...)"""
        flat = x_NS.flatten(0, 1)
        return flat if self.slots_T is None else flat.index_select(0, self.slots_T)

    def ahead(self, x_T: Tensor, count: int, fill: float) -> Tensor:
        """What stands `count` tokens further on in the same sequence, `fill` beyond its end; (T,) -> (T,)"""
        return self.unrow(F.pad(self.rows(x_T, fill), (0, count), value=fill)[:, count:])

    @property
    def sequence_T(self) -> Tensor:
        """Which of the N sequences each token belongs to."""
        slots_T = self.slots_T
        if slots_T is None:
            slots_T = torch.arange(self.sequences * self.width, device=self.positions_T.device)
        return slots_T // self.width


def _place(x_T: Tensor, index_T: Tensor | None, rows: int, columns: int, fill: float) -> Tensor:
    if index_T is not None:
        x_T = x_T.new_full((rows * columns, *x_T.shape[1:]), fill).index_copy(0, index_T, x_T)
    return x_T.unflatten(0, (rows, columns))


def fresh(x_BL: Tensor, mask_BL: Tensor | None, positions_BL: Tensor | None) -> Layout:
    """The layout of a forward that starts at the beginning of its sequences.

    With `mask_BL` each row is one sequence. Without it, positions that do not go up by one start a new sequence in the
    same row: the padding-free packing of TRL and transformers.
    """
    (batch, length), device = x_BL.shape[:2], x_BL.device
    if mask_BL is not None and not mask_BL.all():
        real_BL = mask_BL.bool()
        source_T = real_BL.flatten().nonzero()[:, 0]
        within_BL = real_BL.cumsum(1) - 1
        width = int(within_BL.max()) + 1
        row_T = source_T // length
        within_T = within_BL.flatten()[source_T]
        positions_T = within_T if positions_BL is None else positions_BL.expand(batch, length).flatten()[source_T]
        return Layout(batch, length, source_T, batch, width, row_T * width + within_T, positions_T)

    if positions_BL is None:
        positions_T = torch.arange(length, device=device).repeat(batch)
        return Layout(batch, length, None, batch, length, None, positions_T)
    positions_BL = positions_BL.expand(batch, length)
    starts_BL = torch.ones_like(positions_BL, dtype=torch.bool)
    starts_BL[:, 1:] = positions_BL.diff(dim=1) != 1
    if mask_BL is not None or not starts_BL[:, 1:].any():
        return Layout(batch, length, None, batch, length, None, positions_BL.flatten())
    first_N = starts_BL.flatten().nonzero()[:, 0]
    sequence_T = starts_BL.flatten().cumsum(0) - 1
    within_T = torch.arange(batch * length, device=device) - first_N[sequence_T]
    width = int(within_T.max()) + 1
    slots_T = sequence_T * width + within_T
    return Layout(batch, length, None, len(first_N), width, slots_T, positions_BL.flatten())


def tree(ids_BL: Tensor, mask_BL: Tensor, prompt: int) -> Layout | None:
    """The layout that reads a token once which follows the same tokens in several rows.

    A causal model says the same of it in all of them, so nothing is lost; `take` and `put` know it by one of its
    places. Rows that are equal in the first `prompt` columns make one tree. None where one has more than `WIDEST`
    nodes: its branches would cost more attention than sequences of their own.
    """
    (batch, length), device = ids_BL.shape, ids_BL.device
    ids_RL, row_B = ids_BL.where(mask_BL.bool(), -1).unique(dim=0, return_inverse=True)  # sorted: likes are neighbours
    real_RL, same_RL = ids_RL >= 0, torch.zeros_like(ids_RL, dtype=torch.bool)
    same_RL[1:] = (ids_RL[1:] == ids_RL[:-1]).cumprod(1).bool()
    joins_R = same_RL[:, :prompt].all(1)
    same_RL &= joins_R[:, None]  # the row above reads it
    own_RL = real_RL & ~same_RL
    row_T, column_T = own_RL.nonzero(as_tuple=True)
    count = len(row_T)
    # The last row down to here that reads this column by itself reads it for all below.
    reader_RL = torch.where(own_RL, torch.arange(len(ids_RL), device=device)[:, None], 0).cummax(0).values
    nodes_RL = (own_RL.flatten().cumsum(0).view_as(own_RL) - 1).gather(0, reader_RL).clamp(min=0)

    tree_T = ((~joins_R).cumsum(0) - 1)[row_T]
    sizes_N = torch.bincount(tree_T)
    sizes = sizes_N.tolist()
    width = max(sizes)
    if width > WIDEST:
        return None
    starts, rows = _packed(sizes, width)
    first_N = sizes_N.cumsum(0) - sizes_N
    slots_T = (torch.tensor(starts, device=device) - first_N)[tree_T] + torch.arange(count, device=device)

    before_TL = real_RL[row_T] & (torch.arange(length, device=device) <= column_T[:, None])
    within_TL = slots_T[nodes_RL[row_T]] % width
    seen_TS = torch.zeros(count, width + 1, dtype=torch.bool, device=device)
    seen_TS.scatter_(1, within_TL.where(before_TL, width), True)
    seen_SS = torch.eye(width, dtype=torch.bool, device=device).repeat(rows, 1)  # nobody sees nothing
    seen_SS[slots_T] = seen_TS[:, :width]

    nodes_BL = nodes_RL[row_B]
    real_BL = mask_BL.bool()
    shared = Shared(
        nodes_BL,
        parent_T=nodes_RL[row_T, (column_T - 1).clamp(min=0)],
        copies_T=torch.bincount(nodes_BL[real_BL], minlength=count),
        seen_NSS=seen_SS.unflatten(0, (rows, width)),
    )
    places_BL = torch.arange(batch * length, device=device).view(batch, length)
    source_T = torch.empty_like(slots_T).scatter_(0, nodes_BL[real_BL], places_BL[real_BL])
    positions_T = column_T - real_RL.int().argmax(1)[row_T]
    return Layout(batch, length, source_T, rows, width, slots_T, positions_T, shared=shared)


def _packed(sizes: list[int], width: int) -> tuple[list[int], int]:
    """Where each tree begins in a rectangle so wide, several in a row where they fit, and its rows: the widest first,
    each into the first row that has room."""
    starts, used = [0] * len(sizes), []
    for tree in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        row = next((i for i, taken in enumerate(used) if taken + sizes[tree] <= width), len(used))
        used += [0] * (row == len(used))
        starts[tree] = row * width + used[row]
        used[row] += sizes[tree]
    return starts, len(used)


def continued(x_BL: Tensor, cached: int, mask_BP: Tensor | None, positions_BL: Tensor | None) -> Layout:
    """The layout of a forward that goes on from `cached` tokens. `mask_BP` covers the cached and the new ones."""
    (batch, length), device = x_BL.shape[:2], x_BL.device
    total = cached + length
    if positions_BL is None:
        real_BP = torch.ones(batch, total, device=device) if mask_BP is None else mask_BP
        positions_BL = (real_BP.long().cumsum(1) - 1).clamp(min=0)[:, cached:]
    visible = None
    if length > 1:
        columns = torch.arange(total, device=device)
        visible = (columns[None] <= columns[cached:, None]).expand(batch, length, total)
    if mask_BP is not None:
        real = mask_BP.bool()[:, None].expand(batch, length, total)
        visible = real if visible is None else visible & real
    positions_T = positions_BL.expand(batch, length).flatten()
    return Layout(batch, length, None, batch, length, None, positions_T, visible, continues=True)
