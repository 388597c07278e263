"""How the terminal's commands reach a running gateway."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from cluster.config import environment
from cluster.errors import StartError
from deploy.parser import Parser

CONNECT_S = 5.0


class ClientParser(Parser):
    """Flags that every such command has."""

    def __init__(self, prog: str, description: str) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog, description, formatter_class=formatter)
        self.add_argument(
            "--url", type=base_url, default="http://127.0.0.1:8000", help="of the gateway"
        )
        self.add_argument(
            "--api-key",
            default=argparse.SUPPRESS,  # --help shows defaults
            help="bearer token, if it asks for one (default: $BATON_API_KEY, else $OPENAI_API_KEY)",
        )


def base_url(text: str) -> str:
    """As people write it: without http://, or with the /v1 that OpenAI's clients want."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = known and not (parts.query or parts.fragment or " " in url)
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is no address like http://127.0.0.1:8000")
    return url


def get(options: argparse.Namespace, path: str, field: str) -> dict[str, Any]:
    """The object with this field that a GET answers. Raises StartError."""

    async def ask() -> Any:
        async with session(options) as client, client.get(path) as response:
            return await response.json()

    try:
        body = asyncio.run(ask())
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise unreachable(options, error) from None
    match body:
        case {"error": {"message": str(message)}}:
            raise StartError(f"{options.url}: {message}")
        case dict() if field in body:
            return body
    raise _stranger(options)


def session(options: argparse.Namespace) -> AbstractAsyncContextManager[aiohttp.ClientSession]:
    """A client whose connect attempts end in time; streams may take as long as they like."""
    known = environment("BATON_API_KEY") or environment("OPENAI_API_KEY")
    key = getattr(options, "api_key", known)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
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
    if isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
        return StartError(
            f"nothing answers at {options.url}: start it with `baton serve`, or give --url"
        )
    return _stranger(options)


def _stranger(options: argparse.Namespace) -> StartError:
    return StartError(f"what answers at {options.url} is no Baton gateway: give its HTTP --url")
