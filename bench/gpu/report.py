"""What was found as lines to read: checks in short, times beside their limits, failures in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench.gpu.part import Found
from bench.gpu.setting import Row

_LINES_OF_ERROR: Final = 12
_SAID: Final = {"what", "us", "limit_us", "of_limit", "of_best_peer", "aim", "reached", "peers_us"}
_HIDDEN: Final = {"rate", "wrong"}


def one_line(found: Found) -> str:
    """Told as soon as a part has ended."""
    state = "ok" if found.sound else "FAILED"
    checks = sum("ok" in row for row in found.rows)
    return f"{found.part.name:<28}{state:<8}{found.seconds:6.1f} s  {checks} checks"


def table(found: Sequence[Found]) -> str:
    lines = ["", "== checks: the worst of each part"]
    lines += [_check_line(one) for one in found if any("ok" in row for row in one.rows)]
    lines += ["", "== times"]
    for one in found:
        rows = [row for row in one.rows if "ok" not in row]
        if rows:
            lines += [f"-- {one.part.name}", *map(_time_line, rows)]
    failures = [line for one in found for line in _failure(one)]
    if failures:
        lines += ["", "== FAILED", *failures]
    missed = [
        f"{one.part.name}: {row['what']}: {_reached(row):.2f} of {row['aim']:.2f}"
        for one in found
        for row in one.rows
        if row.get("reached") is False
    ]
    if missed:
        lines += ["", "== aims that were missed", *missed]
    return "\n".join(lines)


def _check_line(found: Found) -> str:
    rows = [row for row in found.rows if "ok" in row]
    worst = max(rows, key=_badness)
    state = "ok" if found.sound else "FAILED"
    numbers = f"{_short(worst['error'])} of {_short(worst['bound'])}"
    return (
        f"{found.part.name:<28}{state:<8}{len(rows):>3} checks  {numbers:<22}{worst['what'][:80]}"
    )


def _badness(row: Row) -> float:
    """How near to its bound an error is; what is no number is the worst."""
    if isinstance(row["error"], str) or not row["ok"]:
        return float("inf")
    return row["error"] / row["bound"] if row["bound"] else 0.0


def _time_line(row: Row) -> str:
    parts = [f"{row['what'][:64]:<64}"]
    if "us" in row:
        parts.append(f"{_time(row['us']):>10}")
    if row.get("limit_us"):
        parts.append(f"limit {_time(row['limit_us'])} = {row['of_limit']:.2f}")
    for name, each in row.get("peers_us", {}).items():
        parts.append(f"{name} {_time(each)}")
    if "of_best_peer" in row:
        parts.append(f"= {row['of_best_peer']:.2f} of the best")
    if "aim" in row:
        parts.append(f"aim {row['aim']:.2f} {'reached' if row['reached'] else 'MISSED'}")
    parts += [f"{key}={_short(row[key])}" for key in row if key not in _SAID | _HIDDEN]
    return "  ".join(parts)


def _reached(row: Row) -> float:
    return float(row["of_best_peer"] if "of_best_peer" in row else row["of_limit"])


def _failure(found: Found) -> Iterator[str]:
    for row in found.rows:
        if not row.get("ok", True):
            more = f" {row['wrong']}"[:400] if row.get("wrong") else ""
            error, bound = _short(row["error"]), _short(row["bound"])
            yield f"{found.part.name}: {row['what']}: {error}, allowed {bound}{more}"
    if found.error:
        yield f"{found.part.name}: "
        yield from (f"    {line}" for line in found.error.splitlines()[-_LINES_OF_ERROR:])


def _time(us: float) -> str:
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.2f} {unit}"
    return f"{us:.1f} us"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ",".join(f"{key}:{_short(each)}" for key, each in value.items())
    return str(value)
