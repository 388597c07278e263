"""What the processes say to each other, as frozen values.

`cluster.wire.codec` turns each into protobuf and back (proto/cluster/wire/control.proto is the
contract); everything else handles only these. Token positions count from the start of the prompt;
durations are seconds measured by the one process that names them (R9: never timestamps).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PROTOCOL = 2
"""Raised whenever a message or frame changes its meaning. Peers of another version are refused."""

PREFILL, DECODE, BOTH = "prefill", "decode", "both"
ROLES = (PREFILL, DECODE, BOTH)


# What the client asked.


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. Validated by the gateway; neutral values by default."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # always set: the gateway draws one where the client gave none
    choice: int = 0  # with seed and position the key of the noise
    stop_token_ids: tuple[int, ...] = ()  # the model's EOS ids are among them unless ignored
    logprobs: int | None = None  # alternatives per token beside the chosen one; None: no logprobs


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to one prompt; a client's n choices are n requests. Crosses every wall unchanged.

    `tokens` is the prompt, followed on a resumed attempt by the tokens the client already has, of
    which there are `emitted`.
    """

    id: str
    tokens: tuple[int, ...]
    sampling: Sampling = Sampling()
    salt: bytes = b""  # tenants with different salts share no cached prefix
    emitted: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.tokens) - self.emitted


# Who is there.


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker as one start of it: the incarnation is a larger number each time."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV has one shape. `window` is 0 for full attention."""

    layers: int
    kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What two workers must agree on to exchange KV. Block size is not among it."""

    groups: tuple[LayerGroup, ...]  # consecutive runs of layers, first layer first
    dtype: str  # float32, float16 or bfloat16

    @property
    def layers(self) -> int:
        return sum(group.layers for group in self.groups)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        itemsize = 4 if self.dtype == "float32" else 2
        return sum(2 * g.layers * g.kv_heads * g.head_dim * itemsize for g in self.groups)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which model, exactly: digests of its configuration with tokenizer, and of its weights."""

    config: str
    weights: str


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on every connection between two processes."""

    peer: Peer
    role: str
    model: str
    fingerprint: Fingerprint
    layout: KVLayout
    control_address: str = ""  # host:port of the worker's gRPC server
    data_address: str = ""  # ZeroMQ endpoint that takes KV; empty on a pure prefill worker
    block_size: int = 0
    blocks: int = 0
    max_model_len: int = 0
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's state, sent several times a second.

    `progress` counts passes of the step loop, so a hung loop shows although its transport answers.
    """

    progress: int
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens not yet computed
    free_blocks: int = 0
    cached_blocks: int = 0
    promised_blocks: int = 0
    owned_blocks: int = 0
    draining: bool = False
    counters: tuple[tuple[str, float], ...] = ()  # cumulative since start, by metric name


# Gateway to worker. (request, attempt) names the addressee; an older attempt is a no-op (R6).


@dataclass(frozen=True, slots=True)
class Landing:
    """The blocks a decode worker promised, as the prefill worker needs to know them."""

    id: str
    generation: int
    peer: Peer
    address: str
    cached_tokens: int  # the decode worker has these already: send only the rest
    lease_s: float


@dataclass(frozen=True, slots=True)
class Promise:
    """To a decode worker: allocate a landing for this request."""

    request: Request
    attempt: int = 1

    @property
    def request_id(self) -> str:
        return self.request.id


@dataclass(frozen=True, slots=True)
class Prefill:
    """To a prefill worker: compute the prompt, push its KV, sample the first token.

    Without a landing one token was asked for and nothing is pushed.
    """

    request: Request
    landing: Landing | None
    attempt: int = 1

    @property
    def request_id(self) -> str:
        return self.request.id


@dataclass(frozen=True, slots=True)
class Start:
    """To the decode worker that promised: go on from this first token once sealed."""

    request_id: str
    first_token: int
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Generate:
    """To a decode worker: do all of it, prefill included. What the `both` role is for."""

    request: Request
    attempt: int = 1

    @property
    def request_id(self) -> str:
        return self.request.id


@dataclass(frozen=True, slots=True)
class Cancel:
    """To either side, in any phase, any number of times."""

    request_id: str
    attempt: int = 1


Order = Promise | Prefill | Start | Generate | Cancel


# Worker to gateway: one Report per step.


@dataclass(frozen=True, slots=True)
class Promised:
    request_id: str
    attempt: int
    landing: Landing


class Token(NamedTuple):
    """One sampled token. `index` counts this answer's tokens from 0 across all attempts.

    `logprobs` holds (token, logprob): the chosen token first, then the most likely ones.
    `spans` are named durations that ended with this token, for the timeline.
    """

    request_id: str
    attempt: int
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody calls
    token: int
    finish: str = ""  # "stop", "length" or not yet
    stop_token: int | None = None  # the token id that stopped it, if the client had named it
    logprobs: tuple[tuple[int, float], ...] = ()
    spans: tuple[tuple[str, float], ...] = ()
    cached_tokens: int = 0  # with the first token: prompt tokens that a prefix cache held


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker gave the request up and freed what it held. `code` names a class of errors.

    codes: full (a landing cannot be promised now), too_large (it never can), draining (nothing new
    is taken), given_back (what was taken is not finished, since the worker ends), transfer_failed,
    lease_expired, engine_error, wrong_role (a bug of the gateway's).
    """

    request_id: str
    attempt: int
    code: str
    message: str = ""


Event = Promised | Token | Failed


@dataclass(frozen=True, slots=True)
class Report:
    """All that one step (or one order) had to tell one gateway."""

    events: tuple[Event, ...] = field(default=())
