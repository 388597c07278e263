"""Keys of a cluster, made as a user makes them."""

from __future__ import annotations

from pathlib import Path

from cluster.credentials import GATEWAY, WORKER, Credentials, credentials_for
from deploy.keys import make


def made(directory: Path) -> tuple[Credentials, Credentials]:
    """A gateway's and a worker's, of a cluster of their own."""
    make(directory)
    gateway = credentials_for(GATEWAY, str(directory))
    worker = credentials_for(WORKER, str(directory))
    assert gateway is not None and worker is not None
    return gateway, worker
