"""Who owns the pages of a paged cache: a free list, reference counts, and full pages found again by what they hold.

Bookkeeping alone: knows no tensors and no model. Neighbour: `paged_engine` keeps a sequence's latents in the pages it
gets here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


class Pages:
    """`count` pages of `size` tokens each.

    A page nobody uses is free. If it was full when it was given back, it is remembered under a digest of all the tokens
    up to its end, and is the last to be used for something else, the longest unused first (prefix caching).
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._page_of: dict[bytes, int] = {}  # by digest
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered and unused

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def idle(self, pages: Sequence[int]) -> int:
        """How many of these are unused: to share them takes them from what is available."""
        return sum(page in self._idle for page in pages)

    def take(self) -> int:
        """A page for its first user."""
        if self._free:
            page = self._free.pop()
        else:
            assert self._idle, "take() without a page available"
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user of a page that is in use or remembered."""
        self._idle.pop(page, None)
        self._users[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less for each. A sequence's last ones are forgotten first: its beginning is likelier to return."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was given back more often than taken"
            if self._users[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def remember(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """The full ones of `pages` hold these tokens, for whoever begins with the same."""
        for digest, page in zip(self._digests(ids), pages, strict=False):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def find(self, ids: Sequence[int]) -> list[int]:
        """Remembered pages that hold the beginning of `ids`, as many as there are. To use one, `share` it."""
        found = []
        for digest in self._digests(ids):
            if digest not in self._page_of:
                break
            found.append(self._page_of[digest])
        return found

    def forget(self) -> None:
        """What pages hold is no longer what anyone should find: the weights have changed."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def _digests(self, ids: Sequence[int]):
        digest = b""
        for start in range(0, len(ids) - self.size + 1, self.size):
            digest = blake2b(digest + array("q", ids[start : start + self.size]).tobytes(), digest_size=16).digest()
            yield digest
