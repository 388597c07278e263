"""What became of an overloaded cluster's requests: one Call each, one Phase per rate, one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.client import Record
from bench.report import percentile


@dataclass
class Call:
    """One request and what became of it. `seconds` is until a refusal was read."""

    record: Record
    status: int = 0
    retry_after: str = ""
    seconds: float = 0.0


@dataclass
class Phase:
    """What was sent at one rate, and what came of it."""

    name: str
    rate: float  # requests per second that were sent; 0: at once
    calls: list[Call] = field(default_factory=list)
    duration: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """How many, and how long: p50, p99 and the longest."""
        accepted = [call.record for call in self.calls if call.status == 200]
        refused = [call for call in self.calls if call.status in (429, 503)]
        said = [call for call in refused if call.retry_after.isdigit()]
        return {
            "rate_per_s": round(self.rate, 2),
            "sent": len(self.calls),
            "accepted": len(accepted),
            "answered_per_s": round(sum(r.ok for r in accepted) / self.duration, 2),
            "broken": sum(not record.ok for record in accepted),
            "other_errors": len(self.calls) - len(accepted) - len(refused),
            "ttft_ms": _spread([record.ttft for record in accepted]),
            "tpot_ms": _spread([record.tpot for record in accepted if record.output_tokens > 1]),
            "refused": len(refused),
            "refused_with_retry_after": len(said),
            "retry_after_s": _spread([float(call.retry_after) for call in said], 1.0),
            "refusal_ms": _spread([call.seconds for call in refused]),
        }


def _spread(values: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    ordered = sorted(values)
    points = {"p50": 50.0, "p99": 99.0, "max": 100.0}
    return {name: round(percentile(ordered, at) * scale, 1) for name, at in points.items()}


def table(result: dict[str, Any]) -> str:
    """What the numbers say, in lines."""
    phases, options = result["phases"], result["options"]
    lines = [
        f"{'':<10}{'sent/s':>8}{'sent':>6}{'let in':>8}{'TTFT p50':>10}{'p99':>8}"
        f"{'TPOT p50':>10}{'p99':>8}"
    ]
    for name, of in phases.items():
        lines.append(
            f"{name:<10}{of['rate_per_s']:>8}{of['sent']:>6}{of['accepted']:>8}"
            f"{of['ttft_ms']['p50']:>10}{of['ttft_ms']['p99']:>8}"
            f"{of['tpot_ms']['p50']:>10}{of['tpot_ms']['p99']:>8}"
        )
    beyond, memory = phases["beyond"], result["gateway_rss_mib"]
    lines += [
        f"{options['times']:g} times the capacity: "
        f"{beyond['accepted']} of {beyond['sent']} let in, "
        f"{beyond['answered_per_s']} answered a second of {phases['capacity']['answered_per_s']}; "
        f"{beyond['broken']} broken",
        f"refused: {beyond['refused']}, {beyond['refused_with_retry_after']} with Retry-After, "
        f"after {beyond['refusal_ms']['p50']} ms (p50), {beyond['refusal_ms']['p99']} ms (p99)",
        f"gateway: {memory['before']} MiB before, {memory['most']} at most, "
        f"{memory['after']} after",
    ]
    return "\n".join(lines)
