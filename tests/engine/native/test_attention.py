from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine import native
from engine.native.attention import (
    attend_prompts,
    attend_prompts_reference,
    attend_singles,
    attend_singles_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1, 8), (7, 1, 16), (14, 2, 64), (8, 8, 80), (6, 3, 96), (16, 2, 128), (9, 1, 256)]
# A weight errs by what its score does, some log2(head_dim) roundings of a number of up to 8.
CLOSE = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(params=native.isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    native.use(request.param)
    yield
    native.set_threads(1)
    native.use(native.isas()[0])


@dataclass(frozen=True)
class Step:
    """Sequences on shuffled pages: for each (context, rows), its last rows are the step's."""

    q: Tensor
    keys: Tensor
    values: Tensor
    starts: Tensor
    contexts: Tensor
    table: Tensor
    block_size: int
    parts: list[tuple[Tensor, Tensor]]  # keys and values of each sequence, as the pages hold them

    @classmethod
    def of(
        cls,
        lengths: Sequence[tuple[int, int]],
        shape: tuple[int, int, int] = (14, 2, 64),
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> Step:
        heads, kv_heads, head_dim = shape
        random = torch.Generator().manual_seed(len(lengths) * 1000 + heads + block_size)
        needed = [-(-context // block_size) for context, _ in lengths]
        blocks = sum(needed) + 2
        pages = (2, blocks * block_size, kv_heads, head_dim)
        keys, values = torch.full(pages, float("nan"), dtype=dtype)  # what nobody wrote
        numbers = torch.randperm(blocks, generator=random)
        # What lies past a context is no block: it must not be looked up.
        garbage = torch.randint(-(2**31), 2**31, (len(lengths), max(needed) + 1), generator=random)
        table, parts, starts, used = garbage.int(), [], [0], 0
        for row, (context, rows), count in zip(table, lengths, needed, strict=True):
            row[:count] = numbers[used : used + count]
            used += count
            k, v = torch.randn((2, context, kv_heads, head_dim), generator=random).to(dtype)
            at = torch.arange(context)
            slots = row[at // block_size].long() * block_size + at % block_size
            keys[slots], values[slots] = k, v
            parts.append((k, v))
            starts.append(starts[-1] + rows)
        return cls(
            torch.randn((starts[-1], heads, head_dim), generator=random),
            keys,
            values,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([context for context, _ in lengths], dtype=torch.int32),
            table,
            block_size,
            parts,
        )

    def args(self, window: int) -> tuple[Tensor, Tensor, int, int, float]:
        return self.contexts, self.table, self.block_size, window, self.q.shape[2] ** -0.5

    def prompts(self, window: int = 0, attend: Callable[..., Tensor] = attend_prompts) -> Tensor:
        longest = int(self.starts.diff().max())
        args = self.args(window)
        return attend(self.q, self.keys, self.values, self.starts, *args, longest)

    def singles(self, window: int = 0, attend: Callable[..., Tensor] = attend_singles) -> Tensor:
        return attend(self.q, self.keys, self.values, *self.args(window))

    def alone(self, segment: int) -> Step:
        """One segment of it, in the same pages."""
        begin, end = self.starts[segment : segment + 2].tolist()
        only = slice(segment, segment + 1)
        return replace(
            self,
            q=self.q[begin:end],
            starts=torch.tensor([0, end - begin], dtype=torch.int32),
            contexts=self.contexts[only],
            table=self.table[only],
            parts=self.parts[only],
        )

    def expected(self, window: int = 0) -> Tensor:
        """In float64, from each sequence's own keys and values."""
        out = torch.zeros_like(self.q, dtype=torch.float64)
        for segment, (k, v) in enumerate(self.parts):
            rows = slice(*self.starts[segment : segment + 2].tolist())
            q = self.q[rows].double()
            count, heads, head_dim = q.shape
            k, v = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
            at = torch.arange(len(k))
            row = at[len(k) - count :, None]
            seen = at <= row
            if window:
                seen &= at > row - window
            weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
        return out


def assert_close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=CLOSE)


SINGLES = [(1, 1), (300, 1), (17, 1), (256, 1), (64, 1), (257, 1), (2, 1)]
PROMPTS = [(5, 5), (150, 90), (7, 1), (70, 6), (64, 64), (66, 2), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singles(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    step = Step.of(SINGLES, shape, 16, dtype)
    for window in (0, 1, 40, 280):
        assert_close(step.singles(window), step.expected(window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    step = Step.of(PROMPTS, shape, 16, dtype)
    for window in (0, 1, 40, 100):
        assert_close(step.prompts(window), step.expected(window))


@pytest.mark.parametrize("block_size", [1, 4, 16, 24, 32, 512])
def test_block_sizes(block_size: int) -> None:
    step = Step.of(SINGLES, (4, 2, 16), block_size)
    assert_close(step.singles(20), step.expected(20))
    step = Step.of(PROMPTS, (4, 2, 16), block_size)
    assert_close(step.prompts(20), step.expected(20))


@pytest.mark.parametrize("heads", range(1, 14))
def test_every_group(heads: int) -> None:
    step = Step.of(SINGLES[:3], (heads, 1, 24))
    assert_close(step.singles(), step.expected())
    step = Step.of(PROMPTS[:3], (heads, 1, 24))
    assert_close(step.prompts(), step.expected())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_lengths_far_apart(threads: int) -> None:
    native.set_threads(threads)
    step = Step.of([(1, 1), (5000, 1), (3, 1), (900, 1), (2, 1)], (4, 2, 32))
    assert_close(step.singles(), step.expected())
    step = Step.of([(3, 3), (1500, 700), (1, 1), (900, 2)], (4, 2, 32))
    assert_close(step.prompts(), step.expected())


def test_threads_change_no_bit() -> None:
    singles, prompts = Step.of(SINGLES), Step.of(PROMPTS)
    found = []
    for threads in (1, 2, 3):
        native.set_threads(threads)
        found.append((singles.singles(), prompts.prompts()))
    for one, other in zip(*found[:2], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*found[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [0, 50])
def test_company_changes_no_bit(window: int) -> None:
    singles, prompts = Step.of(SINGLES), Step.of(PROMPTS)
    together = singles.singles(window)
    for number in range(len(SINGLES)):
        assert torch.equal(singles.alone(number).singles(window)[0], together[number])
    together = prompts.prompts(window)
    for number in range(len(PROMPTS)):
        rows = slice(*prompts.starts[number : number + 2].tolist())
        assert torch.equal(prompts.alone(number).prompts(window), together[rows])


@pytest.mark.parametrize("window", [0, 50])
def test_cutting_a_prompt_changes_no_bit(window: int) -> None:
    whole = Step.of([(200, 200)])
    out = whole.prompts(window)
    for begin, end in ((0, 70), (70, 71), (71, 200)):
        part = replace(
            whole,
            q=whole.q[begin:end],
            starts=torch.tensor([0, end - begin], dtype=torch.int32),
            contexts=torch.tensor([end], dtype=torch.int32),
        )
        assert torch.equal(part.prompts(window), out[begin:end])


def test_segments_may_be_empty_or_absent() -> None:
    step = Step.of([(9, 4), (5, 0), (3, 3)])
    assert_close(step.prompts(), step.expected())
    nothing = replace(
        step, q=step.q[:0], starts=step.starts[:1], contexts=step.contexts[:0], table=step.table[:0]
    )
    args = nothing.args(0)
    assert attend_singles(nothing.q, nothing.keys, nothing.values, *args).shape == (0, 14, 64)
    out = attend_prompts(nothing.q, nothing.keys, nothing.values, nothing.starts, *args, 0)
    assert out.shape == (0, 14, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_of_one_sequence_stays_with_it(dtype: torch.dtype) -> None:
    for lengths, attend in (
        ([(3, 1), (400, 1), (16, 1)], Step.singles),
        ([(3, 2), (80, 8), (16, 1)], Step.prompts),
    ):
        for broken in ("keys", "values"):
            step = Step.of(lengths, dtype=dtype)
            theirs = int(step.table[1, 0]) * step.block_size
            getattr(step, broken)[theirs + 2] = float("nan")
            bad = attend(step).isnan().flatten(1).any(1)
            begin, end = step.starts[1:3].tolist()
            assert bad[begin:end].all()
            assert not bad[:begin].any() and not bad[end:].any()


def test_large_scores_do_not_overflow() -> None:
    for lengths, attend in (([(90, 1), (300, 1)], Step.singles), ([(90, 40)], Step.prompts)):
        step = Step.of(lengths)
        step = replace(step, q=step.q * 1e4)
        # One weight is 1 and the others nothing, unless two scores lie within their own rounding.
        torch.testing.assert_close(attend(step).double(), step.expected(), rtol=0, atol=5e-2)
        step = replace(step, q=step.q * 0)
        assert_close(attend(step), step.expected())


def test_pages_of_one_layer_among_others() -> None:
    step = Step.of(SINGLES, (4, 2, 16))
    wide = torch.full((2, step.keys.shape[0], 2, 2, 16), float("nan"))
    wide[0, :, 0], wide[1, :, 0] = step.keys, step.values
    apart = replace(step, keys=wide[0, :, 0], values=wide[1, :, 0])
    assert apart.keys.stride(0) == 2 * step.keys.stride(0)
    assert torch.equal(apart.singles(), step.singles())
    assert torch.equal(apart.prompts(), step.prompts())


def test_the_references_say_the_same() -> None:
    step = Step.of(SINGLES, (4, 2, 16), 4)
    assert_close(step.singles(30, attend_singles_reference), step.expected(30))
    step = Step.of([(9, 4), (5, 0), (3, 3)], (4, 2, 16), 4)
    assert_close(step.prompts(3, attend_prompts_reference), step.expected(3))


@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_refuses_a_head_size(head_dim: int) -> None:
    step = Step.of([(3, 1)], (2, 1, head_dim))
    with pytest.raises(ValueError, match=f"multiple of 8 up to 256, not {head_dim}"):
        step.singles()
    with pytest.raises(ValueError, match="multiple of 8"):
        step.prompts()


def test_refuses_what_it_would_misread() -> None:
    step = Step.of([(3, 1), (20, 1)])
    for wrong, match in (
        (replace(step, q=step.q.double()), "q must be"),
        (replace(step, q=step.q.transpose(0, 1).contiguous().transpose(0, 1)), "q must be"),
        (replace(step, q=step.q[:, :13].contiguous()), "cannot share"),
        (replace(step, keys=step.keys.half()), "must be alike"),
        (replace(step, keys=step.keys.double(), values=step.values.double()), "must be alike"),
        (replace(step, keys=step.keys.flip(2).transpose(0, 1)), "share|alike"),
        (replace(step, contexts=step.contexts.long()), "contexts must be"),
        (replace(step, table=step.table[:1]), "block_table must be"),
        (replace(step, block_size=0), "at least one token"),
    ):
        for attend in (Step.singles, Step.prompts):
            with pytest.raises(ValueError, match=match):
                attend(wrong)


def test_refuses_blocks_that_do_not_exist() -> None:
    step = Step.of([(3, 1), (40, 1)])
    for number in (-1, step.keys.shape[0] // step.block_size):
        table = step.table.clone()
        table[1, 0] = number
        wrong = replace(step, table=table)
        for attend in (Step.singles, Step.prompts):
            with pytest.raises(IndexError, match="segment 1, a context of 40"):
                attend(wrong)
            attend(wrong, 8)  # the window begins behind that block
    for context in (0, -5, step.table.shape[1] * step.block_size + 1):
        wrong = replace(step, contexts=torch.tensor([3, context], dtype=torch.int32))
        for attend in (Step.singles, Step.prompts):
            with pytest.raises(IndexError, match="segment 1"):
                attend(wrong)


def test_refuses_rows_that_do_not_exist() -> None:
    step = Step.of([(9, 4), (5, 5)])
    for starts in ([0, 4, 10], [0, 4, 3], [-1, 4, 9], [0, 10, 9]):
        wrong = replace(step, starts=torch.tensor(starts, dtype=torch.int32))
        with pytest.raises(IndexError, match="segment"):
            wrong.prompts()
