"""KV room in blocks, with freed blocks that stay usable as a prefix cache until reused.

Like vLLM's block pool: a paused request's full blocks keep their content until someone else needs
the room, so a short pause is cheap to undo. The oldest pause is overwritten first, from its end.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Counts blocks; identities do not matter for time.

    Args:
        blocks: size of the pool.
        block_tokens: tokens per block.
        keep_freed: whether freed blocks serve as a prefix cache.
    """

    def __init__(self, blocks: int, block_tokens: int, keep_freed: bool) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.free = blocks
        self._keep = keep_freed
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._kept_total = 0

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.block_tokens)

    def take(self, blocks: int) -> None:
        """Use free blocks; what they still cached is lost, oldest first."""
        self.free -= blocks
        while self._kept_total > self.free:
            request, kept = next(iter(self._kept.items()))
            lost = min(kept, self._kept_total - self.free)
            self._kept_total -= lost
            if lost == kept:
                del self._kept[request]
            else:
                self._kept[request] = kept - lost

    def give(self, blocks: int, request: int | None = None, full: int = 0) -> None:
        """Free blocks; ``full`` of them stay readable for ``request`` until reused."""
        self.free += blocks
        if self._keep and request is not None and full > 0:
            self._kept[request] = full
            self._kept_total += full

    def cached_tokens(self, request: int) -> int:
        """Tokens of a paused request that need no recomputation now."""
        return self._kept.get(request, 0) * self.block_tokens

    def claim(self, request: int) -> int:
        """Stop keeping a request's blocks (it resumes or is gone); returns the tokens found."""
        kept = self._kept.pop(request, 0)
        self._kept_total -= kept
        return kept * self.block_tokens


class PrefixIndex:
    """Which prompt prefixes of a trace are computed already: least recently used ids are dropped.

    Args:
        room: number of ids remembered.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._seen: OrderedDict[int, None] = OrderedDict()

    def hits(self, ids: tuple[int, ...]) -> int:
        """Length of the longest known prefix, in ids; then remember all of them."""
        count = 0
        for block in ids:
            if block not in self._seen:
                break
            count += 1
        for block in ids:
            self._seen[block] = None
            self._seen.move_to_end(block)
        while len(self._seen) > self._room:
            self._seen.popitem(last=False)
        return count
