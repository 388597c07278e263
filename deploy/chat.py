"""`baton chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

from cluster.errors import StartError
from deploy.client import Parser, session, unreachable


def main(argv: Sequence[str]) -> int:
    """One question given as words, or a conversation until end of input. Raises StartError."""
    parser = Parser("baton chat", "Talk to a running cluster.")
    parser.add_argument("question", nargs="*", help="ask only this and leave")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=0, help="0 leaves it to the server")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--timeline", action="store_true", help="show where the time went")
    options = parser.parse_args(list(argv))
    try:
        return asyncio.run(_converse(options))
    except (aiohttp.ClientConnectorError, TimeoutError):
        raise unreachable(options) from None


async def _converse(options: Namespace) -> int:
    messages = [{"role": "system", "content": options.system}] if options.system else []
    async with session(options) as client:
        model = await _model(client)
        if options.question:
            return await _ask(client, options, model, messages, " ".join(options.question))
        while True:
            try:
                question = await asyncio.to_thread(input, "> ")
            except EOFError:
                print()
                return 0
            if question.strip():
                await _ask(client, options, model, messages, question)


async def _model(client: aiohttp.ClientSession) -> str:
    async with client.get("v1/models") as response:
        body = await response.json()
        if response.status != 200:
            raise StartError(body["error"]["message"])
        return str(body["data"][0]["id"])


async def _ask(
    client: aiohttp.ClientSession,
    options: Namespace,
    model: str,
    messages: list[dict[str, str]],
    question: str,
) -> int:
    """Stream one answer and add both turns to `messages`. Returns the exit status."""
    messages.append({"role": "user", "content": question})
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "temperature": options.temperature,
        "stream_options": {"include_usage": True},
    }
    if options.max_tokens:
        body["max_tokens"] = options.max_tokens
    if options.timeline:
        body["return_timeline"] = True
    answer = ""
    async with client.post("v1/chat/completions", json=body) as response:
        if response.status != 200:
            return _failed((await response.json(content_type=None))["error"])
        async for event in _events(response):
            if "error" in event:
                print()
                return _failed(event["error"])
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                answer += text
                print(text, end="", flush=True)
            if "metrics" in event:
                print("\n" + json.dumps(event["metrics"]), end="")
    print()
    messages.append({"role": "assistant", "content": answer})
    return 0


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def _failed(error: dict[str, Any]) -> int:
    print(f"baton chat: {error['message']} ({error['code']})", file=sys.stderr)
    return 1
