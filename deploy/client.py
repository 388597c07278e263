"""How the terminal's commands reach a running gateway."""

from __future__ import annotations

import argparse
from contextlib import AbstractAsyncContextManager
from typing import NoReturn

import aiohttp

from cluster.config import environment
from cluster.errors import StartError

CONNECT_S = 5.0


class Parser(argparse.ArgumentParser):
    """Flags that every such command has. A wrong flag is a StartError like any other bad start."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--url", default="http://127.0.0.1:8000", help="of the gateway")
        self.add_argument(
            "--api-key",
            default=environment("OPENAI_API_KEY"),
            help="bearer token, if it asks for one",
        )

    def error(self, message: str) -> NoReturn:
        raise StartError(message)


def session(options: argparse.Namespace) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
    """A client whose connect attempts end in time; streams may take as long as they like."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return aiohttp.ClientSession(
        base_url=options.url.rstrip("/") + "/",
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
    )


def unreachable(options: argparse.Namespace, error: Exception) -> StartError:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return StartError(
            f"{options.url} shows a certificate that nobody known here has signed for that name: "
            "SSL_CERT_FILE=ca.pem names who has"
        )
    return StartError(
        f"nothing answers at {options.url}: start it with `baton serve`, or give --url"
    )
