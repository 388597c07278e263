"""A GPU whose memory is the host's: what is queued is done at once, its marks pass when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from engine.cuda_staging import gather_plainly, scatter_plainly


class FakeMark:
    """Passes when its device is not `late`, when it is told to, or when somebody waits for it."""

    def __init__(self, over: bool) -> None:
        self.over = over
        self.waited = False
        self.error: Exception | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.over

    def wait(self) -> None:
        self.waited = self.waited or not self.over
        self.over = True


class FakeDevice:
    def __init__(self, late: bool = False) -> None:
        self.device = torch.device("cpu")
        self.late = late
        self.marks: list[FakeMark] = []  # in the order of making
        self.pinned_bytes = 0
        self.gathers = 0
        self.kept = 0
        self.asides = 0
        self.before_gather: Callable[[], None] = lambda: None

    def mark(self) -> FakeMark:
        self.marks.append(FakeMark(not self.late))
        return self.marks[-1]

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield
        self.asides -= 1

    def pinned(self, size: int) -> torch.Tensor:
        self.pinned_bytes += size
        return torch.empty(size, dtype=torch.uint8)

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept += 1

    def gather(self, pages: torch.Tensor, slots: torch.Tensor, heads: range | None) -> torch.Tensor:
        assert self.asides, "a gather behind the steps"
        self.before_gather()
        self.gathers += 1
        return gather_plainly(pages, slots, heads)

    def scatter(
        self, pages: torch.Tensor, slots: torch.Tensor, wire: torch.Tensor, heads: range | None
    ) -> None:
        assert not self.asides, "a scatter beside the steps"
        scatter_plainly(pages, slots, wire, heads)
