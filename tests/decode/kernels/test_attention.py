from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from decode.kernels.attention import attend_singles, attend_singles_reference
from decode.kernels.splits import Config, Splits, plan_splits

pytestmark = [
    pytest.mark.interpreted,
    # Triton 3.6's interpreter does so itself for each bound of tl.range.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

HUGE = 2**31 - 1
SMALL_TILES = Config(tile=16, warps=4, stages=3, programs=1)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # some units of the last place of about 1
AWKWARD = (0, 1, 15, 16, 17, 0, 0, 100, 300, 0)


@dataclass
class Step:
    """One token each of sequences with `contexts`. What must not be read is NaN, or a huge number:
    slots of nobody, of tokens past a context and of tokens before the window."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    contexts: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    window: int

    @classmethod
    def of(
        cls,
        contexts: tuple[int, ...],
        *,
        kv_heads: int = 2,
        group: int = 4,
        head_dim: int = 64,
        block_size: int = 16,
        window: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Step:
        random = torch.Generator().manual_seed(sum(contexts) + head_dim + group)
        widths = [-(-context // block_size) for context in contexts]
        free = (torch.randperm(sum(widths), generator=random) + 1).to(torch.int32)  # not 0
        table = torch.full((len(contexts), max(widths, default=0) + 2), HUGE, dtype=torch.int32)
        pages = torch.full(
            (2, (sum(widths) + 1) * block_size, kv_heads, head_dim), float("nan"), dtype=dtype
        )
        for n, context in enumerate(contexts):
            first = max(0, context - window) if window else 0
            seen = range(first // block_size, widths[n])
            table[n, seen.start : seen.stop] = free[: len(seen)]
            free = free[len(seen) :]
            tokens = torch.arange(first, context)
            slots = table[n][tokens // block_size].long() * block_size + tokens % block_size
            written = torch.randn(2, len(tokens), kv_heads, head_dim, generator=random)
            pages[:, slots] = written.to(dtype)
        q = torch.randn(len(contexts), kv_heads * group, head_dim, generator=random).to(dtype)
        lengths = torch.tensor(contexts, dtype=torch.int32)
        return cls(q, pages[0], pages[1], lengths, table, block_size, window)

    @property
    def arguments(self) -> tuple[Any, ...]:
        scale = self.q.shape[2] ** -0.5
        pages = (self.q, self.keys, self.values, self.contexts, self.block_table)
        return (*pages, self.block_size, self.window, scale)

    def plan(self, slices: int | None = None, config: Config | None = None) -> Splits:
        heads, head_dim = self.q.shape[1:]
        kv_heads = self.keys.shape[1]
        return plan_splits(
            self.contexts,
            heads,
            kv_heads,
            head_dim,
            self.q.dtype,
            self.window,
            config=config,
            slices=slices,
        )

    def attend(self, splits: Splits | None = None) -> torch.Tensor:
        """Into an output in which nothing is right yet."""
        out = torch.full_like(self.q, float("nan"))
        returned = attend_singles(*self.arguments, splits=splits, out=out)
        assert returned is out
        return out

    def check(self, splits: Splits | None = None) -> None:
        out, expected = self.attend(splits), attend_singles_reference(*self.arguments)
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("slices", [None, 1, 5, 64])
def test_contexts_of_any_length(slices: int | None, dtype: torch.dtype) -> None:
    step = Step.of(AWKWARD, dtype=dtype)
    step.check(step.plan(slices, SMALL_TILES if slices else None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 20])
def test_groups(group: int, dtype: torch.dtype) -> None:
    step = Step.of((33, 0, 80), group=group, dtype=dtype)
    step.check(step.plan(3, SMALL_TILES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    step = Step.of((33, 0, 80), head_dim=head_dim, dtype=dtype)
    step.check(step.plan(3, SMALL_TILES))


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("window", [0, 1, 8, 40, 1000])
def test_windows_start_anywhere_in_a_block(window: int, block_size: int) -> None:
    step = Step.of(AWKWARD, window=window, block_size=block_size)
    step.check()
    step.check(step.plan(4, SMALL_TILES))


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_kv_heads_of_an_odd_number(kv_heads: int) -> None:
    step = Step.of((40, 3), kv_heads=kv_heads)
    step.check(step.plan(3, SMALL_TILES))


@pytest.mark.parametrize("config", [Config(32, 4, 3, 1), Config(128, 4, 3, 1)])
def test_tiles_of_any_size(config: Config) -> None:
    step = Step.of((31, 32, 33, 129, 300), kv_heads=1)
    step.check(step.plan(7, config))


def test_more_pieces_than_a_merge_takes_at_once() -> None:
    step = Step.of((16 * 50 - 3,), kv_heads=1)
    step.check(step.plan(50, SMALL_TILES))


def test_the_answer_does_not_depend_on_the_cuts() -> None:
    step = Step.of(AWKWARD)
    whole = step.attend(step.plan(1, SMALL_TILES))
    for slices in (2, 3, 11, 40):
        cut = step.attend(step.plan(slices, SMALL_TILES))
        torch.testing.assert_close(cut, whole, rtol=2e-6, atol=2e-6)


def test_layers_share_a_plan() -> None:
    step = Step.of((100, 30))
    splits = step.plan(6, SMALL_TILES)
    step.check(splits)
    assert not splits.arrivals.any()
    step.keys, step.values = step.values, step.keys
    step.check(splits)


def test_a_plan_serves_contexts_that_change_in_place() -> None:
    """As when a graph is replayed: the plan is made again, into the same launch."""
    step, other = Step.of((5, 200, 0, 40)), Step.of((0, 7, 90, 0))
    buffer = torch.empty(4, dtype=torch.int32)
    for each in (step, other):
        buffer.copy_(each.contexts)
        each.contexts = buffer
        each.check(each.plan(3, SMALL_TILES))


def test_all_padding() -> None:
    step = Step.of((0, 0, 0))
    assert not step.attend().any()
    assert not step.attend(step.plan(2, SMALL_TILES)).any()


def test_no_rows() -> None:
    assert Step.of(()).attend().shape == (0, 8, 64)


def test_rows_within_wider_tensors() -> None:
    """q as a part of packed q, k, v; pages as a part of all layers'."""
    step = Step.of((40, 3))
    packed = torch.full((2, 8 + 4, 64), float("nan"))
    packed[:, :8] = step.q
    layers = torch.full((len(step.keys), 2, 2, 64), float("nan"))
    layers[:, 0], layers[:, 1] = step.keys, step.values
    expected = step.attend()
    step.q, step.keys, step.values = packed[:, :8], layers[:, 0], layers[:, 1]
    out = attend_singles(*step.arguments)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_of_one_sequence_stays_with_it() -> None:
    step = Step.of((2, 100, 40))
    theirs = step.block_table[1, 3].item() * step.block_size
    step.keys[theirs] = float("nan")
    for slices in (1, 5):
        out = step.attend(step.plan(slices, SMALL_TILES))
        assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_scores_too_large_for_an_exponential() -> None:
    step = Step.of((100,))
    step.q *= 1000
    step.check(step.plan(4, SMALL_TILES))


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("slices", [1, 2, 5, 13, 64])
@pytest.mark.parametrize(
    "contexts", [AWKWARD, (1000,), (0, 0, 1000), (1,) * 37, (0,), (16, 16, 16, 16)], ids=str
)
def test_slices_follow_one_another(contexts: tuple[int, ...], slices: int, window: int) -> None:
    spans = [min(context, window or context) for context in contexts]
    tiles = [(n, tile) for n, span in enumerate(spans) for tile in range(-(-span // 16))]
    lengths = torch.tensor(contexts, dtype=torch.int32)
    splits = plan_splits(
        lengths, 4, 2, 64, torch.float16, window, slices=slices, config=SMALL_TILES
    )
    shares = splits.shares.tolist()
    share = -(-len(tiles) // slices) or 1
    assert [mine[2] for mine in shares] == [
        len(tiles[start : start + share]) for start in range(0, slices * share, share)
    ]
    for number, (segment, skip, count, full, context) in enumerate(shares):
        assert full == share
        if count:
            assert (segment, skip) == tiles[number * share]
            assert context == contexts[segment]
    assert not splits.arrivals.any()


def test_short_contexts_are_not_cut_small() -> None:
    lengths = torch.tensor([700], dtype=torch.int32)
    splits = plan_splits(lengths, 8, 2, 128, torch.float16, 0)
    cuts = [count * splits.config.tile for _, _, count, _, _ in splits.shares.tolist() if count]
    assert len(cuts) > 1
    assert cuts[0] == 256


def wrong(**changes: Any) -> tuple[Any, ...]:
    """Good arguments but for the changes."""
    step = Step.of((40, 3))
    names = ("q", "keys", "values", "contexts", "block_table", "block_size", "window", "scale")
    return tuple({**dict(zip(names, step.arguments, strict=True)), **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 8, 72)}, "head_dim 72"),
        ({"q": torch.zeros(2, 8, 64, dtype=torch.float64)}, "torch.float64"),
        ({"q": torch.zeros(2, 7, 64)}, "7 query heads"),
        ({"q": torch.zeros(2, 256, 64)}, "128 query heads"),
        ({"q": torch.zeros(2, 8, 64, dtype=torch.float16)}, "the pages are"),
        ({"q": torch.zeros(2, 64, 8).transpose(1, 2)}, "q must have no gaps"),
        ({"q": torch.zeros(3, 8, 64)}, "3 rows"),
        ({"keys": torch.zeros(4, 2, 64)}, "differ"),
        ({"contexts": torch.tensor([40, 3])}, "int32"),
        ({"block_table": torch.zeros(2, 4)}, "block_table must be int32"),
        ({"block_size": 4}, "block_size 4"),
        ({"window": -1}, "window"),
        ({"block_table": torch.zeros(2, 4, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend_singles(*wrong(**changes))


def test_values_laid_out_unlike_keys_are_refused() -> None:
    step = Step.of((40, 3))
    step.values = torch.stack([step.values, step.values], 1)[:, 0]
    with pytest.raises(ValueError, match="strides"):
        attend_singles(*step.arguments)


@pytest.mark.parametrize(
    "out", [torch.zeros(2, 8, 80), torch.zeros(2, 64, 8).mT, torch.zeros(2, 8, 64).half()]
)
def test_an_output_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="out must be"):
        attend_singles(*wrong(), out=out)


@pytest.mark.parametrize("changes", [{"window": 8}, {"contexts": torch.tensor([40, 3]).int()}])
def test_a_plan_for_something_else_is_refused(changes: dict[str, Any]) -> None:
    step = Step.of((40, 3))
    arguments = wrong(contexts=step.contexts)
    good = dict(zip(("q", "keys", "values", "contexts"), arguments, strict=False))
    changed = {**good, **changes}
    with pytest.raises(ValueError, match="splits are of 2 contexts"):
        attend_singles(
            changed["q"],
            changed["keys"],
            changed["values"],
            changed["contexts"],
            step.block_table,
            16,
            changes.get("window", 0),
            0.125,
            splits=step.plan(),
        )
