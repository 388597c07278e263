"""Baton with workers that fail when they are told to. No product code knows of it.

    python -m tests.e2e.failing_worker DIRECTORY serve|worker ...

runs `baton serve ...`, whose workers are started through this module again, or `baton worker ...`.
At its next step a worker takes away the file DIRECTORY/NAME.FAULT, if there is one, and fails so:

    sleep   the step never returns, and holds nothing
    regex   nor does it here, and holds the GIL
    device  the step raises what torch raises when a GPU has failed

A step that meets the token POISON ends the process whatever the files say.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from cluster import cli
from deploy import launcher
from engine.batch import Attention, Batch
from engine.loop import Outcome
from engine.runner import Runner

POISON = 666


def _sleep() -> NoReturn:
    while True:
        time.sleep(3600)


def _regex() -> None:
    re.match("(a+)+$", "a" * 64 + "b")


def _device() -> NoReturn:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


FAULTS: dict[str, Callable[[], None]] = {"sleep": _sleep, "regex": _regex, "device": _device}


def fail(directory: Path, name: str) -> None:
    """Have every step of this process look for what it is to suffer."""
    launch = Runner.launch

    def failing(runner: Runner, batch: Batch, attention: Attention) -> Outcome:
        if POISON in batch.tokens:
            os.abort()
        for fault, happen in FAULTS.items():
            file = directory / f"{name}.{fault}"
            if file.exists():
                file.unlink()
                happen()
        return launch(runner, batch, attention)

    setattr(Runner, "launch", failing)  # noqa: B010  an assignment would be typed as the method


def main(directory: str, *words: str) -> int:
    launcher.COMMAND = (sys.executable, "-m", "tests.e2e.failing_worker", directory)
    if words[0] == "worker":
        name = next(word for word in words if word.startswith("--name="))
        fail(Path(directory), name.removeprefix("--name="))
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
