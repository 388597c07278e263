"""BlockPool against a model that keeps every block's state in the plainest way."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.errors import BlocksExhausted
from cluster.messages import Fingerprint
from engine.blocks import Block, BlockPool, Counts, block_keys, root_key

TOTAL = 7
KEYS = [bytes([letter]) for letter in b"abcdef"]


class PoolMachine(RuleBasedStateMachine):
    """The model: who holds what, which block each key finds, every generation ever seen."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL, 4)
        self.promised: list[list[Block]] = []
        self.owned: list[list[Block]] = []  # one list for each holder
        self.published: dict[bytes, Block] = {}
        self.given: set[Block] = set()

    def fresh(self, blocks: list[Block]) -> None:
        """A block handed out never had this generation before, and was held by nobody."""
        assert len({block.number for block in blocks}) == len(blocks)
        for block in blocks:
            assert block not in self.given
            assert block.number not in self.held_numbers()
            self.given.add(block)
            self.published = {k: b for k, b in self.published.items() if b.number != block.number}

    def held_numbers(self) -> set[int]:
        return {block.number for group in self.promised + self.owned for block in group}

    @rule(count=st.integers(0, TOTAL + 1), promised=st.booleans())
    def hand_out(self, count: int, promised: bool) -> None:
        before, available = self.pool.counts(), self.pool.available
        assert available == TOTAL - len(self.held_numbers())
        try:
            blocks = (self.pool.promise if promised else self.pool.take)(count)
        except BlocksExhausted:
            assert count > available
            assert self.pool.counts() == before
            return
        assert len(blocks) == count <= available
        self.fresh(blocks)
        (self.promised if promised else self.owned).append(blocks)

    @precondition(lambda self: self.promised)
    @rule(data=st.data(), kept=st.booleans())
    def settle(self, data: st.DataObject, kept: bool) -> None:
        blocks = self.promised.pop(data.draw(st.integers(0, len(self.promised) - 1)))
        if kept:
            self.pool.adopt(blocks)
            self.owned.append(blocks)
        else:
            self.pool.revoke(blocks)
            assert not any(self.pool.current(block) for block in blocks)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = self.owned[data.draw(st.integers(0, len(self.owned) - 1))]
        for block in blocks:
            self.pool.hold(block)
        self.owned.append(list(blocks))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.release(blocks)
        found = set(self.published.values())
        for block in blocks:
            alive = block in found or block.number in self.held_numbers()
            assert self.pool.current(block) == alive

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        held = sorted({block for group in self.owned for block in group})
        block = data.draw(st.sampled_from(held))
        known = [k for k, b in self.published.items() if b == block]
        if known and known != [key]:
            with pytest.raises(AssertionError, match="another key"):
                self.pool.publish(block, key)
            return
        self.pool.publish(block, key)
        self.published.setdefault(key, block)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def match(self, keys: list[bytes]) -> None:
        blocks = self.pool.match(keys)
        expected = []
        for key in keys:
            if key not in self.published:
                break
            expected.append(self.published[key])
        assert blocks == expected
        self.owned.append(blocks)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        """A handle that is not the block's current one, or in another state, is refused."""
        block = data.draw(st.sampled_from(sorted(self.given)))
        owned = {b for group in self.owned for b in group}
        promised = {b for group in self.promised for b in group}
        before = self.pool.counts()
        assert self.pool.writable([block]) == (block in promised)
        if block not in owned:
            for verb in (self.pool.hold, lambda b: self.pool.release([b])):
                with pytest.raises(AssertionError):
                    verb(block)
        if block not in promised:
            for many in (self.pool.adopt, self.pool.revoke):
                with pytest.raises(AssertionError):
                    many([block])
        assert self.pool.counts() == before

    @invariant()
    def adds_up(self) -> None:
        owned = {block.number for group in self.owned for block in group}
        promised = {block.number for group in self.promised for block in group}
        cached = {block.number for block in self.published.values()} - owned
        free = TOTAL - len(owned) - len(promised) - len(cached)
        assert self.pool.counts() == Counts(free, len(promised), len(owned), len(cached), TOTAL)
        for block in self.held_blocks():
            assert self.pool.current(block)

    def held_blocks(self) -> list[Block]:
        return [block for group in self.promised + self.owned for block in group]


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_eviction_takes_the_least_recently_used_and_the_end_of_a_chain_first() -> None:
    pool = BlockPool(4, 4)
    old, young = pool.take(2), pool.take(2)
    for block, key in zip(old + young, KEYS, strict=False):
        pool.publish(block, key)
    pool.release(old)
    pool.release(young)
    pool.take(1)
    assert pool.match(KEYS[:2]) == old[:1]
    assert pool.match(KEYS[2:4]) == young
    with pytest.raises(BlocksExhausted):
        pool.take(2)


def test_freed_memory_is_used_again_before_what_was_never_touched() -> None:
    pool = BlockPool(8, 4)
    pool.release(pool.take(3))
    assert [block.number for block in pool.take(4)] == [0, 1, 2, 3]


def test_releasing_twice_is_a_bug_that_says_so() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="is not owned"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="is not promised"):
        pool.adopt(pool.take(1))


ROOT = root_key(Fingerprint("c", "w"), b"salt")


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_keys_of_full_blocks_only_and_each_stands_for_all_before_it(block_size: int) -> None:
    tokens = list(range(50))
    keys = block_keys(tokens, block_size, ROOT)
    assert len(keys) == 50 // block_size
    assert Counter(keys).most_common(1)[0][1] == 1
    changed = block_keys([99, *tokens[1:]], block_size, ROOT)
    assert not set(keys) & set(changed)
    longer = block_keys([*tokens, 7], block_size, ROOT)
    assert longer[: len(keys)] == keys


def test_a_chain_goes_on_from_its_last_key() -> None:
    tokens = tuple(range(64))
    keys = block_keys(tokens, 16, ROOT)
    assert keys[1:] == block_keys(tokens[16:], 16, keys[0])


def test_large_token_ids_keep_all_their_bits() -> None:
    assert block_keys([2**32 - 1], 1, ROOT) != block_keys([2**31 - 1], 1, ROOT)


def test_roots_differ_by_model_and_tenant() -> None:
    roots = {
        root_key(Fingerprint(config, weights), salt)
        for config, weights, salt in [
            ("a", "bc", b""),
            ("ab", "c", b""),
            ("abc", "", b""),
            ("a", "b", b"c"),
            ("a", "bc", b"x"),
        ]
    }
    assert len(roots) == 5


def test_peek_says_what_match_would_do_and_does_nothing() -> None:
    pool = BlockPool(6, 4)
    keys = block_keys(range(12), 4, b"r")
    held = pool.take(2)
    for block, key in zip(held, keys, strict=False):
        pool.publish(block, key)
    pool.release(held[1:])
    before = pool.counts()
    assert pool.peek(keys) == (2, 1)
    assert pool.peek([]) == pool.peek(keys[2:]) == (0, 0)
    assert pool.counts() == before
