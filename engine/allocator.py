"""Allocator: gives sequences their blocks, those of the prefix cache first."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import BlocksExhausted
from cluster.messages import Request
from engine.blocks import BlockPool, block_keys
from engine.sequence import Sequence


class Allocator:
    """Stands between sequences and the BlockPool. Owned by the step thread.

    `root` makes the first key of a tenant's hash chain from its salt. A prefix-cache hit always
    leaves at least one token to compute: the last one's logits are what a step is for. Without
    `caching` nothing is looked up or published.
    """

    def __init__(
        self, pool: BlockPool, root: Callable[[bytes], bytes], caching: bool = True
    ) -> None:
        self._pool = pool
        self._root = root
        self._caching = caching

    def admit(self, sequence: Sequence, spare: int = 0) -> None:
        """Blocks for all its tokens, leaving `spare` available. Raises BlocksExhausted."""
        size = self._pool.block_size
        reusable = (len(sequence.tokens) - 1) // size if self._caching else 0
        matched = self._pool.match(self._keys(sequence, reusable)[:reusable])
        missing = -(-len(sequence.tokens) // size) - len(matched)
        if missing + spare > self._pool.available:
            self._pool.release(matched)
            raise BlocksExhausted
        sequence.blocks = matched + self._pool.take(missing)
        sequence.published = len(matched)
        sequence.computed = len(matched) * size
        if sequence.scheduled is None:  # what an evicted one finds again was its own work
            sequence.cached_tokens = sequence.computed

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Blocks for its first `tokens` tokens. Raises BlocksExhausted, took none."""
        missing = sequence.blocks_for(tokens, self._pool.block_size)
        if missing:
            sequence.blocks += self._pool.take(missing)

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks that are full by now findable for later sequences."""
        full = min(sequence.computed, sequence.known) // self._pool.block_size
        if full <= sequence.published or not self._caching:
            return
        keys = self._keys(sequence, full)
        for number in range(sequence.published, full):
            self._pool.publish(sequence.blocks[number], keys[number])
        sequence.published = full

    def free(self, sequence: Sequence) -> None:
        """Give all its blocks back; those published stay cached. It may be admitted again."""
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.published = 0
        sequence.computed = 0

    def prompt_keys(self, request: Request) -> list[bytes]:
        """What the prefix cache knows the request's full blocks by; nothing without caching."""
        if not self._caching:
            return []
        return block_keys(request.tokens, self._pool.block_size, self._root(request.salt))

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of at least its first `count` full blocks; the chain grows with the tokens."""
        size = self._pool.block_size
        if len(sequence.keys) < count:
            done = len(sequence.keys)
            last = sequence.keys[-1] if done else self._root(sequence.request.salt)
            full = sequence.known // size * size
            sequence.keys += block_keys(sequence.tokens[done * size : full], size, last)
        return sequence.keys
