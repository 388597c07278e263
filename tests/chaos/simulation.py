"""The deterministic simulation: one seed is one life of one cluster, on virtual time.

    python -m tests.chaos.simulation --seed N [-v]        run one, with -v every message
    python -m tests.chaos.simulation --seeds A:B [--jobs 2]
    python -m tests.chaos.simulation --small N --every K  a small scenario, with every kind of fault
                                                          at every K-th of its messages
    python -m tests.chaos.simulation --small N --strike KIND@MESSAGE [-v]     one of those

Real are the gateway's pools, sequencer and sessions and all of the workers but the model, the
network and the clock (tests.cluster_in_process). A failing seed prints itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time

from tests.chaos.faults import CONTROL, FRAME, NETWORK, PROCESS, Blow, applies
from tests.chaos.life import Life, Tally, live
from tests.chaos.scenario import Scenario, draw, small, struck


def systematic(seed: int, every: int) -> Tally:
    """A small scenario without a fault, then once more for each kind of fault at each message."""
    scenario = small(seed)
    life = Life(scenario)
    tally = life.live()
    for number, line in list(enumerate(life.faults.kinds, 1))[::every]:
        for kind in (*PROCESS, *NETWORK, *CONTROL, *FRAME):
            if applies(kind, line):
                tally.add(live(struck(scenario, Blow(number, kind))))
    return tally


def replay(scenario: Scenario, verbose: bool) -> bool:
    """One life for a reader. Whether it held."""
    life = Life(scenario, verbose)
    try:
        tally = life.live()
        print("\n".join([*life.faults.log, report(tally)]))
        return True
    except Exception as error:
        print("\n".join(life.faults.log))
        for told in life.history.told:
            print(f"{told.request.id}: {told.end} after {told.causes}, {len(told.tokens)} tokens")
        print(f"{scenario.name}: {type(error).__name__}: {error}")
        return False


def campaign(seeds: range, jobs: int) -> Tally:
    """Many seeds. Each of `jobs` processes takes every so-manieth of them."""
    if jobs == 1:
        tally = Tally()
        for seed in seeds:
            tally.add(live(draw(seed)))
        return tally
    command = [sys.executable, "-m", "tests.chaos.simulation", "--json"]
    shares = [seeds[job::jobs] for job in range(jobs)]
    running = [
        subprocess.Popen(
            [*command, "--seeds", f"{share.start}:{share.stop}:{share.step}"],
            stdout=subprocess.PIPE,
        )
        for share in shares
    ]
    tally = Tally()
    for process in running:
        out, _ = process.communicate()
        tally.add(Tally.read(json.loads(out)))
    return tally


def report(tally: Tally) -> str:
    pauses = sorted(tally.pauses) or [0.0]
    lines = [
        f"{tally.lives} lives, {tally.messages} messages, {tally.virtual_s:.0f} virtual seconds",
        *(
            f"{what}: " + (", ".join(f"{name} {n}" for name, n in counts.most_common()) or "none")
            for what, counts in (
                ("faults", tally.faults),
                ("recoveries", tally.recoveries),
                ("ends", tally.ends),
            )
        ),
        f"pauses: p50 {_quantile(pauses, 0.5):.3f} s, p99 {_quantile(pauses, 0.99):.3f} s, "
        f"longest {pauses[-1]:.3f} s",
        *(
            f"FAILED {what}\n    python -m tests.chaos.simulation {name} -v"
            for name, what in tally.failed
        ),
        f"{len(tally.failed)} failed",
    ]
    return "\n".join(lines)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.simulation")
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("-v", action="store_true", help="print every message")
    parser.add_argument("--seeds", type=_seeds, metavar="A:B", help="run these")
    parser.add_argument("--jobs", type=int, default=1, help="processes to run them in")
    parser.add_argument("--small", type=int, help="run this small scenario")
    parser.add_argument("--strike", type=_blow, metavar="KIND@K", help="a fault in it")
    parser.add_argument("--every", type=int, metavar="K", help="each fault at each K-th message")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(handlers=[logging.NullHandler()])
    began = time.monotonic()
    if options.seeds is not None:
        tally = campaign(options.seeds, options.jobs)
    elif options.every is not None:
        tally = systematic(options.small or 0, options.every)
    else:
        scenario = small(options.small) if options.small is not None else draw(options.seed or 0)
        if options.strike is not None:
            scenario = struck(scenario, options.strike)
        return 0 if replay(scenario, options.v) else 1
    took = time.monotonic() - began
    print(json.dumps(vars(tally)) if options.json else report(tally))
    if not options.json:
        print(f"{took:.1f} s, {tally.lives / took:.1f} lives a second")
    return 1 if tally.failed else 0


def _blow(text: str) -> Blow:
    kind, _, at = text.partition("@")
    return Blow(int(at), kind)


def _seeds(text: str) -> range:
    return range(*(int(part) for part in text.split(":")))


if __name__ == "__main__":
    sys.exit(main())
