from __future__ import annotations

import io

from bench.progress import Progress


class Terminal(io.StringIO):
    writes = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


def test_counts_and_failures_on_a_terminal() -> None:
    out = Terminal()
    progress = Progress(4, out=out)
    for ok in (True, False, True, True):
        progress.step(ok)
    progress.close()
    last = out.getvalue().split("\r")[-1]
    assert last == f"[{'#' * 30}] 4/4, 1 failed\n"


def test_at_most_a_hundred_and_one_writes() -> None:
    out = Terminal()
    progress = Progress(5000, out=out)
    for _ in range(5000):
        progress.step(True)
    assert out.writes <= 101 and "5000/5000" in out.getvalue()


def test_silent_in_a_file_when_disabled_and_for_nothing() -> None:
    for progress, out in (
        (Progress(1, out=(file := io.StringIO())), file),
        (Progress(1, enabled=False, out=(disabled := Terminal())), disabled),
        (Progress(0, out=(nothing := Terminal())), nothing),
    ):
        progress.step(True)
        progress.close()
        assert out.getvalue() == ""
