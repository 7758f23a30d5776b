"""Forks without reading again: the last, half-filled block of a finished path's KV is kept and copied for its children.

vLLM's prefix cache hits whole blocks only, so that every child of a path computes up to a block of it anew: on steps of
16 tokens more than was generated. This connector hangs into vLLM's scheduler (in process, no worker half): it holds
the half-filled blocks of paths that ended a step, finds them by what they hold, and has them copied where a child
begins. Then a child computes one token: the last one, whose KV never existed; and a judge that reads a path again when
it has grown computes what is new. Knows nothing of requests and searches.
Neighbour: `vllm_engine`, which puts it in its place.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

SHARE = 4  # at most one in so many of the blocks is held for tails

Key = tuple[bytes, tuple[int, ...]]  # hash of the whole blocks before (with all that is before them), tokens after


class KVTails(KVConnectorBase_V1):
    """Tails of finished paths, the latest used last; held blocks count as in use, so nobody writes into them."""

    def __init__(self, scheduler: Any) -> None:  # not the base's, which wants a transfer between machines configured
        self._block_size = scheduler.block_size
        self._pool = scheduler.kv_cache_manager.block_pool
        self.preempted = 0  # sequences whose KV vLLM threw away to make room, so far
        self._most = self._pool.num_gpu_blocks // SHARE
        self._tails: dict[Key, Any] = {}
        self._found: dict[str, tuple[Any, int]] = {}  # by request, between its look-up and its blocks: (block, place)
        self._copies: list[KVCacheBlockCopy] = []  # of the step that is being scheduled
        scheduler.connector = self

    @staticmethod
    def fits(scheduler: Any) -> bool:
        """Whether the KV is of one kind and its whole blocks are found by their hashes: what the keys are made of."""
        return len(scheduler.kv_cache_config.kv_cache_groups) == 1 and scheduler.cache_config.enable_prefix_caching

    def reset_cache(self) -> bool:
        """Forget everything: the weights change, or the prefix cache is emptied."""
        self._shrink(0)
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Hold the last block of a path if it is filled in part. Its copies of the step before have run."""
        self.preempted += request.num_preemptions
        key = self._key(request, request.num_computed_tokens)
        if key[1]:
            self._drop(key)
            block = self._pool.blocks[block_ids[-1]]
            self._pool.touch([block])
            self._tails[key] = block
        # Blocks are wanted for running requests first.
        self._shrink(self._most if self._pool.get_num_free_blocks() > self._most // 2 else self._most // 4)
        return False, None

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens beyond the whole blocks that the prefix cache has are in a tail: the longest that fits.

        The last token is computed in any case: what comes next is read from it.
        """
        whole = num_computed_tokens // self._block_size
        if not self._tails or num_computed_tokens % self._block_size:
            return 0, False
        before, rest = self._key(request, min(request.num_tokens, (whole + 1) * self._block_size) - 1)
        for length in range(len(rest), 0, -1):
            key = before, rest[:length]
            if (block := self._tails.pop(key, None)) is not None:
                self._tails[key] = block
                self._found[request.request_id] = block, whole
                return length, False
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        block, whole = self._found.pop(request.request_id, (None, 0))
        if num_external_tokens:
            self._copies.append(KVCacheBlockCopy(block.block_id, blocks.get_block_ids()[0][whole]))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._copies:
            scheduler_output.kv_cache_block_copies = [*(scheduler_output.kv_cache_block_copies or ()), *self._copies]
            self._copies = []
        return KVConnectorMetadata()

    def _key(self, request: Any, tokens: int) -> Key:
        whole = tokens // self._block_size
        before = request.block_hashes[whole - 1] if whole else b""
        return before, tuple(request.all_token_ids[whole * self._block_size : tokens])

    def _drop(self, key: Key) -> None:
        if (block := self._tails.pop(key, None)) is not None:
            self._pool.free_blocks([block])

    def _shrink(self, most: int) -> None:
        while len(self._tails) > most:
            self._drop(next(iter(self._tails)))

    # The worker's half, which there is none of: the copies go with the scheduler's output.

    def start_load_kv(self, forward_context: Any, **_: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None: ...

    def wait_for_save(self) -> None: ...
