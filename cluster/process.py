"""What every Baton process does first and last: logs, signals, and dying with its parent."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import uvloop

from cluster.errors import StartError

EXIT_START = 78  # EX_CONFIG: cannot start as told
EXIT_SICK = 70  # EX_SOFTWARE: computes nothing any more, a new process may


REQUEST: Final[ContextVar[str]] = ContextVar("request", default="")
"""The id of the request that a task works on. Each line that is logged meanwhile has it."""


class JsonLines(logging.Formatter):
    """One line of JSON per event; `extra` fields become keys, so none of them can forge a line."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "where": record.name,
        }
        if request := REQUEST.get():
            line["request_id"] = request
        line |= {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(level: str) -> None:
    """Everything goes to stderr. What it does not take, a full disk behind it, is lost."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # as it would on stderr, line after line


def age() -> float:
    """Seconds since this process was started, its interpreter's start included. Linux."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def die_with_parent(parent: int) -> None:
    """Have the kernel kill us when our parent dies, however it dies. Linux only."""
    if not parent:
        return
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before we could ask


class Stopping(asyncio.Event):
    """Set when we are told to end. `patient`: by SIGTERM, whose sender lets running work finish;
    who presses Ctrl-C looks on and waits."""

    patient = False


def run(main: Callable[[Stopping], Coroutine[Any, Any, int]], start_word: int = 0) -> int:
    """Run `main(stopping)` on uvloop; SIGTERM and SIGINT set `stopping`, a second one ends at once.

    It may have as many descriptors as its hard limit lets it: the usual soft one, 1024, is there
    for programs that use select(). A StartError becomes one line on stderr and exit status 78. Of
    processes that share the pipe `start_word`, what hinders one hinders all: only the one that gets
    the pipe's byte prints.
    """

    async def with_signals() -> int:
        stopping = Stopping()

        def on_signal(number: signal.Signals) -> None:
            if stopping.is_set():
                os._exit(130)
            stopping.patient = number is signal.SIGTERM
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        return await main(stopping)

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        return uvloop.run(with_signals())
    except StartError as error:
        if not start_word or os.read(start_word, 1):
            tell_start_error(error)
        return EXIT_START


def leave(status: int) -> NoReturn:
    """End the process whatever its threads are at. One that is inside torch while the interpreter
    shuts down would abort it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def tell_start_error(error: BaseException) -> None:
    say(f"baton: {' '.join(str(error).split())}")


def say(text: str, stream: TextIO | None = None) -> None:
    """On stderr, if no other stream is given, at once. One that is full or closed ends nobody."""
    with suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)
