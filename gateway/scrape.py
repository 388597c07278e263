"""One scrape for all gateway processes that share a port.

A scrape of the shared port reaches any one of them. It asks the others, by the ports that they have
of their own, and marks each sample with the number of its gateway: a counter of one that is started
again begins anew, which a sum would hide from whoever takes its rate. What the workers report is
the same everywhere, so it stays as it is here.

Source  the text format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

PATIENCE_S: Final = 1.0
"""A gateway that does not answer by then is left out of this scrape."""


@dataclass(frozen=True)
class Siblings:
    """The gateways on `port`: where each is by itself, and which of them this is."""

    port: int
    addresses: tuple[str, ...]
    own: int
    scheme: str = "http"

    async def scrape(self, own: bytes, authorization: bytes) -> bytes:
        """The metrics of all, `own` among them; the others are asked with the caller's key."""
        import aiohttp  # here, because a gateway by itself does without

        headers = {"authorization": authorization.decode("latin-1")} if authorization else {}
        patience = aiohttp.ClientTimeout(total=PATIENCE_S)

        async def ask(client: aiohttp.ClientSession, number: int) -> str:
            address = self.addresses[number]
            try:
                url = f"{self.scheme}://{address}/metrics"
                async with client.get(url, ssl=False) as response:  # on loopback, whatever its name
                    return await response.text() if response.status == 200 else ""
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("gateway left out of a scrape", extra={"at": address, "why": error})
                return ""

        others = [number for number in range(len(self.addresses)) if number != self.own]
        async with aiohttp.ClientSession(headers=headers, timeout=patience) as client:
            texts = await asyncio.gather(*(ask(client, number) for number in others))
        found = {number: text for number, text in zip(others, texts, strict=True) if text}
        return merge(self.own, {**found, self.own: own.decode()}).encode()


def merge(own: int, texts: Mapping[int, str]) -> str:
    """All gateways' metrics in one text; `own` is whose word on the workers counts."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for number in sorted(texts):
        family = ""
        for line in texts[number].splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                samples.setdefault(family, [])
                heads.setdefault(family, [line])
            elif line.startswith("#"):
                if len(heads[family]) == 1:
                    heads[family].append(line)
            elif 'worker="' not in line or 'worker=""' in line:  # its own queue has no worker
                samples[family].append(_marked(line, number))
            elif number == own:
                samples[family].append(line)
    lines = (line for family in heads for line in (*heads[family], *samples[family]))
    return "".join(f"{line}\n" for line in lines)


def _marked(sample: str, number: int) -> str:
    """The sample with one more label."""
    name, rest = sample.split(" ", 1)
    if "{" in name:
        name, inner = sample.split("{", 1)
        return f'{name}{{gateway="{number}",{inner}'
    return f'{name}{{gateway="{number}"}} {rest}'
