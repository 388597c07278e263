"""A gateway for tests: the real front, text and validation over scripted workers.

The tokenizer has one token per byte, so tests see at a glance which tokens make which text, and a
character of several bytes comes in several tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from cluster.errors import BatonError
from cluster.messages import Request, Token
from cluster.metrics import GatewayMetrics
from gateway.ask import Limits
from gateway.fair import Standing
from gateway.gateway import Gateway
from gateway.keys import Keys
from gateway.relay import Watch
from gateway.text import TextPool
from gateway.tokens import Tokenizer

END = 256
VOCAB_SIZE = 257
MODEL = "baton-test"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

Step = Token | BaseException | asyncio.Event
"""Yield it, raise it, or wait for it."""

Script = Callable[[Request], Iterable[Step]]


def says(text: str | bytes, finish: str = "stop", **fields: Any) -> Script:
    """Answer everything with this text, then with the end token if it stops by itself."""
    data = text.encode() if isinstance(text, str) else text
    ids = [*data, END] if finish == "stop" else list(data)

    def script(request: Request) -> list[Step]:
        return [
            Token(
                request.id,
                1,
                index,
                token,
                finish=finish if index == len(ids) - 1 else "",
                logprobs=_logprobs(token, request.sampling.logprobs),
                **fields,
            )
            for index, token in enumerate(ids)
        ]

    return script


def then(script: Script, *steps: Step, after: int) -> Script:
    """The first `after` steps of a script, these steps, and the others."""

    def longer(request: Request) -> list[Step]:
        whole = list(script(request))
        return [*whole[:after], *steps, *whole[after:]]

    return longer


def _logprobs(token: int, alternatives: int | None) -> tuple[tuple[int, float], ...]:
    if alternatives is None:
        return ()
    others = tuple(((token + other) % 256, -0.5 - other) for other in range(alternatives))
    return ((token, -0.5), *others)


class FakeSequencer:
    """Plays a script per request; remembers what was asked and which answers were cut short."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.admitted: list[tuple[Standing, int]] = []
        self.refusal: BatonError | None = None
        self.cancelled: list[str] = []
        self.fallback = False  # whether answers are marked as read by a decode worker
        self.open: set[str] = set()
        self.idle = asyncio.Event()  # set when an answer was closed and none is open any more

    def admit(self, standing: Standing, requests: int = 1) -> None:
        self.admitted.append((standing, requests))
        if self.refusal is not None:
            raise self.refusal

    async def answer(
        self, request: Request, watch: Watch, standing: Standing | None = None
    ) -> AsyncGenerator[Token, None]:
        self.requests.append(request)
        self.open.add(request.id)
        watch.prefill_worker, watch.decode_worker = "p0", "d0"
        watch.fallback = self.fallback
        watch.spans |= {"queue": 0.001, "landing": 0.002, "prefill": 0.003}
        complete = False
        try:
            for step in self.script(request):
                if isinstance(step, Token):
                    complete = bool(step.finish)
                    yield step
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    complete = True
                    raise step
        finally:
            if not complete:
                self.cancelled.append(request.id)
            self.open.discard(request.id)
            if not self.open:
                self.idle.set()


class FakePools:
    """Ready or not, as the test says."""

    def __init__(self, ready: bool = True) -> None:
        self._ready = ready
        self._changed = asyncio.Event()

    def become(self, ready: bool) -> None:
        self._ready = ready
        self._changed.set()
        self._changed = asyncio.Event()

    def ready(self) -> bool:
        return self._ready

    def drain(self) -> None:
        self.become(False)

    def capacity(self) -> int | None:
        return None

    def status(self) -> dict[str, Any]:
        return {"ready": self._ready, "workers": []}

    async def changed(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            await self._changed.wait()


def byte_tokenizer(directory: Path) -> Tokenizer:
    """Writes the files of a model directory that the gateway reads, and reads them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: _byte_of(letter) for letter in letters}
    core = Core(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", special=True)])
    core.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(
        json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": END, "max_position_embeddings": 200})
    )
    return Tokenizer.from_dir(directory)


def _byte_of(letter: str) -> int:
    """Undo the byte-level alphabet: printable bytes stand for themselves, others follow U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    code = ord(letter)
    return code if code in printable else others[code - 256]


def make_gateway(
    directory: Path,
    sequencer: FakeSequencer,
    *,
    pools: FakePools | None = None,
    keys: Sequence[str] = (),
    max_model_len: int = 200,
    **options: Any,
) -> Gateway:
    """Not started: the caller starts and stops `gateway.text`."""
    tokenizer = byte_tokenizer(directory)
    return Gateway(
        limits=Limits(
            model_names=(MODEL,),
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            max_prompt_tokens=max_model_len - 1,
        ),
        eos_ids=(END,),
        tokenizer=tokenizer,
        text=TextPool(tokenizer),
        sequencer=sequencer,
        pools=pools or FakePools(),
        keys=Keys(keys),
        metrics=GatewayMetrics(MODEL, max_model_len),
        version="0.0.test",
        created=1_700_000_000,
        **options,
    )


@dataclass
class Reply:
    """What an ASGI application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sends: list[bytes] = field(default_factory=list)  # one per http.response.body
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.sends)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The SSE events, parsed as strictly as the strictest client does."""
        *lines, rest = self.body.decode().split("\n\n")
        assert rest == "", "the last event is cut"
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [
            line if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
            for line in lines
        ]


class Browser:
    """Calls an ASGI application as a server would, without a network."""

    def __init__(self, app: ASGIApp, key: str | None = None) -> None:
        self._app = app
        self._key = key

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.call("GET", path, **options)

    async def post(self, path: str, data: Any, **options: Any) -> Reply:
        return await self.call("POST", path, body=[json.dumps(data).encode()], **options)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Sequence[bytes] = (b"",),
        headers: Mapping[str, str] | None = None,
        more_headers: Iterable[tuple[bytes, bytes]] = (),
        leave: asyncio.Event | None = None,
        on_body: Callable[[bytes], None] | None = None,
        http_version: str = "1.1",
    ) -> Reply:
        """`leave` is when the client goes; `on_body` sees each piece of the response."""
        sent = {"host": "test", "content-type": "application/json", **(headers or {})}
        if self._key is not None:
            sent.setdefault("authorization", f"Bearer {self._key}")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": http_version,
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                *((k.encode("latin-1"), v.encode("latin-1")) for k, v in sent.items() if v),
                *more_headers,
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        reply = Reply()
        pieces = list(body)

        async def receive() -> Message:
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if leave is not None and leave.is_set():
                return
            if message["type"] == "http.response.start":
                assert reply.status == 0, "two answers to one request"
                reply.status = message["status"]
                reply.headers = {
                    name.decode("latin-1"): value.decode("latin-1")
                    for name, value in message["headers"]
                }
            else:
                reply.sends.append(message.get("body", b""))
                reply.complete = not message.get("more_body", False)
                if on_body is not None:
                    on_body(reply.sends[-1])

        await self._app(scope, receive, send)
        return reply
