"""BlockPool: who holds which block. Numbers only, no tensors, so its rules are tested alone.

A block is in exactly one state at any time (rule R1):

    free ----take----> owned ----release, nobody left----> cached if published, else free
      \\---promise---> promised ----adopt----> owned         |    |
                         \\---revoke---> free                 |    `---evicted by take, promise---
                                        owned <----match-----'

Each block has a generation, raised whenever its content stops being valid, which is when it becomes
free or is evicted. So a Block is the right to one content, and a stale one is told at a glance.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from cluster.errors import BlocksExhausted
from cluster.messages import Fingerprint

KEY_BYTES = 16


class Block(NamedTuple):
    """`block_size` token slots of KV for all layers, with the content it was handed out for."""

    number: int
    generation: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How many blocks are in each state; the four add up to `total`."""

    free: int
    promised: int
    owned: int
    cached: int
    total: int


class BlockPool:
    """A fixed set of blocks and their holders. Owned by the step thread.

    Misuse (a block handed back twice, a stale or foreign one, the wrong state) is a bug of ours and
    raises AssertionError.
    """

    def __init__(self, total: int, block_size: int) -> None:
        assert total > 0 and block_size > 0, f"{total} blocks of {block_size} tokens"
        self.total = total
        self.block_size = block_size
        self._generations = [0] * total
        self._free = deque(range(total))
        self._promised: set[int] = set()
        self._holders: dict[int, int] = {}  # owned blocks: how many hold each
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keys: dict[int, bytes] = {}  # published blocks, owned or cached
        self._by_key: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks `take` or `promise` could hand out now."""
        return len(self._free) + len(self._cached)

    def counts(self) -> Counts:
        return Counts(
            free=len(self._free),
            promised=len(self._promised),
            owned=len(self._holders),
            cached=len(self._cached),
            total=self.total,
        )

    def generation(self, block: Block) -> int:
        """The generation that the block has now, whatever `block` says."""
        return self._generations[block.number]

    def current(self, block: Block) -> bool:
        """Whether the content that `block` was handed out for is still there."""
        return self.generation(block) == block.generation

    def writable(self, blocks: Iterable[Block]) -> bool:
        """Whether the network may write them: still promised, and to nobody else since."""
        promised, generations = self._promised, self._generations
        return all(
            number in promised and generations[number] == generation
            for number, generation in blocks
        )

    def held_alone(self, blocks: Iterable[Block]) -> int:
        """How many of these owned blocks would become available if one holder let all go."""
        return sum(self._holders[block.number] == 1 for block in blocks)

    def take(self, count: int) -> list[Block]:
        """`count` blocks, owned by the caller; all or none.

        Evicts the least recently used cached blocks when the free ones run out.
        Raises BlocksExhausted.
        """
        blocks = self._hand_out(count)
        for block in blocks:
            self._holders[block.number] = 1
        return blocks

    def promise(self, count: int) -> list[Block]:
        """`count` blocks for the network to write; all or none. Evicts and raises as `take`."""
        blocks = self._hand_out(count)
        self._promised.update(block.number for block in blocks)
        return blocks

    def adopt(self, blocks: Iterable[Block]) -> None:
        """Promised blocks become owned: their content is whole and no longer written."""
        for block in blocks:
            self._leave_promised(block)
            self._holders[block.number] = 1

    def revoke(self, blocks: Iterable[Block]) -> None:
        """Promised blocks become free: what was written to them is void."""
        for block in blocks:
            self._leave_promised(block)
            self._free_up(block.number)

    def hold(self, block: Block) -> None:
        """One more holder of an owned block."""
        self._check_owned(block)
        self._holders[block.number] += 1

    def release(self, blocks: Sequence[Block]) -> None:
        """One holder fewer of each; a block that nobody holds becomes cached, or free.

        Takes a sequence's blocks in their order: the last one ages first, because a cached block
        can only be found while those before it can.
        """
        for block in reversed(blocks):
            self._check_owned(block)
            self._holders[block.number] -= 1
            if self._holders[block.number]:
                continue
            del self._holders[block.number]
            if block.number in self._keys:
                self._cached[block.number] = None
            else:
                self._free_up(block.number)

    def peek(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """How many blocks `match` would find, and how many of these nobody holds now."""
        found = unheld = 0
        for key in keys:
            number = self._by_key.get(key)
            if number is None:
                break
            found += 1
            unheld += number in self._cached
        return found, unheld

    def match(self, keys: Iterable[bytes]) -> list[Block]:
        """The longest run of published blocks from the first key on; the caller now holds them."""
        matched: list[Block] = []
        for key in keys:
            number = self._by_key.get(key)
            if number is None:
                break
            self._cached.pop(number, None)
            self._holders[number] = self._holders.get(number, 0) + 1
            matched.append(Block(number, self._generations[number]))
        return matched

    def publish(self, block: Block, key: bytes) -> None:
        """Make a full owned block findable. Of two blocks with one key the first stays the one."""
        self._check_owned(block)
        known = self._keys.get(block.number)
        assert known in (None, key), f"{block} is published under another key"
        if key not in self._by_key:
            self._by_key[key] = block.number
            self._keys[block.number] = key

    def _hand_out(self, count: int) -> list[Block]:
        assert count >= 0, f"{count} blocks asked for"
        if count > self.available:
            raise BlocksExhausted(f"{count} blocks asked for, {self.available} available")
        while len(self._free) < count:
            number, _ = self._cached.popitem(last=False)
            del self._by_key[self._keys.pop(number)]
            self._free_up(number)
        numbers = [self._free.popleft() for _ in range(count)]
        return [Block(number, self._generations[number]) for number in numbers]

    def _free_up(self, number: int) -> None:
        self._generations[number] += 1
        self._free.appendleft(number)  # the next to go: its memory is warm, or there at all

    def _leave_promised(self, block: Block) -> None:
        assert self.writable([block]), f"{block} is not promised"
        self._promised.remove(block.number)

    def _check_owned(self, block: Block) -> None:
        assert block.number in self._holders and self.current(block), f"{block} is not owned"


def root_key(fingerprint: Fingerprint, salt: bytes) -> bytes:
    """Where a chain of block keys begins: equal only for the same model and the same tenant."""
    digest = blake2b(digest_size=KEY_BYTES, person=b"baton.prefix")
    for part in (fingerprint.config.encode(), fingerprint.weights.encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))  # keeps ("ab", "c") apart from ("a", "bc")
        digest.update(part)
    return digest.digest()


def block_keys(tokens: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """One key for each full block of `tokens`, which stands for it and all before it.

    Each is a blake2b of the block's ids (uint32, little-endian) keyed by the key before, the first
    one by `root`. To go on with a known chain, pass its last key as `root` and the tokens after it.
    """
    full = len(tokens) // block_size * block_size
    ids = array("I", tokens[:full])
    if sys.byteorder == "big":
        ids.byteswap()
    data, step = memoryview(ids).cast("B"), block_size * ids.itemsize
    keys: list[bytes] = []
    for start in range(0, len(data), step):
        root = blake2b(data[start : start + step], digest_size=KEY_BYTES, key=root).digest()
        keys.append(root)
    return keys
