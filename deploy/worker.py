"""`baton worker`: opens the room of its role."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import NoReturn

from cluster import process
from cluster.config import WorkerConfig, load
from cluster.messages import BOTH, DECODE, PREFILL

ROOMS = {PREFILL: "prefill.service", DECODE: "decode.service", BOTH: "decode.service"}


def main(argv: Sequence[str]) -> NoReturn:
    """Serve until told to stop, and end the process. Raises StartError."""
    config = load(WorkerConfig, argv, "baton worker")
    process.die_with_parent(config.die_with)
    process.start_logging(config.log_level)
    # Workers share cores: an OpenMP thread that spins while it waits takes them from the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    room = importlib.import_module(ROOMS[config.role])
    status = process.run(lambda stopping: room.serve(config, stopping), config.start_word)
    process.leave(status)
