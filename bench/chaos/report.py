"""Report: all rounds of a run -> the table and the JSON."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.chaos.book import DIFFERENT, EQUAL
from bench.chaos.options import ChaosOptions
from bench.chaos.scene import Round

SHOWN: Final = 20
"""Broken promises that the table lists; the JSON has them all."""


@dataclass(frozen=True)
class Report:
    options: ChaosOptions
    asks: int
    rounds: Sequence[Round]
    own_errors: Sequence[str]

    @property
    def wrong(self) -> list[str]:
        broken = [f"{found.name}: {line}" for found in self.rounds for line in found.wrong]
        return broken + [f"logged by {line}" for line in self.own_errors]

    def table(self) -> str:
        plan = self.options.plan
        lines = [
            f"model {self.options.directory.name if plan.model else 'baton-tiny'}, "
            f"{plan.gateways} gateways, {plan.prefill} prefill + {plan.decode} decode workers, "
            f"{os.cpu_count()} cores, {self.asks} different answers, seed {self.options.seed}",
            "",
            f"{'round':<10}{'answers':>9}{'equal':>7}{'different':>11}{'failed':>8}"
            f"{'blows':>7}{'recoveries':>12}{'left over':>11}{'seconds':>9}",
        ]
        for found in self.rounds:
            verdicts = found.verdicts
            failed = verdicts.total() - verdicts[EQUAL] - verdicts[DIFFERENT]
            lines.append(
                f"{found.name:<10}{verdicts.total():>9}{verdicts[EQUAL]:>7}"
                f"{verdicts[DIFFERENT]:>11}{failed:>8}{len(found.blows):>7}"
                f"{found.recoveries.total():>12}{len(found.left):>11}{found.seconds:>9.0f}"
            )
        lines += ["", *self._spans(), "", *self._recoveries(), *self._facts()]
        broken = self.wrong
        lines += ["", f"broken promises: {len(broken)}", *broken[:SHOWN]]
        return "\n".join(lines)

    def _spans(self) -> list[str]:
        lines = [
            f"{'seconds':<50}{'blows':>7}{'pauses':>8}{'p50':>7}{'p99':>7}{'max':>7}"
            f"{'   noticed after p50':>20}{'p99':>7}{'max':>7}"
        ]
        for label, spans in self.spans().items():
            cells = [_cell(spans[kind].get(q)) for kind in ("pause", "noticed") for q in _QUANTILES]
            lines.append(
                f"{label:<50}{spans['blows']:>7}{spans['pause']['count']:>8}"
                f"{cells[0]}{cells[1]}{cells[2]}{'':>13}{cells[3]}{cells[4]}{cells[5]}"
            )
        return lines

    def spans(self) -> dict[str, dict[str, Any]]:
        """By kind of blow and role: the pauses that moved answers felt, and the time until no
        gateway counted on the worker, in seconds."""
        kinds = dict.fromkeys(
            (f"{found.name}: {blow.kind}, {blow.role}", (found.name, blow.kind, blow.role))
            for found in self.rounds
            for blow in found.blows
        )
        spans = {}
        for label, key in kinds:
            blows = [
                blow
                for found in self.rounds
                for blow in found.blows
                if (found.name, blow.kind, blow.role) == key
            ]
            spans[label] = {
                "blows": len(blows),
                "pause": quantiles(pause for blow in blows for pause in blow.pauses),
                "noticed": quantiles(blow.gone_s for blow in blows if blow.gone_s is not None),
            }
        return spans

    def _recoveries(self) -> list[str]:
        added: Counter[tuple[str, ...]] = Counter()
        for found in self.rounds:
            added.update(found.recoveries)
        return [
            f"recovered while {phase}, because {cause}: {count}"
            for (phase, cause), count in sorted(added.items())
        ]

    def _facts(self) -> list[str]:
        return [
            f"{found.name}: {what}: {value}"
            for found in self.rounds
            for what, value in found.facts.items()
        ]

    def to_json(self) -> dict[str, Any]:
        options = self.options
        plan = {key: value for key, value in asdict(options.plan).items() if key != "model"}
        return {
            "model": options.directory.name if options.plan.model else "baton-tiny",
            "machine": {
                "cores": os.cpu_count(),
                "system": f"{platform.system()} {platform.release()}",
                "python": platform.python_version(),
            },
            "cluster": plan,
            "counts": asdict(options.counts),
            "seed": options.seed,
            "width": options.width,
            "asks": self.asks,
            "rounds": [self._round(found) for found in self.rounds],
            "seconds": self.spans(),
            "own_errors": list(self.own_errors),
            "broken_promises": self.wrong,
        }

    def _round(self, found: Round) -> dict[str, Any]:
        ends = Counter(
            choice.finish
            for run in found.runs
            for choice in run.heard.said.choices.values()
            if choice.finish
        )
        return {
            "round": found.name,
            "seconds": round(found.seconds, 1),
            "answers": len(found.runs),
            "verdicts": dict(found.verdicts),
            "finishes": dict(ends),
            "answers_by_blows_under_way": dict(
                sorted(Counter(found.blows_at(run) for run in found.runs).items())
            ),
            "blows": dict(Counter(f"{blow.kind}, {blow.role}" for blow in found.blows)),
            "recoveries": {" / ".join(key): count for key, count in found.recoveries.items()},
            "facts": found.facts,
            "left_over": found.left,
        }


_QUANTILES: Final = ("p50", "p99", "max")


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Nearest rank: a value that was measured, never one between two."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}

    def rank(share: float) -> float:
        return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3)

    return {"count": len(ordered), "p50": rank(0.5), "p99": rank(0.99), "max": rank(1.0)}


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>7}"
