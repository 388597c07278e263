"""EngineHere: a worker's model, pages, stage and runner in this process, stepped by hand.

All between an order and its tokens is what `baton worker` runs; gRPC, the event loop, the gateway
and the transfer of KV are left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from itertools import groupby

from cluster.clock import monotonic
from cluster.messages import (
    BOTH,
    PREFILL,
    Failed,
    Generate,
    KVLayout,
    LayerGroup,
    Peer,
    Prefill,
    Request,
    Sampling,
    Token,
)
from cluster.orders import Ordered
from decode.attention import make_attend as make_decode_attend
from decode.stage import DecodeStage
from engine import loop
from engine.allocator import Allocator
from engine.batch import Batch
from engine.blocks import BlockPool
from engine.cache import KVCache
from engine.cuda import CudaRunner
from engine.models.load import LoadedModel
from engine.runner import Runner
from kvtransfer.landing import Landings
from kvtransfer.sender import Announcement, Handoff
from prefill.attention import make_attend as make_prefill_attend
from prefill.stage import PrefillStage

_SESSION = 1
_BLOCK = 16
_CHUNK_BYTES = 2 << 20


class Nobody:
    """The sender of a worker whose prompts go nowhere."""

    def open(self, handoff: Handoff) -> None: ...

    def announce(self, request_id: str, attempt: int, announcement: Announcement) -> None: ...

    def finish(self, request_id: str, attempt: int) -> None: ...

    def cancel(self, request_id: str, attempt: int) -> None: ...


class HostTime:
    """A meter: of each step, the seconds that were the host's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def step(self, batch: Batch, forward_s: float, whole_s: float) -> None:
        self.seconds.append(max(0.0, whole_s - forward_s))


class EngineHere:
    """Owned by the thread that made it. `budget`: tokens a step, the size of a prompt's chunk.

    Prefix caching is off: a prompt that is measured is computed.
    """

    def __init__(
        self, loaded: LoadedModel, role: str, *, sequences: int, context: int, budget: int
    ) -> None:
        self.config, self._model = loaded.config, loaded.model
        ops, windows = self._model.ops, self.config.windows
        groups = tuple(
            LayerGroup(len(list(same)), self.config.kv_heads, self.config.head_dim, window)
            for window, same in groupby(windows)
        )
        layout = KVLayout(groups, str(ops.kv_dtype).removeprefix("torch."))
        blocks = sequences * (-(-context // _BLOCK) + 1)
        cache = KVCache(layout, blocks, _BLOCK, ops.device)
        pool = BlockPool(blocks, _BLOCK)
        allocator = Allocator(pool, lambda salt: b"bench" + salt, caching=False)
        self._role = role
        self._context, self._sequences, self._budget = context, sequences, budget
        self._numbers = itertools.count()
        self.host = HostTime()
        if role == PREFILL:
            self.stage: DecodeStage | PrefillStage = PrefillStage(
                cache,
                pool,
                allocator,
                windows,
                Nobody(),
                make_prefill_attend(ops.name),
                budget=budget,
                chunk_bytes=_CHUNK_BYTES,
                clock=monotonic,
            )
        else:
            self.stage = DecodeStage(
                cache,
                pool,
                allocator,
                windows,
                Landings(pool, cache, Peer("bench", 1), "", lease_s=60.0),
                make_decode_attend(ops.name),
                budget=budget,
                max_sequences=sequences,
                clock=monotonic,
            )
        self._steps = loop.Steps(self.stage, self._runner(()), self.host)

    def run_with(self, *, graphs: Sequence[int]) -> float:
        """Choose how steps run: from graphs of these sizes, else eager. May be called between any
        two. Returns the seconds to warm up.

        Without a GPU the kernels run as they are; those of plain torch have a runner of their own.
        """
        self._steps.settle()
        began = time.perf_counter()
        runner = self._runner(graphs)
        runner.warm_up(self.stage.attention)
        self._steps = loop.Steps(self.stage, runner, self.host)
        return time.perf_counter() - began

    def _runner(self, graphs: Sequence[int]) -> Runner | CudaRunner:
        if self._model.ops.name != "triton":
            return Runner(self._model)
        return CudaRunner(
            self._model,
            context=self._context,
            block_size=_BLOCK,
            sequences=self._sequences,
            tokens=self._budget,
            ahead=self._role == BOTH,
            graph_sizes=tuple(graphs),
        )

    def order(self, ids: Sequence[int], count: int, stop: Sequence[int] = ()) -> str:
        """A greedy answer of `count` tokens at most. Returns the request's id."""
        sampling = Sampling(max_tokens=count, temperature=0.0, stop_token_ids=tuple(stop))
        request = Request(str(next(self._numbers)), tuple(ids), sampling)
        order: Generate | Prefill = Generate(request, 1)
        if self._role == PREFILL:
            order = Prefill(request, None, 1)
        self.stage.apply(Ordered(_SESSION, order, 0.0))
        return request.id

    def step(self) -> list[Token]:
        """One step, as the loop of a worker takes it: of one before it, the tokens.

        Raises RuntimeError if a sequence has failed.
        """
        self._steps.step()
        return self._told()

    def finish(self) -> list[Token]:
        """Steps until nothing is left to do: all their tokens."""
        told = []
        while self._steps.step():
            told += self._told()
        return told + self._told()

    def settle(self) -> list[Token]:
        self._steps.settle()
        return self._told()

    def _told(self) -> list[Token]:
        events = [event for _, event in self.stage.mail()]
        failed = [event.code for event in events if isinstance(event, Failed)]
        if failed:
            raise RuntimeError(f"a sequence failed: {failed[0]}")
        return [event for event in events if isinstance(event, Token)]
