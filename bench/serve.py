"""serve: run one benchmark against an OpenAI-compatible server, from flags to the table."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import aiohttp

from bench import load
from bench.client import Client, Clock, Record, connect_reason, open_session
from bench.flags import parse_options
from bench.options import ServeOptions
from bench.progress import Progress
from bench.report import Report, summarise
from bench.requests import Request, prepare
from bench.vocabulary import find_vocabulary
from cluster.errors import StartError

__all__ = ["Report", "ServeOptions", "main", "run"]

# Below the 5 s within which a start that cannot succeed has to end.
_REACH_TIMEOUT = 4.0
# Makes warm-up prompts differ from the measured ones, which must not meet a warm prefix cache.
_WARMUP_SEED = 0x5EED

Sleep = Callable[[float], Awaitable[object]]


def main(argv: list[str]) -> int:
    """Run `baton bench serve`. Returns 0, 1 when nothing succeeded, 2 for flags that are wrong."""
    try:
        options = parse_options(argv)
    except StartError as error:
        return _complain(error, 2)
    try:
        report = asyncio.run(run(options))
    except StartError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    print(report.table())
    if options.save_result or options.append_result:
        try:
            print(f"Saved to {report.save()}")
        except OSError as error:
            return _complain(f"cannot save the result: {error}", 1)
    return 0 if report.summary.completed else 1


async def run(
    options: ServeOptions,
    *,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> Report:
    """Send the whole load and wait for the last answer. Failed requests are part of the result.

    Raises StartError when the server cannot be reached or the data cannot be read. Cancelling
    it closes every connection.
    """
    async with open_session(options.api_key) as session:
        model = await find_model(session, options.base_url, options.model)
        vocabulary, tokenizer = await find_vocabulary(
            session, options.base_url, model, options.tokenizer
        )
        count, seed = options.num_prompts, options.seed
        requests = await prepare(options, model, vocabulary, count, seed)
        count, seed = options.num_warmups, options.seed ^ _WARMUP_SEED
        warmups = await prepare(options, model, vocabulary, count, seed)
        client = Client(
            session,
            options.url,
            timeout=options.request_timeout,
            keep_text=options.save_detailed,
            clock=clock,
        )
        limit = options.max_concurrency
        at_once = [0.0] * len(warmups)
        await _fire(client, warmups, at_once, limit, Progress(0), clock, sleep)
        progress = Progress(len(requests), enabled=not options.disable_tqdm)
        arrivals = load.arrival_times(
            len(requests), options.request_rate, options.burstiness, options.seed
        )
        started = clock()
        records = await _fire(client, requests, arrivals, limit, progress, clock, sleep)
        duration = clock() - started
        progress.close()
    summary = summarise(records, duration, options.goodput, options.metric_percentiles)
    return Report(options, model, tokenizer, datetime.now(), duration, tuple(records), summary)


async def find_model(session: aiohttp.ClientSession, base_url: str, model: str | None) -> str:
    """Name the model to ask for, the server's first by default, and see that the server is there.

    Raises StartError within 4 s when it is not, or when it names no model and none was given.
    """
    url = base_url.rstrip("/") + "/v1/models"
    timeout = aiohttp.ClientTimeout(total=_REACH_TIMEOUT)
    try:
        async with session.get(url, timeout=timeout) as response:
            if model is not None:
                return model
            if response.status != 200:
                raise StartError(f"{url} answered HTTP {response.status}; give --model or a key")
            listing = await response.json(content_type=None)
    except TimeoutError:
        raise StartError(f"{base_url}: no answer within {_REACH_TIMEOUT:g} s") from None
    except aiohttp.ClientConnectorError as error:
        raise StartError(f"{base_url}: {connect_reason(error)}; is the server up?") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise StartError(f"{base_url}: no OpenAI-compatible answer: {error}") from None
    try:
        return str(listing["data"][0]["id"])
    except (LookupError, TypeError):
        raise StartError(f"{url} lists no model; give --model") from None


async def paced(
    arrivals: Sequence[float], send: Callable[[int], None], clock: Clock, sleep: Sleep
) -> None:
    """Call `send` with each index when its arrival time has come, never before, in order."""
    start = clock()
    for index, arrival in enumerate(arrivals):
        wait = start + arrival - clock()
        if wait > 0:
            await sleep(wait)
        send(index)


async def _fire(
    client: Client,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    limit: int | None,
    progress: Progress,
    clock: Clock,
    sleep: Sleep,
) -> list[Record]:
    """Send every request at its time, at most `limit` in flight; records in the same order."""
    free = asyncio.Semaphore(limit or max(1, len(requests)))

    async def one(request: Request) -> Record:
        async with free:
            record = await client.send(*request)
        progress.step(record.ok)
        return record

    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        await paced(
            arrivals,
            lambda index: tasks.append(group.create_task(one(requests[index]))),
            clock,
            sleep,
        )
    return [task.result() for task in tasks]


def _complain(error: object, code: int) -> int:
    print(f"baton bench serve: {error}", file=sys.stderr)
    return code
