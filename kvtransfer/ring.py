"""Ring: which parts of a fixed piece of memory are in use. Numbers only, no memory."""

from __future__ import annotations

from bisect import bisect

ALIGNMENT = 64
"""A cache line, so that two regions never share one."""


class Ring:
    """Regions of `total` bytes, handed out lowest first.

    So a link whose peer keeps up uses the same few pages again and again, and they stay in the
    processor's cache, where a ring in the strict sense would walk through all of its memory.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: dict[int, int] = {}  # start -> stop
        self._free = [(0, total)] if total else []  # in order, no two of them touch

    def grow(self, total: int) -> None:
        """To so many bytes. None of them is in use yet."""
        assert not self._taken and total >= self.total
        self.total, self._free = total, [(0, total)]

    @property
    def taken(self) -> int:
        """How many regions are in use."""
        return len(self._taken)

    def take(self, size: int) -> int | None:
        """Where `size` bytes are free, theirs from now on; None where they are not."""
        needed = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= needed:
                rest = start + needed
                self._free[index : index + 1] = [(rest, stop)] if rest < stop else []
                self._taken[start] = rest
                return start
        return None

    def free(self, start: int) -> None:
        """Give back what `take` returned."""
        stop = self._taken.pop(start)
        index = bisect(self._free, (start,))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop))
