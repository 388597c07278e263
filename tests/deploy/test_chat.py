"""`baton chat` against a server that answers as the test says."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from deploy.chat import Conversation


class Server:
    """Answers "yes" to all but three questions: "cut" and "hang" end in the middle of the answer,
    "bad" is refused."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self._forever = asyncio.Event()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)

    async def start(self) -> str:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self._forever.set()
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        said = [message["content"] for message in (await request.json())["messages"]]
        self.asked.append(said)
        if said[-1] == "bad":
            error = {"message": "No.", "code": "invalid_value"}
            return web.json_response({"error": error}, status=400)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        choice = {"delta": {"content": "yes"}}
        await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        if said[-1] == "cut":
            assert request.transport is not None
            request.transport.close()
        if said[-1] == "hang":
            await self._forever.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.stop()


class Terminal:
    """`baton chat` as a process. What it shows is read piece by piece."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    @classmethod
    async def open(cls, url: str, *question: str) -> Terminal:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "cluster.cli", "chat", "--url", url, *question)
        return cls(
            await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        )

    async def until(self, shown: str) -> None:
        assert self._child.stdout is not None
        async with asyncio.timeout(30):
            await self._child.stdout.readuntil(shown.encode())

    def type(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode() + b"\n")

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    async def interrupt_until(self, shown: str) -> None:
        """Again and again: a signal between the prompt and the read is only seen after the read."""
        assert self._child.stdout is not None
        seen = asyncio.create_task(self.until(shown))
        while not seen.done():
            self.interrupt()
            await asyncio.wait((seen,), timeout=0.5)
        await seen

    async def end(self) -> tuple[int, str]:
        """Ends its input. The exit status, and what is on stderr."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            async with asyncio.timeout(30):
                _, errors = await self._child.communicate()
        finally:
            if self._child.returncode is None:
                self._child.kill()
                await self._child.wait()
        assert self._child.returncode is not None
        return self._child.returncode, errors.decode()


async def test_ctrl_c_at_the_prompt_leaves(server: Server) -> None:
    terminal = await Terminal.open(await server.start())
    await terminal.until("> ")
    await terminal.interrupt_until("\n")
    assert await terminal.end() == (130, "")


async def test_ctrl_c_in_an_answer_ends_that_alone(server: Server) -> None:
    terminal = await Terminal.open(await server.start())
    await terminal.until("> ")
    terminal.type("hang")
    await terminal.until("yes")
    terminal.interrupt()
    await terminal.until("> ")
    terminal.type("again")
    await terminal.until("yes")
    await terminal.until("> ")
    assert await terminal.end() == (0, "")
    assert server.asked == [["hang"], ["again"]]


async def test_ctrl_c_ends_a_single_question(server: Server) -> None:
    terminal = await Terminal.open(await server.start(), "hang")
    await terminal.until("yes")
    terminal.interrupt()
    assert await terminal.end() == (130, "")


async def test_a_failed_turn_is_one_line_and_no_part_of_the_conversation(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = await server.start()
    options = argparse.Namespace(
        url=url, api_key="", system="s", max_tokens=0, temperature=0.0, timeline=False
    )
    conversation = Conversation(options, "m")
    assert [await conversation.ask(question) for question in ("a", "cut", "bad", "b")] == [
        0,
        1,
        1,
        0,
    ]
    assert server.asked[-1] == ["s", "a", "yes", "b"]
    lost, refused = capsys.readouterr().err.splitlines()
    assert lost == f"baton chat: the connection to {url} was lost"
    assert refused == "baton chat: No. (invalid_value)"
    await server.stop()
    assert await conversation.ask("c") == 1
    assert [message["content"] for message in conversation.messages] == [
        "s",
        "a",
        "yes",
        "b",
        "yes",
    ]
