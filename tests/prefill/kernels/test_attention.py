"""attend_prompts under Triton's interpreter; bfloat16 is silently wrong there, so not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prefill.kernels.attention import Config, attend_prompts, attend_prompts_reference

pytestmark = pytest.mark.interpreted

SMALL = Config(block_m=16, block_n=16, warps=4, stages=2)
NOWHERE = 2**30  # a block number that nobody may look up: the address would not exist


@dataclass
class Step:
    """Chunks of several sequences on shuffled pages; NaN in every slot that no row may read."""

    q: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    contexts: Tensor
    block_table: Tensor
    block_size: int
    window: int
    clean: tuple[Tensor, Tensor]
    """The pages without the NaN that stands for what has left the window."""

    @classmethod
    def of(
        cls,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        window: int = 0,
    ) -> Step:
        """`shapes`: for each sequence the tokens before its chunk, and the rows of the chunk."""
        random = torch.Generator().manual_seed(heads * 1000 + len(shapes))
        needed = [-(-(before + rows) // block_size) for before, rows in shapes]
        numbers = torch.randperm(sum(needed) + 2, generator=random).tolist()
        slots = len(numbers) * block_size
        pages = torch.full((2, slots, kv_heads, head_dim), float("nan"), dtype=dtype)
        table = torch.full((len(shapes), max(needed) + 1), NOWHERE, dtype=torch.int32)
        gone: list[Tensor] = []
        for number, (before, rows) in enumerate(shapes):
            blocks = [numbers.pop() for _ in range(needed[number])]
            table[number, : len(blocks)] = torch.tensor(blocks)
            token = torch.arange(before + rows)
            at = (
                torch.tensor(blocks, dtype=torch.int64)[token // block_size] * block_size
                + token % block_size
            )
            written = torch.randn((2, len(at), kv_heads, head_dim), generator=random)
            pages[:, at] = written.to(dtype)
            if window:
                unseen = max(before - window + 1, 0) // block_size
                gone += [
                    block * block_size + i for block in blocks[:unseen] for i in range(block_size)
                ]
        clean = pages.clone()
        for slots_left in gone:
            pages[:, slots_left] = float("nan")
        counts = torch.tensor([0] + [rows for _, rows in shapes])
        return cls(
            torch.randn((int(counts.sum()), heads, head_dim), generator=random).to(dtype),
            pages[0],
            pages[1],
            counts.cumsum(0).to(torch.int32),
            torch.tensor([before + rows for before, rows in shapes], dtype=torch.int32),
            table,
            block_size,
            window,
            (clean[0], clean[1]),
        )

    def attend(self, config: Config = SMALL, out: Tensor | None = None) -> Tensor:
        return attend_prompts(
            self.q,
            self.keys,
            self.values,
            self.starts,
            self.contexts,
            self.block_table,
            self.block_size,
            self.window,
            self.q.shape[2] ** -0.5,
            self.q.shape[0],
            out=out,
            config=config,
        )

    def expected(self) -> Tensor:
        """In float64."""
        return attend_prompts_reference(
            self.q.double(),
            *self.clean,
            self.starts,
            self.contexts,
            self.block_table,
            self.block_size,
            self.window,
            self.q.shape[2] ** -0.5,
        )


def assert_right(out: Tensor, expected: Tensor) -> None:
    """Within what the dtype allows: weights and the result are rounded to it, sums are float32."""
    unit = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=4 * unit, atol=8 * unit)


CHUNKS = {
    "one token": [(0, 1)],
    "one token after many": [(100, 1)],
    "a block but one": [(0, 15)],
    "a block and one": [(0, 17)],
    "after one": [(1, 17)],
    "after a block": [(16, 33)],
    "after two but one": [(31, 15)],
    "several": [(0, 3), (31, 17), (0, 0), (100, 5), (16, 1)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 1, 8, 40])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_chunks_and_windows(chunks: list[tuple[int, int]], window: int, dtype: torch.dtype) -> None:
    step = Step.of(chunks, dtype, window=window)
    assert_right(step.attend(), step.expected())


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (7, 1), (14, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_heads(heads: tuple[int, int], head_dim: int) -> None:
    step = Step.of([(0, 5), (16, 17)], torch.float16, *heads, head_dim)
    assert_right(step.attend(), step.expected())


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_blocks_against_steps(block_n: int, block_size: int, window: int) -> None:
    """A step of keys that is narrower than a block, as wide, and spans several."""
    step = Step.of([(70, 20), (0, 37)], block_size=block_size, window=window)
    assert_right(step.attend(replace(SMALL, block_n=block_n)), step.expected())


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("block_n", [16, 32])
def test_descriptors(block_n: int, window: int) -> None:
    step = Step.of([(70, 20), (0, 37), (3, 1)], torch.float16, block_size=32, window=window)
    assert_right(step.attend(replace(SMALL, block_n=block_n, descriptors=True)), step.expected())


def test_more_segments_than_are_looked_at_in_one_go() -> None:
    step = Step.of([(number % 7, number % 3) for number in range(70)])
    assert_right(step.attend(), step.expected())


def test_nothing_but_empty_chunks() -> None:
    step = Step.of([(3, 0), (0, 0)])
    assert step.attend().shape == (0, 4, 64)


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    """The same rows alone and in company, to the last bit."""
    step = Step.of([(31, 17), (0, 3)])
    alone = replace(step, q=step.q[:17], starts=step.starts[:2], contexts=step.contexts[:1])
    alone.block_table = step.block_table[:1]
    assert torch.equal(step.attend()[:17], alone.attend())


def test_rows_within_a_wider_tensor() -> None:
    """As when q, k and v come out of one product; what follows the last segment stays."""
    step = Step.of([(4, 5), (0, 2)])
    expected = step.expected()
    rows, heads, head_dim = step.q.shape
    packed = torch.full((rows + 3, heads + 2, head_dim), float("nan"))
    packed[:rows, :heads] = step.q
    step.q = packed[:, :heads]
    out = torch.full((rows + 3, heads, head_dim), 7.0)
    assert step.attend(out=out) is out
    assert_right(out[:rows], expected)
    assert (out[rows:] == 7.0).all()


def refused(step: Step, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step.attend()


def test_refusals_name_the_fault() -> None:
    step = Step.of([(0, 5)])
    refused(replace(step, q=step.q.half()), "q is torch.float16, keys torch.float32")
    refused(replace(step, q=step.q[:, :3]), "3 query heads cannot share 2 KV heads")
    refused(replace(step, q=step.q[:, :, :32]), "do not match")
    refused(replace(step, q=step.q.mT.contiguous().mT), "contiguous along")
    refused(replace(step, values=step.values[1:]), "not laid out as keys")
    refused(replace(step, contexts=step.contexts.long()), "must be int32")
    refused(replace(step, starts=step.starts[1:]), "do not fit 1 contexts")
    refused(replace(step, block_table=step.block_table.mT), "do not fit|contiguous")
    refused(replace(step, window=-1), "window -1")
