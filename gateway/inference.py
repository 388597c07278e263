"""The gRPC door: baton.v1.Inference, health and reflection (proto/cluster/wire/inference.proto).

A message becomes the dict that the same call would have been over HTTP, so one validator holds for
both. Messages are parsed here and not by gRPC, which would report a malformed one as INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster import rpc
from cluster.errors import BadRequest, BatonError, Cancelled, DeadlineExceeded
from cluster.ids import label, new_id
from cluster.process import REQUEST
from cluster.wire import inference_pb2 as wire
from gateway import validate
from gateway.ask import Ask, Limits
from gateway.gateway import Gateway
from gateway.parse import SMALL_BODY
from gateway.pools import Pools
from gateway.reattach import Claim, Sink, digest_of, key_of
from gateway.rpc_status import trailing_metadata
from gateway.stream import Answer, Delta

log = logging.getLogger(__name__)

SERVICE: Final = "baton.v1.Inference"
HEALTH: Final = "grpc.health.v1.Health"

_WATCH_S = 60.0

LAST_WORD_S = 1.0
"""How long a client that has stopped reading may hold up the end of its own call."""


def add_to_server(server: grpc.aio.Server, gateway: Gateway) -> None:
    """Before the server starts. Message size and stream limits are the server's options.

    Health and reflection ask for no key: a probe has none, and what they tell is no secret.
    """
    service = InferenceService(gateway)
    methods = {
        "Generate": grpc.unary_unary_rpc_method_handler(service.generate),
        "GenerateStream": grpc.unary_stream_rpc_method_handler(service.generate_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    health = Health(gateway.pools)
    probes = {
        "Check": grpc.unary_unary_rpc_method_handler(health.check),
        "Watch": grpc.unary_stream_rpc_method_handler(health.watch),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH, probes),))
    services = reflection.aio.ReflectionServicer((SERVICE, HEALTH, reflection.SERVICE_NAME))
    server.add_generic_rpc_handlers(
        (
            rpc.stream_handler(
                f"/{reflection.SERVICE_NAME}/ServerReflectionInfo",
                services.ServerReflectionInfo,
                reflection_pb2.ServerReflectionRequest.FromString,
                reflection_pb2.ServerReflectionResponse.SerializeToString,
            ),
        )
    )


class InferenceService:
    """Both methods take and give bytes; a failure ends the call with a status."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def generate(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        client = _Client(context, self._gateway.write_timeout_s, streamed=False)
        await self._served(client, lambda: self._answer(data, client, "Generate"))
        return client.whole

    async def generate_stream(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        client = _Client(context, self._gateway.write_timeout_s, streamed=True)
        await self._served(client, lambda: self._answer(data, client, "GenerateStream"))

    async def _answer(self, data: bytes, client: _Client, method: str) -> None:
        """One call: made for this client alone or, with an idempotency-key, for who comes back."""
        gateway = self._gateway
        arrived = gateway.clock()
        tenant = gateway.keys.tenant(client.values("authorization"))
        client.quotas = partial(gateway.quotas.headers, tenant)
        key = key_of(client.values("idempotency-key"))
        gateway.check_pressure()
        async with gateway.calls.within(client.seconds(gateway.request_timeout_s)):
            ask = await self._read(data, tenant.limits(gateway.limits))
            claim = None
            if key is not None:
                claim = Claim(tenant.salt, key, digest_of(method.encode(), data))

            async def make(sink: Sink) -> None:
                gateway.calls.admit()
                async with gateway.calls.within(gateway.request_timeout_s):
                    answer = await Answer.prepare(gateway, ask, tenant, arrived)
                    await self._make(ask, answer, client.streamed, sink)

            lost = partial(gateway.account_for, request_id=client.request_id)
            await gateway.kept.deliver(claim, make, client, lost)

    async def _make(self, ask: Ask, answer: Answer, streamed: bool, sink: Sink) -> None:
        """All its messages, or the only one."""
        head = wire.GenerateResponse(
            id=f"gen-{new_id()}",
            created=int(self._gateway.wall_clock()),
            model=self._gateway.limits.model_names[0],
        )
        by_choice: dict[int, list[Delta]] = {}

        async def collect(arrived: list[Delta]) -> None:
            for delta in arrived:
                by_choice.setdefault(delta.choice, []).append(delta)

        async def write(arrived: list[Delta]) -> None:
            message = wire.GenerateResponse()
            message.CopyFrom(head)
            for delta in arrived:
                if delta.text or delta.finish:
                    self._add_choice(message, ask, [delta])
            if message.choices:
                sink.fallback = answer.fallback
                await sink.write(message.SerializeToString())

        await answer.run(write if streamed else collect)
        for index in sorted(by_choice):
            self._add_choice(head, ask, by_choice[index])
        _add_end(head, ask, answer)
        sink.fallback = answer.fallback
        await sink.write(head.SerializeToString())

    async def _read(self, data: bytes, limits: Limits) -> Ask:
        """Parse and validate; a large message off the event loop.

        Raises BadRequest, NotFound, Forbidden.
        """
        defaults = self._gateway.defaults

        def work() -> Ask:
            kind, fields = to_fields(
                data, allow_unknown=limits.allow_unknown_fields, longest=limits.max_model_len
            )
            validator = validate.chat if kind == "chat" else validate.completion
            return validator(fields, limits, defaults)

        if len(data) <= SMALL_BODY:
            return work()
        return await self._gateway.text.run(work)

    async def _served(self, client: _Client, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work of one call; the one place where an error becomes a gRPC status."""
        gateway = self._gateway
        REQUEST.set(client.request_id)
        gateway.active += 1
        code = "ok"
        try:
            await work()
            client.end()
        except asyncio.CancelledError:
            code = Cancelled.code
            gateway.metrics.cancelled()
            raise
        except Exception as error:
            known = gateway.account_for(error, client.request_id)
            code = known.code
            await client.abort(known)
        finally:
            gateway.active -= 1
            log.info("grpc request", extra={"request_id": client.request_id, "code": code})

    def _add_choice(
        self, response: wire.GenerateResponse, ask: Ask, deltas: Sequence[Delta]
    ) -> None:
        last = deltas[-1]
        choice = response.choices.add(
            index=last.choice,
            text="".join(delta.text for delta in deltas),
            finish_reason=last.finish,
        )
        if ask.return_token_ids:
            for delta in deltas:
                choice.token_ids.extend(delta.tokens)
        for delta in deltas:
            for chosen, *others in delta.logprobs:
                entry = choice.logprobs.add()
                self._name(entry, *chosen)
                for other in others:
                    self._name(entry.top_logprobs.add(), *other)
        if isinstance(last.stop_reason, str):
            choice.stop_string = last.stop_reason
        elif last.stop_reason is not None:
            choice.stop_token_id = last.stop_reason

    def _name(self, entry: wire.TokenLogprob, token: int, logprob: float) -> None:
        entry.token_id = token
        entry.token = self._gateway.tokenizer.token_text(token)
        entry.bytes = self._gateway.tokenizer.token_bytes(token)
        entry.logprob = logprob


class _Client:
    """Who called, and where the answer goes."""

    def __init__(
        self, context: grpc.aio.ServicerContext, write_timeout_s: float, streamed: bool
    ) -> None:
        self.streamed = streamed
        self.whole = b""
        self.fallback = False
        self.reattached = False
        self.request_id = _request_id(context)
        self.quotas: Callable[[], list[tuple[bytes, bytes]]] = list  # what is left of its key's
        self._context = context
        self._write_timeout_s = write_timeout_s
        self._started = False

    def values(self, name: str) -> list[bytes]:
        """All metadata of this name."""
        metadata = self._context.invocation_metadata() or ()
        return [_bytes(value) for key, value in metadata if key == name]

    def seconds(self, most: float) -> float:
        """How long it waits. Raises DeadlineExceeded."""
        remaining = self._context.time_remaining()
        if remaining is None:
            return most
        if remaining <= 0:
            raise DeadlineExceeded("The deadline had passed before the work began.")
        return min(most, float(remaining))

    async def write(self, data: bytes) -> None:
        """The next message, or the only one. Raises Cancelled if the client does not read."""
        if not self._started:
            self._started = True
            marks = [("baton-fallback", "decode-prefill")] * self.fallback
            marks += [("baton-reattached", "true")] * self.reattached
            if marks:
                await self._context.send_initial_metadata(tuple(marks))
        if not self.streamed:
            self.whole = data
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._context.write(data)
        except TimeoutError:
            raise Cancelled("The client has stopped reading.") from None

    def end(self) -> None:
        """All went well."""
        self._context.set_trailing_metadata((("x-request-id", self.request_id), *self._left()))

    def _left(self) -> Iterator[tuple[str, str]]:
        return ((name.decode(), value.decode()) for name, value in self.quotas())

    async def abort(self, error: BatonError) -> None:
        """gRPC sends the status after what was written: a client that does not read gets neither,
        and nobody waits for it."""
        trailing = (*trailing_metadata(error, self.request_id), *self._left())
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                await self._context.abort(grpc.StatusCode[error.grpc], error.message, trailing)


class Health:
    """SERVING while the pools can take work; asked of the pools each time, so never stale."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    async def check(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        status = self._status(await _asked(data, context))
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return _said(status)

    async def watch(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        service, told = await _asked(data, context), None
        while True:
            status = self._status(service)
            if status != told:
                told = status
                await context.write(_said(status))
                continue  # it may have changed during the write; nothing else wakes us then
            with suppress(TimeoutError):
                await self._pools.changed(_WATCH_S)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in ("", SERVICE):
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._pools.ready():
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING


async def _asked(data: bytes, context: grpc.aio.ServicerContext) -> str:
    try:
        return str(health_pb2.HealthCheckRequest.FromString(data).service)
    except DecodeError:
        text = "The message is no HealthCheckRequest."
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        raise  # abort has raised already


def _said(status: health_pb2.HealthCheckResponse.ServingStatus) -> bytes:
    return bytes(health_pb2.HealthCheckResponse(status=status).SerializeToString())


def to_fields(
    data: bytes, *, allow_unknown: bool = False, longest: int | None = None
) -> tuple[str, dict[str, Any]]:
    """The kind of call and the JSON body that says the same. Raises BadRequest.

    Of prompt token ids it takes one more than the `longest` prompt has, which is refused then.
    """
    message = wire.GenerateRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise BadRequest("The message is no GenerateRequest.", code="invalid_message") from None
    parts: Iterable[Message] = (message, message.prompt_token_ids, *message.messages.messages)
    if not allow_unknown and any(len(UnknownFieldSet(part)) for part in parts):
        raise BadRequest("The message has a field unknown here.", code="unknown_parameter")
    kind = "chat" if message.WhichOneof("input") == "messages" else "completion"
    fields: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        name = descriptor.name
        match name:
            case "prompt_token_ids":
                fields["prompt"] = value.ids[: None if longest is None else longest + 1]
            case "messages":
                fields[name] = [{"role": m.role, "content": m.content} for m in value.messages]
            case "logit_bias":
                fields[name] = {str(token): bias for token, bias in value.items()}
            case "stop" | "stop_token_ids":
                fields[name] = list(value)
            case "logprobs" if kind == "chat":
                fields |= {"logprobs": True, "top_logprobs": value}
            case _:
                fields[name] = value
    return kind, fields


def _add_end(response: wire.GenerateResponse, ask: Ask, answer: Answer) -> None:
    usage = answer.usage
    response.usage.prompt_tokens = usage.prompt_tokens
    response.usage.completion_tokens = usage.completion_tokens
    response.usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
    response.usage.cached_tokens = usage.cached_tokens
    if ask.return_timeline:
        for name, value in answer.timeline().items():
            if isinstance(value, dict):
                response.metrics.timeline_ms.update(value)
            elif isinstance(value, list):
                response.metrics.recoveries.extend(wire.Recovery(**loss) for loss in value)
            elif value is not None:
                setattr(response.metrics, name, value)


def _request_id(context: grpc.aio.ServicerContext) -> str:
    metadata = context.invocation_metadata() or ()
    return label([_bytes(value) for name, value in metadata if name == "x-request-id"])


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
