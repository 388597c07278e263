"""`baton chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import aiohttp

from cluster.errors import StartError
from deploy.client import ClientParser, get, session


def main(argv: Sequence[str]) -> int:
    """One question given as words, or a conversation until end of input.

    Raises StartError. Ctrl-C ends a running answer of a conversation, and raises KeyboardInterrupt
    elsewhere.
    """
    parser = ClientParser("baton chat", "Talk to a running cluster.")
    parser.add_argument("question", nargs="*", help="ask only this and leave")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=0, help="0 leaves it to the server")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--timeline", action="store_true", help="show where the time went")
    options = parser.parse_args(list(argv))
    models = get(options, "v1/models", "data")["data"]
    if not models:
        raise StartError("this API key may use no model")
    conversation = Conversation(options, str(models[0]["id"]))
    if options.question:
        return asyncio.run(conversation.ask(" ".join(options.question)))
    return _talk(conversation)


def _talk(conversation: Conversation) -> int:
    """Until end of input. The prompt has no event loop around it, so that Ctrl-C is heard there."""
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            raise
        if question.strip():
            with suppress(KeyboardInterrupt):
                asyncio.run(conversation.ask(question))


class Conversation:
    """What was said so far: only questions that got a whole answer, with their answers."""

    def __init__(self, options: Namespace, model: str) -> None:
        self.messages: list[dict[str, str]] = []
        if options.system:
            self.messages.append({"role": "system", "content": options.system})
        self._options = options
        self._model = model

    async def ask(self, question: str) -> int:
        """Stream one answer. Returns the exit status."""
        asked = {"role": "user", "content": question}
        try:
            answer = await self._stream([*self.messages, asked])
        except _Failed as error:
            return _say(str(error))
        except (aiohttp.ClientError, TimeoutError):
            return _say(f"the connection to {self._options.url} was lost")
        except (ValueError, LookupError):
            return _say(f"{self._options.url} answered as no Baton gateway does")
        self.messages += [asked, {"role": "assistant", "content": answer}]
        return 0

    async def _stream(self, messages: list[dict[str, str]]) -> str:
        """Print the answer while it comes. Raises _Failed and aiohttp's errors."""
        answer = ""
        async with (
            session(self._options) as client,
            client.post("v1/chat/completions", json=self._body(messages)) as response,
        ):
            if response.status != 200:
                raise _Failed((await response.json(content_type=None))["error"])
            try:
                async for event in _events(response):
                    if "error" in event:
                        raise _Failed(event["error"])
                    for choice in event["choices"]:
                        text = choice["delta"].get("content") or ""
                        answer += text
                        print(text, end="", flush=True)
                    if "metrics" in event:
                        print("\n" + json.dumps(event["metrics"]), end="")
            finally:
                print()
        return answer

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "temperature": options.temperature,
            "stream_options": {"include_usage": True},
        }
        if options.max_tokens:
            body["max_tokens"] = options.max_tokens
        if options.timeline:
            body["return_timeline"] = True
        return body


class _Failed(Exception):
    """The server's error object, as one line."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['message']} ({error['code']})")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def _say(error: str) -> int:
    print(f"baton chat: {error}", file=sys.stderr)
    return 1
