"""cluster.messages <-> protobuf bytes, one pair of functions for each thing a stream carries.

gRPC gets these as its (de)serialisers, so nothing beyond this file sees a protobuf object and no
service stubs are needed. Decoding raises ValueError on bytes that are not the message.
"""

from __future__ import annotations

from itertools import groupby, starmap
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from cluster.messages import (
    Cancel,
    Event,
    Failed,
    Fingerprint,
    Generate,
    Hello,
    KVLayout,
    Landing,
    LayerGroup,
    Load,
    Order,
    Peer,
    Prefill,
    Promise,
    Promised,
    Report,
    Request,
    Sampling,
    Start,
    Token,
)
from cluster.wire import control_pb2 as pb

M = TypeVar("M", bound=Message)

SESSION = "/baton.cluster.v1.Worker/Session"
JOIN = "/baton.cluster.v1.Registry/Join"

_PLAIN = Token("", 0, 0, 0)[4:]


def encode_membership(message: Hello | Load) -> bytes:
    if isinstance(message, Hello):
        return pb.Membership(hello=_hello(message)).SerializeToString()
    return pb.Membership(load=_load(message)).SerializeToString()


def decode_membership(data: bytes) -> Hello | Load:
    message = _parse(pb.Membership(), data)
    if message.WhichOneof("of") == "hello":
        return _from_hello(message.hello)
    if message.WhichOneof("of") == "load":
        return _from_load(message.load)
    raise ValueError("membership message without content")


def encode_welcome(gateway: str) -> bytes:
    return pb.Welcome(gateway=gateway).SerializeToString()


def decode_welcome(data: bytes) -> str:
    return str(_parse(pb.Welcome(), data).gateway)


def encode_hello(hello: Hello) -> bytes:
    return _hello(hello).SerializeToString()


def decode_hello(data: bytes) -> Hello:
    return _from_hello(_parse(pb.Hello(), data))


def encode_order(order: Order) -> bytes:
    match order:
        case Promise(request, attempt):
            message = pb.Order(promise=pb.Promise(request=_request(request), attempt=attempt))
        case Prefill(request, landing, attempt):
            message = pb.Order(
                prefill=pb.Prefill(
                    request=_request(request),
                    landing=None if landing is None else _landing(landing),
                    attempt=attempt,
                )
            )
        case Start(request_id, first_token, attempt):
            message = pb.Order(
                start=pb.Start(request_id=request_id, first_token=first_token, attempt=attempt)
            )
        case Generate(request, attempt):
            message = pb.Order(generate=pb.Generate(request=_request(request), attempt=attempt))
        case Cancel(request_id, attempt):
            message = pb.Order(cancel=pb.Cancel(request_id=request_id, attempt=attempt))
    return message.SerializeToString()


def decode_order(data: bytes) -> Order:
    message = _parse(pb.Order(), data)
    match message.WhichOneof("of"):
        case "promise":
            return Promise(_from_request(message.promise.request), message.promise.attempt)
        case "prefill":
            body = message.prefill
            landing = _from_landing(body.landing) if body.HasField("landing") else None
            return Prefill(_from_request(body.request), landing, body.attempt)
        case "start":
            start = message.start
            return Start(start.request_id, start.first_token, start.attempt)
        case "generate":
            return Generate(_from_request(message.generate.request), message.generate.attempt)
        case "cancel":
            return Cancel(message.cancel.request_id, message.cancel.attempt)
    raise ValueError("order without content")


def encode_report(report: Report) -> bytes:
    """What is made for every token of every step is a row of four lists: a fourth of the time that
    a message for each takes."""
    message = pb.Report()
    add = message.events.add
    for plain, events in groupby(report.events, _is_plain):
        if plain:
            row, columns = add().tokens, zip(*events, strict=True)
            for field in (row.request_ids, row.attempts, row.indices, row.tokens):
                field.extend(next(columns))
        else:
            for event in events:
                _fill(add(), event)
    return message.SerializeToString()


def decode_report(data: bytes) -> Report:
    events: list[Event] = []
    for event in _parse(pb.Report(), data).events:
        if event.HasField("tokens"):
            row = event.tokens
            columns = row.request_ids, row.attempts, row.indices, row.tokens
            events += starmap(Token, zip(*columns, strict=True))
        else:
            events.append(_from_event(event))
    return Report(tuple(events))


def _parse(message: M, data: bytes) -> M:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ValueError("not a message of this protocol") from error
    return message


def _hello(hello: Hello) -> pb.Hello:
    return pb.Hello(
        protocol=hello.protocol,
        peer=_peer(hello.peer),
        role=hello.role,
        model=hello.model,
        config_digest=hello.fingerprint.config,
        weights_digest=hello.fingerprint.weights,
        layout=pb.KVLayout(
            groups=[
                pb.LayerGroup(
                    layers=group.layers,
                    kv_heads=group.kv_heads,
                    head_dim=group.head_dim,
                    window=group.window,
                )
                for group in hello.layout.groups
            ],
            dtype=hello.layout.dtype,
        ),
        control_address=hello.control_address,
        data_address=hello.data_address,
        block_size=hello.block_size,
        blocks=hello.blocks,
        max_model_len=hello.max_model_len,
    )


def _from_hello(hello: pb.Hello) -> Hello:
    return Hello(
        peer=_from_peer(hello.peer),
        role=hello.role,
        model=hello.model,
        fingerprint=Fingerprint(hello.config_digest, hello.weights_digest),
        layout=KVLayout(
            tuple(
                LayerGroup(group.layers, group.kv_heads, group.head_dim, group.window)
                for group in hello.layout.groups
            ),
            hello.layout.dtype,
        ),
        control_address=hello.control_address,
        data_address=hello.data_address,
        block_size=hello.block_size,
        blocks=hello.blocks,
        max_model_len=hello.max_model_len,
        protocol=hello.protocol,
    )


def _load(load: Load) -> pb.Load:
    return pb.Load(
        progress=load.progress,
        running=load.running,
        waiting=load.waiting,
        queued_tokens=load.queued_tokens,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        promised_blocks=load.promised_blocks,
        owned_blocks=load.owned_blocks,
        draining=load.draining,
        counters=dict(load.counters),
    )


def _from_load(load: pb.Load) -> Load:
    return Load(
        progress=load.progress,
        running=load.running,
        waiting=load.waiting,
        queued_tokens=load.queued_tokens,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        promised_blocks=load.promised_blocks,
        owned_blocks=load.owned_blocks,
        draining=load.draining,
        counters=tuple(sorted(load.counters.items())),
    )


def _peer(peer: Peer) -> pb.Peer:
    return pb.Peer(name=peer.name, incarnation=peer.incarnation)


def _from_peer(peer: pb.Peer) -> Peer:
    return Peer(peer.name, peer.incarnation)


def _request(request: Request) -> pb.Request:
    sampling = request.sampling
    return pb.Request(
        id=request.id,
        tokens=request.tokens,
        salt=request.salt,
        emitted=request.emitted,
        sampling=pb.Sampling(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            bias_tokens=[token for token, _ in sampling.logit_bias],
            bias_values=[value for _, value in sampling.logit_bias],
            seed=sampling.seed,
            choice=sampling.choice,
            stop_token_ids=sampling.stop_token_ids,
            logprobs=sampling.logprobs,
        ),
    )


def _from_request(request: pb.Request) -> Request:
    sampling = request.sampling
    return Request(
        id=request.id,
        tokens=tuple(request.tokens),
        salt=request.salt,
        emitted=request.emitted,
        sampling=Sampling(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=tuple(zip(sampling.bias_tokens, sampling.bias_values, strict=True)),
            seed=sampling.seed,
            choice=sampling.choice,
            stop_token_ids=tuple(sampling.stop_token_ids),
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ),
    )


def _landing(landing: Landing) -> pb.Landing:
    return pb.Landing(
        id=landing.id,
        generation=landing.generation,
        peer=_peer(landing.peer),
        address=landing.address,
        cached_tokens=landing.cached_tokens,
        lease_s=landing.lease_s,
    )


def _from_landing(landing: pb.Landing) -> Landing:
    return Landing(
        id=landing.id,
        generation=landing.generation,
        peer=_from_peer(landing.peer),
        address=landing.address,
        cached_tokens=landing.cached_tokens,
        lease_s=landing.lease_s,
    )


def _fill(message: pb.Event, event: Event) -> None:
    match event:
        case Token():
            _fill_token(message.token, event)
        case Promised(request_id, attempt, landing):
            message.promised.CopyFrom(
                pb.Promised(request_id=request_id, attempt=attempt, landing=_landing(landing))
            )
        case Failed(request_id, attempt, code, text):
            message.failed.CopyFrom(
                pb.Failed(request_id=request_id, attempt=attempt, code=code, message=text)
            )


def _fill_token(message: pb.Token, token: Token) -> None:
    """Field by field in place: with logprobs every token of a step comes here, and nested
    constructors take six times as long."""
    message.SetInParent()
    message.request_id = token.request_id
    message.attempt = token.attempt
    message.index = token.index
    message.token = token.token
    if token.finish:
        message.finish = token.finish
    if token.stop_token is not None:
        message.stop_token = token.stop_token
    if token.logprobs:
        tokens, values = zip(*token.logprobs, strict=True)
        message.logprob_tokens.extend(tokens)
        message.logprob_values.extend(values)
    if token.spans:
        message.spans.update(token.spans)
    if token.cached_tokens:
        message.cached_tokens = token.cached_tokens


def _from_event(event: pb.Event) -> Event:
    match event.WhichOneof("of"):
        case "promised":
            promised = event.promised
            return Promised(promised.request_id, promised.attempt, _from_landing(promised.landing))
        case "failed":
            failed = event.failed
            return Failed(failed.request_id, failed.attempt, failed.code, failed.message)
        case "token":
            return _from_token(event.token)
    raise ValueError("event without content")


def _is_plain(event: Event) -> bool:
    """A token with nothing else to tell."""
    return isinstance(event, Token) and event[4:] == _PLAIN


def _from_token(token: pb.Token) -> Token:
    chosen, values, spans = token.logprob_tokens, token.logprob_values, token.spans
    return Token(
        token.request_id,
        token.attempt,
        token.index,
        token.token,
        token.finish,
        token.stop_token if token.HasField("stop_token") else None,
        tuple(zip(chosen, values, strict=True)) if chosen or values else (),
        tuple(spans.items()) if spans else (),
        token.cached_tokens,
    )
