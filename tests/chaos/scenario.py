"""Scenario: one seed's cluster, its clients and the faults that befall it. Drawn, not run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from cluster.messages import BOTH, DECODE, PREFILL, Request, Sampling
from tests.chaos.faults import CONTROL, FRAME, NETWORK, PROCESS, SILENT, Blow
from tests.hash_model import VOCAB, expected

CALM, SINGLE, ROUGH = "calm", "single", "rough"
LEVELS = (CALM, SINGLE, SINGLE, SINGLE, SINGLE, ROUGH, ROUGH, ROUGH, ROUGH, ROUGH)
"""By the last digit of the seed."""

LONG_S = 90.0
"""A deadline that nobody should need."""


@dataclass(frozen=True, slots=True)
class Client:
    """Sends one request to one gateway at one moment, reads a token every `pause` seconds."""

    request: Request
    gateway: int
    at: float
    pause: float
    gives_up: float | None
    deadline: float


@dataclass(frozen=True, slots=True)
class Setup:
    """One worker."""

    role: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """`name` is what the command line of tests.chaos.simulation runs it by."""

    name: str
    seed: int
    level: str
    gateways: int
    workers: tuple[Setup, ...]
    clients: tuple[Client, ...]
    blows: tuple[Blow, ...]
    rates: dict[str, float]
    delay_s: float
    ahead: bool


def draw(seed: int) -> Scenario:
    random = Random(seed)
    level = LEVELS[seed % len(LEVELS)]
    gateways = random.choice([1, 1, 2])
    clients = _clients(random, gateways, random.randint(3, 8), hasty=True)
    return Scenario(
        name=f"--seed {seed}",
        seed=seed,
        level=level,
        gateways=gateways,
        workers=_workers(random, spare=level == SINGLE),
        clients=clients,
        blows=_blows(random, level, 40 * len(clients)),
        rates=_rates(random) if level == ROUGH and random.random() < 0.5 else {},
        delay_s=random.choice([0.0005, 0.004, 0.02]),
        ahead=random.random() < 0.5,
    )


def small(seed: int, level: str = SINGLE, **changes: Any) -> Scenario:
    """Two pairs and two clients, and nothing that happens to them but what `changes` says."""
    random = Random(f"small {seed}")
    scenario = Scenario(
        name=f"--small {seed}",
        seed=seed,
        level=level,
        gateways=1,
        workers=_workers(random, spare=True, pairs=2),
        clients=_clients(random, gateways=1, count=2, hasty=level == CALM),
        blows=(),
        rates={},
        delay_s=0.002,
        ahead=random.random() < 0.5,
    )
    return replace(scenario, **changes)


def struck(scenario: Scenario, blow: Blow) -> Scenario:
    name = f"{scenario.name} --strike {blow.kind}@{blow.at}"
    return replace(scenario, name=name, blows=(blow,))


def crowded(seed: int, credit: int = 600, **changes: Any) -> Scenario:
    """One pair with hardly any room and everybody at once. Little credit makes a slow link."""
    random = Random(f"crowded {seed}")
    options = {
        "block_size": 4,
        "budget": 5,
        "step_s": 0.01,
        "chunk_bytes": 256,
        "credit": credit,
        "lease": 2.0,
    }
    workers = (
        Setup(PREFILL, "p", {**options, "blocks": 12, "step_s": 0.03}),
        Setup(DECODE, "d", {**options, "blocks": 24, "step_s": 0.03}),
    )
    clients = _clients(random, gateways=1, count=10, hasty=True)
    scenario = Scenario(
        f"crowded {seed}", seed, ROUGH, 1, workers, clients, (), {}, delay_s=0.004, ahead=False
    )
    return replace(scenario, **changes)


def _workers(random: Random, spare: bool, pairs: int = 0) -> tuple[Setup, ...]:
    """`spare`: whoever is lost, somebody else can do its work, and has room for it."""
    prefills = pairs or random.randint(1, 3)
    decodes = pairs or random.randint(2 if spare else 1, 3)
    both = 0 if pairs else random.choice([0, 0, 0, 1])
    lease = random.choice([2.0, 4.0])
    caching = random.random() < 0.8
    names = (
        [(PREFILL, f"p{number}") for number in range(prefills)]
        + [(DECODE, f"d{number}") for number in range(decodes)]
        + [(BOTH, f"b{number}") for number in range(both)]
    )
    return tuple(
        Setup(role, name, _options(random, spare, lease=lease, caching=caching))
        for role, name in names
    )


def _options(random: Random, spare: bool, **common: Any) -> dict[str, Any]:
    size = random.choice([1, 3, 4, 8])
    tokens = 480 if spare else random.choice([80, 120, 240])
    return {
        "blocks": tokens // size,
        "block_size": size,
        "budget": random.choice([5, 16, 64]),
        "max_sequences": 64 if spare else random.choice([2, 64]),
        "step_s": random.choice([0.002, 0.01, 0.05]),
        "chunk_bytes": random.choice([64, 256, 1024]),
        "credit": random.choice([1200, 1 << 16]),
        **common,
    }


def _clients(random: Random, gateways: int, count: int, hasty: bool) -> tuple[Client, ...]:
    """Prompts share prefixes within and across tenants; some clients leave or read slowly."""
    bases = [[random.randrange(VOCAB) for _ in range(28)] for _ in range(2)]
    clients: list[Client] = []
    while len(clients) < count:
        at = random.choice([0.0, random.uniform(0, 0.4), random.uniform(0, 2.0)])
        tokens = random.choice(bases)[: random.randint(1, 28)]
        if random.random() < 0.3:
            tokens = tokens + [random.randrange(VOCAB) for _ in range(random.randint(1, 6))]
        seed, salt = random.getrandbits(60), random.choice([b"", b"", b"another tenant"])
        choices = random.choice([1, 1, 1, 2])
        for choice in range(choices):
            sampling = Sampling(
                max_tokens=random.choice([1, 2, 6, 20, 40]), seed=seed, choice=choice
            )
            request = Request(f"r{len(clients)}", tuple(tokens), sampling, salt)
            if random.random() < 0.2:
                request = _stopping(request, random)
            clients.append(
                Client(
                    request,
                    random.randrange(gateways),
                    at,
                    pause=random.choice([0.0, 0.0, 0.0, 0.3]),
                    gives_up=random.uniform(0, 1.0) if hasty and random.random() < 0.2 else None,
                    deadline=LONG_S,
                )
            )
    return tuple(clients)


def _stopping(request: Request, random: Random) -> Request:
    """The same with a stop token that comes."""
    sampling = request.sampling
    stop = random.choice(expected(request))
    stopping = Sampling(sampling.max_tokens, seed=sampling.seed, choice=sampling.choice,
                        stop_token_ids=(stop,))  # fmt: skip
    return Request(request.id, request.tokens, stopping, request.salt)


def _blows(random: Random, level: str, messages: int) -> tuple[Blow, ...]:
    if level == CALM:
        return ()
    kinds = [*PROCESS, *NETWORK, *CONTROL, *FRAME]
    if level == SINGLE:
        return (Blow(random.randint(1, messages), random.choice(kinds)),)
    struck = [random.choice(kinds) for _ in range(random.randint(2, 6))]
    if random.random() < 0.15:
        struck += SILENT
    return tuple(Blow(random.randint(1, messages), kind) for kind in struck)


def _rates(random: Random) -> dict[str, float]:
    chances = {kind: random.choice([0, 0, 0.01, 0.05]) for kind in FRAME}
    return {
        **{kind: chance for kind, chance in chances.items() if chance},
        **{kind: random.choice([0, 0, 0.02]) for kind in CONTROL},
    }
