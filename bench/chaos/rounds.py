"""The rounds that strike processes: kill, stop, drain, gateway, degrade.

Each takes a Scene and gives back a Round: what was struck, what every client heard, and which
promises were broken. Workers that die are started again, as a supervisor would.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from typing import Final

from bench.chaos.book import EQUAL
from bench.chaos.scene import TWO_KILLED, Blow, Round, Scene, all_over
from bench.chaos.traffic import Run, Traffic
from cluster.messages import DECODE, PREFILL

TWICE: Final = 0.1
"""Share of the kills that do not wait for the answers of the kill before: those may lose two
workers, and two are the most that a request gets."""

SHORT_STOP_S: Final = 0.4
LONG_STOP_S: Final = (3.0, 5.0)

NO_DECODE: Final = frozenset({"no_workers", "worker_lost"})
FALLBACK: Final = "x-baton-fallback"


async def kill(scene: Scene, streams: int) -> Round:
    """kill -9 of a random worker at a random token of a random answer, until all are heard."""
    async with scene.round("kill") as found:
        traffic = scene.traffic()
        found.runs = traffic.runs
        async with traffic.flowing(streams), asyncio.TaskGroup() as mourners:
            await _keep_killing(scene, traffic, found, mourners)
        await scene.house.whole()
    found.judge(found.killed_two)
    found.facts["answered 500 after losing two workers"] = found.verdicts[TWO_KILLED]
    return found


async def _keep_killing(
    scene: Scene, traffic: Traffic, found: Round, mourners: asyncio.TaskGroup
) -> None:
    """As long as there is traffic. One of each role stays up, so that nothing has to wait."""
    house, rng = scene.house, scene.rng
    down: set[str] = set()

    async def mourn(blow: Blow) -> None:
        down.add(blow.victim)
        blow.gone_s = await house.gone(blow.victim, blow.incarnation)
        await house.again(blow.victim, blow.incarnation)
        down.remove(blow.victim)

    while await traffic.moment():
        victim = rng.choice([name for name in house.workers() if name not in down])
        if not set(house.workers(house.roles[victim])) - down - {victim}:
            continue
        hit = list(traffic.live)
        blow = await scene.strike(victim, "kill -9", signal.SIGKILL)
        found.blows.append(blow)
        mourners.create_task(mourn(blow))
        if rng.random() >= TWICE:
            await all_over(hit)


async def stop(scene: Scene, short: int, long: int) -> Round:
    """SIGSTOP: a short one moves nothing; a long one does, and its worker comes back as it was."""
    async with scene.round("stop") as found:
        traffic = scene.traffic()
        found.runs = traffic.runs
        async with traffic.flowing():
            async with scene.recovered() as moved:
                for _ in range(short):
                    await _stop_shortly(scene, traffic, found)
            found.require(not moved, f"{SHORT_STOP_S:g} s of SIGSTOP moved answers: {dict(moved)}")
            for _ in range(long):
                await _stop_for_long(scene, traffic, found)
    found.judge()
    return found


async def _stop_shortly(scene: Scene, traffic: Traffic, found: Round) -> None:
    await traffic.moment()
    hit, victim = list(traffic.live), scene.rng.choice(scene.house.workers())
    blow = await scene.strike(victim, f"SIGSTOP {SHORT_STOP_S:g} s", signal.SIGSTOP)
    found.blows.append(blow)
    await asyncio.sleep(SHORT_STOP_S)
    scene.house.signal(victim, signal.SIGCONT)
    await all_over(hit)
    felt = [run.heard.pause(blow.at, blow.at + SHORT_STOP_S) for run in hit]
    blow.pauses.append(max(felt, default=0.0))


async def _stop_for_long(scene: Scene, traffic: Traffic, found: Round) -> None:
    house = scene.house
    await traffic.moment()
    hit, victim = list(traffic.live), scene.rng.choice(house.workers())
    blow = await scene.strike(victim, "SIGSTOP {:g}-{:g} s".format(*LONG_STOP_S), signal.SIGSTOP)
    found.blows.append(blow)
    blow.gone_s = await house.gone(victim, blow.incarnation)
    await asyncio.sleep(blow.at + scene.rng.uniform(*LONG_STOP_S) - time.perf_counter())
    house.signal(victim, signal.SIGCONT)
    await house.whole()
    now = await house.incarnation(victim)
    found.require(now == blow.incarnation, f"{victim} came back as another start of itself")
    await all_over(hit)


async def drain(scene: Scene, victims: Sequence[str]) -> Round:
    """SIGTERM to these in turn, each started again: a rolling restart under load."""
    async with scene.round("drain") as found:
        house, traffic = scene.house, scene.traffic()
        found.runs = traffic.runs
        async with traffic.flowing():
            for victim in victims:
                blow = await scene.strike(victim, "SIGTERM", signal.SIGTERM)
                found.blows.append(blow)
                status = await house.ended(victim)
                found.require(status == 0, f"{victim} ended with {status} after SIGTERM")
                await house.again(victim, blow.incarnation)
    found.judge()
    return found


async def gateway(scene: Scene, times: int) -> Round:
    """kill -9 of one of two gateways: answers of the other never notice."""
    async with scene.round("gateway") as found:
        house = scene.house
        dead, other = "gateway-1", house.gateways["gateway-0"]
        for _ in range(times):
            traffic = scene.traffic()
            async with traffic.flowing():
                await traffic.moment()
                traffic.gateways = [other]
                blow = await scene.strike(dead, "kill -9", signal.SIGKILL)
                found.blows.append(blow)
                hit = list(traffic.live)
                await house.again(dead)
                await all_over(hit)
            found.runs += traffic.runs
    lost = house.gateways[dead]
    found.judge(lambda run: run.heard.gateway == lost and found.blows_at(run) > 0)
    moved = [run for run in found.runs if run.heard.gateway == other and run.heard.recoveries]
    found.require(not moved, f"{len(moved)} answers of the other gateway were moved")
    found.facts["cut with their gateway"] = sum(run.verdict != EQUAL for run in found.runs)
    return found


async def degrade(scene: Scene) -> Round:
    """All prefill workers dead, then all decode workers; each heals by being started again."""
    async with scene.round("degrade") as found:
        await _without_prefill(scene, found)
        dying = {id(run) for run in await _without_decode(scene, found)}
        healed = await scene.ask(scene.streamed())
        found.runs.append(healed)
        found.require(healed.verdict == EQUAL, f"after healing: {healed.verdict}")
    found.judge(
        lambda run: found.killed_two(run) or (id(run) in dying and run.verdict in NO_DECODE)
    )
    return found


async def _without_prefill(scene: Scene, found: Round) -> None:
    """Decode workers read prompts themselves, and the answers say so (R10)."""
    traffic = scene.traffic(width=4)
    async with traffic.flowing():
        await traffic.moment()
        blows = await _kill_all(scene, found, PREFILL)
        alone = [await scene.ask(scene.streamed()) for _ in range(3)]
    named = sum(FALLBACK in run.heard.headers for run in alone)
    found.require(named == len(alone), f"{FALLBACK} on {named} of {len(alone)} answers")
    await _heal(scene, blows)
    after = await scene.ask(scene.streamed())
    found.require(FALLBACK not in after.heard.headers, f"{FALLBACK} after healing")
    found.runs += [*traffic.runs, *alone, after]
    found.facts["answered without a prefill worker"] = named


async def _without_decode(scene: Scene, found: Round) -> list[Run]:
    """Running answers end with a typed error, new ones get 503 and when to come back."""
    traffic = scene.traffic(width=4)
    async with traffic.flowing(total=4):
        await traffic.moment()
        blows = await _kill_all(scene, found, DECODE)
    since = time.perf_counter()
    refused = (await scene.ask(scene.streamed())).heard
    found.facts["503 without a decode worker after (s)"] = round(time.perf_counter() - since, 2)
    found.facts["errors without a decode worker"] = dict(traffic.verdicts)
    found.require(refused.status == 503, f"without decode workers: HTTP {refused.status}")
    found.require("retry-after" in refused.headers, "503 without Retry-After")
    await _heal(scene, blows)
    found.runs += traffic.runs
    return traffic.runs


async def _kill_all(scene: Scene, found: Round, role: str) -> list[Blow]:
    blows = [
        await scene.strike(victim, f"kill -9 of every {role} worker", signal.SIGKILL)
        for victim in scene.house.workers(role)
    ]
    found.blows += blows
    for blow in blows:
        await scene.house.gone(blow.victim, blow.incarnation)
    return blows


async def _heal(scene: Scene, blows: list[Blow]) -> None:
    await asyncio.gather(*(scene.house.again(blow.victim, blow.incarnation) for blow in blows))
