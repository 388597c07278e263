"""A worker process from start to end: what prefill and decode workers have in common.

load the model -> pages and pool -> the room's stage and links -> gRPC -> step thread -> join
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from cluster import metrics, process, rpc
from cluster.config import WorkerConfig, model_directory
from cluster.credentials import WORKER, Credentials, credentials_for
from cluster.errors import HandshakeRefused, StartError
from cluster.ids import new_incarnation
from cluster.messages import PREFILL, Event, Fingerprint, Hello, KVLayout, LayerGroup, Load, Peer
from cluster.model import ModelConfig, config_digest
from cluster.pressure import Pressure
from cluster.wire import codec
from cluster.worker import WorkerService
from engine import loop, native, watchdog
from engine.allocator import Allocator
from engine.backend import find_device
from engine.batch import Batch
from engine.blocks import BlockPool, root_key
from engine.cache import KVCache
from engine.effort import Costs, Effort, Peak, measure_peak
from engine.layers.attention import Attend
from engine.memory import check_blocks, warn_of_pressure
from engine.models.load import LoadedModel, load_model
from engine.profile import Trace
from engine.runner import Runner
from engine.sizes import kv_blocks, settled

if TYPE_CHECKING:  # imports triton, which a worker on the CPU has no use for
    from engine.cuda import CudaRunner

log = logging.getLogger(__name__)

TICK_S = 0.25

REFUSED_S = 5.0
"""Until a gateway that would not have us, though others do, is asked again."""

Join = Callable[[str, Callable[[], object]], Awaitable[None]]
"""Stays a member of the gateway at an address, and calls back each time that it takes us. Raises
HandshakeRefused when it does not."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Parts:
    """What a room builds its stage and its links from. `hello` has no addresses yet."""

    config: WorkerConfig
    hello: Hello
    windows: tuple[int, ...]
    kernels: str  # engine.ops
    cache: KVCache
    pool: BlockPool
    allocator: Allocator
    inbox: loop.Inbox
    pressure: Pressure
    credentials: Credentials | None


class Room(Protocol):
    """A role's own part of a worker."""

    @property
    def stage(self) -> loop.Stage: ...

    def attention(self, batch: Batch) -> Attend:
        """Of a step that is nobody's: to warm up with."""

    def open(self) -> str:
        """The data plane's address; empty if it takes no KV."""

    async def serve(self) -> None:
        """Carry KV until cancelled."""

    def metrics(self) -> Iterable[tuple[str, float]]:
        """What the data plane has counted on the event loop, by metric name."""

    def close(self) -> None:
        """Let go of the data plane. Idempotent."""


async def serve(
    config: WorkerConfig, stopping: asyncio.Event, furnish: Callable[[Parts], Room]
) -> int:
    """One worker until told to stop, or until it cannot compute. Raises StartError.

    Leaves a thread behind when it is told so while the weights load: end the process with
    `process.leave`.
    """
    times = {"imported": process.age()}
    config = settled(config, find_device(config.device))
    _pin(config.pin)
    torch.set_num_threads(config.threads)
    native.set_threads(config.threads)
    directory = model_directory(config)
    credentials = credentials_for(WORKER, config.keys)
    server = rpc.new_server()
    port = rpc.listen(server, f"{config.host}:{config.port}", "--port", rpc.mutual_tls(credentials))
    engine = await _unless(stopping, _in_thread("load", lambda: _load(config, directory)))
    if engine is None:
        return 0
    times["loaded"] = process.age()
    if engine.model.model.ops.name == "native":
        torch.set_num_threads(1)  # its own threads would spin where ours want to work
    parts = _parts(config, directory, engine.model, credentials)
    room = furnish(parts)
    control_address = f"{config.host}:{port}"
    hello = replace(parts.hello, control_address=control_address, data_address=room.open())
    runner = _runner(config, engine.model, parts)
    await _in_thread("warm up", lambda: runner.warm_up(room.attention))
    times["warm"] = process.age()

    def counted() -> Iterator[tuple[str, float]]:
        yield from room.metrics()
        yield from engine.effort.metrics()
        yield metrics.PEAK_RESIDENT_BYTES, process.peak_resident_bytes()
        for resource, share in parts.pressure.shares.items():
            yield metrics.labelled(metrics.WORKER_PRESSURE, resource=resource), share
        for phase, seconds in times.items():
            yield metrics.labelled(metrics.START_SECONDS, phase=phase), seconds

    def pulse() -> int:
        return parts.inbox.taken + runner.pulse

    service = WorkerService(hello, parts.inbox.put, pulse, counted, credentials)
    server.add_generic_rpc_handlers(
        (
            rpc.stream_handler(
                codec.SESSION,
                service.session,
                codec.decode_order,
                codec.encode_report,
                credentials,
            ),
        )
    )
    await server.start()
    gc.freeze()  # torch alone is 200,000 objects: looking through them stops a step for 0.1 s
    times["ready"] = process.age()
    log.info(
        "worker up",
        extra={
            "worker": hello.peer.name,
            "kernels": parts.kernels,
            "seconds": {phase: round(seconds, 3) for phase, seconds in times.items()},
        },
    )
    try:
        stage: loop.Stage = room.stage
        steps: loop.Runner = runner
        if config.profile:
            file = Path(config.profile) / f"{hello.peer.name}.json"
            stage, steps = Trace(file, config.profile_steps).of(stage, steps)
        await _live(
            config,
            stopping,
            service,
            room,
            lambda tell: loop.run(stage, steps, parts.inbox, tell, engine.effort),
            parts.inbox,
            (watchdog.watch(pulse, config.hang_timeout), parts.pressure.watch()),
        )
    except loop.Sick:
        return process.EXIT_SICK
    finally:
        service.close()
        await server.stop(grace=0.5)
        room.close()
    return 0


async def _live(
    config: WorkerConfig,
    stopping: asyncio.Event,
    service: WorkerService,
    room: Room,
    run: Callable[[loop.Tell], None],
    inbox: loop.Inbox,
    beside: Iterable[Coroutine[Any, Any, None]] = (),
) -> None:
    """Serve, then drain. Raises whatever ends a part of the worker."""
    event_loop = asyncio.get_running_loop()

    def tell(mail: list[tuple[int, Event]], load: Load | None) -> None:
        event_loop.call_soon_threadsafe(service.tell, mail, load)

    steps = _in_thread("steps", lambda: run(tell))
    try:
        async with asyncio.TaskGroup() as group:
            parts = [
                group.create_task(_watch(steps)),
                group.create_task(service.tick(TICK_S)),
                group.create_task(room.serve()),
                group.create_task(stay_joined(service.join, config.join)),
                *map(group.create_task, beside),
            ]
            await stopping.wait()
            await service.drain(config.shutdown_timeout)
            for part in parts:
                part.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    finally:
        inbox.put(loop.Stop())
        await asyncio.wait((steps,), timeout=1.0)
        steps.cancel()  # one that still runs has nobody to tell any more


async def _watch(steps: asyncio.Future[None]) -> None:
    try:
        await asyncio.shield(steps)
    except Exception:
        log.critical("step loop broke", exc_info=True)
        raise


async def stay_joined(join: Join, addresses: Sequence[str]) -> None:
    """Be a member of every gateway that takes us, until we drain. One that does not is asked again:
    what it has against us may go. Raises StartError while all of them refuse."""
    refusals: dict[str, str] = {}

    async def stay(address: str) -> None:
        while True:
            try:
                return await join(address, partial(refusals.pop, address, None))
            except HandshakeRefused as error:
                new = address not in refusals
                refusals[address] = f"{address} refuses this worker: {error.message}"
                if all(address in refusals for address in addresses):
                    raise StartError("; ".join(refusals[one] for one in addresses)) from None
                if new:
                    log.warning(
                        "refused by a gateway", extra={"address": address, "reason": error.message}
                    )
            await asyncio.sleep(REFUSED_S)

    try:
        async with asyncio.TaskGroup() as group:
            for address in addresses:
                group.create_task(stay(address))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


def _in_thread(name: str, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run `work` in a thread of its own, which nothing waits for when the event loop ends."""
    result: concurrent.futures.Future[Result] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()  # cancelling what we return leaves the thread alone

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # belongs to whoever awaits it
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(result)


async def _unless(stopping: asyncio.Event, result: asyncio.Future[Result]) -> Result | None:
    """The result, or None if we are told to stop before it is there."""
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait((stop, result), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if result.done():
        return result.result()
    result.cancel()
    return None


def _pin(cores: Sequence[int]) -> None:
    if not cores:
        return
    allowed = os.sched_getaffinity(0)
    for core in cores:
        if core not in allowed:
            raise StartError(f"--pin: {core} is not one of {', '.join(map(str, sorted(allowed)))}")
    os.sched_setaffinity(0, cores)


def _parts(
    config: WorkerConfig, directory: Path, model: LoadedModel, credentials: Credentials | None
) -> Parts:
    shape = model.config
    ops = model.model.ops
    layout = KVLayout(_groups(shape), str(ops.kv_dtype).removeprefix("torch."))
    block_bytes = layout.token_bytes * config.block_size
    blocks = kv_blocks(config, block_bytes, ops.device)
    check_blocks(blocks, block_bytes, ops.device)
    warn_of_pressure(blocks * block_bytes, config.pressure_limit, ops.device)
    name = config.name or f"{config.role}-{os.getpid()}"
    fingerprint = Fingerprint(config_digest(directory), model.weights_digest)
    pool = BlockPool(blocks, config.block_size)
    hello = Hello(
        peer=Peer(name, new_incarnation()),
        role=config.role,
        model=directory.name,
        fingerprint=fingerprint,
        layout=layout,
        block_size=config.block_size,
        blocks=blocks,
        max_model_len=config.max_model_len or shape.max_model_len,
    )
    return Parts(
        config=config,
        hello=hello,
        windows=shape.windows,
        kernels=ops.name,
        cache=KVCache(layout, blocks, config.block_size, ops.device),
        pool=pool,
        allocator=Allocator(
            pool, lambda salt: root_key(fingerprint, salt), config.enable_prefix_caching
        ),
        inbox=loop.Inbox(),
        pressure=Pressure(config.pressure_limit),
        credentials=credentials,
    )


def _groups(shape: ModelConfig) -> tuple[LayerGroup, ...]:
    """Consecutive layers with the same window."""
    groups: list[LayerGroup] = []
    for window in shape.windows:
        if groups and groups[-1].window == window:
            groups[-1] = replace(groups[-1], layers=groups[-1].layers + 1)
        else:
            groups.append(LayerGroup(1, shape.kv_heads, shape.head_dim, window))
    return tuple(groups)


@dataclass(frozen=True)
class _Engine:
    model: LoadedModel
    effort: Effort


def _load(config: WorkerConfig, directory: Path) -> _Engine:
    shown = _Progress(config.name or config.role, directory.name)
    peak = _peak(config)  # first: what it needs for a moment is free again for the weights
    model = load_model(
        directory,
        dtype=config.dtype,
        kernels=config.kernels,
        quantization=config.quantization,
        device=config.device,
        block_size=config.block_size,
        load_format=config.load_format,
        seed=config.seed,
        progress=shown,
        skip_digest=config.skip_digest,
    )
    return _Engine(model, Effort(Costs(model.model), peak))


def _runner(config: WorkerConfig, model: LoadedModel, parts: Parts) -> Runner | CudaRunner:
    decodes = config.role != PREFILL
    if model.model.ops.device.type == "cpu":
        # A prompt that is read for another worker goes out layer by layer.
        return Runner(model.model, parts.cache if decodes else None)
    from engine.cuda import GRAPH_SIZES, CudaRunner

    return CudaRunner(
        model.model,
        context=parts.hello.max_model_len,
        block_size=config.block_size,
        sequences=config.max_num_seqs,
        tokens=config.max_num_batched_tokens,
        ahead=decodes,
        graph_sizes=_graph_sizes(config, GRAPH_SIZES) if decodes else (),
    )


def _graph_sizes(config: WorkerConfig, sizes: Sequence[int]) -> tuple[int, ...]:
    """Those that a batch of this worker can be padded to."""
    if config.enforce_eager:
        return ()
    return tuple(size for size in sizes if size < 2 * config.max_num_seqs)


def _peak(config: WorkerConfig) -> Peak:
    """As declared; measured where it is not."""
    flops, moved = config.peak_tflops * 1e12, config.peak_gbps * 1e9
    if not (flops and moved):
        measured = measure_peak(find_device(config.device))
        flops, moved = flops or measured.flops, moved or measured.bytes
    return Peak(flops, moved)


class _Progress:
    """Says how far loading is: at most a line each second, and none for what is loaded at once."""

    def __init__(self, worker: str, model: str) -> None:
        self._what = f"{worker}: loading {model}"
        self._next = time.monotonic() + 1.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next += 1.0
        process.say(
            f"{self._what}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB "
            f"({100 * done // max(1, total)} %)"
        )
