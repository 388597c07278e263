"""CudaRunner: steps on a GPU, from captured graphs where the step has one row for each sequence.

The host never waits inside a step: it fills a pinned buffer, queues one copy, the forward, and one
copy back, and looks at the result when it is asked for the outcome. What the next step needs of
this one, the sampled tokens, is already on the device, so that step can be queued before.

    pinned inbox --copy--> device inbox --graph(size)--> logits, tokens --copy--> pinned outbox
                           tokens, positions, slots, contexts, block table

A graph is captured for a few sizes; a smaller batch is padded with rows of no context, which write
nothing. Steps with prompt chunks are queued kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor

from cluster.errors import StartError
from cluster.messages import Request, Sampling
from engine.batch import Attention, Batch
from engine.kernels.sampling import sample
from engine.kernels.sampling_tensors import Said, SamplingTensors
from engine.layers.attention import Attend, Write
from engine.loop import Outcome
from engine.models.decoder import Decoder
from engine.pinned import BUFFERS, Inbox, Packed, Pinned
from engine.sampler import Sampled, is_plain
from engine.sequence import Sequence

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NO_SLOT = -1  # a row that pads: its keys and values go nowhere


def _of(batch: Batch) -> dict[str, Tensor]:
    return {
        "tokens": batch.tokens,
        "positions": batch.positions,
        "slots": batch.slots,
        "sampled_rows": batch.sampled_rows,
        "starts": batch.starts,
        "contexts": batch.contexts,
        "block_table": batch.block_table,
    }


@dataclass(frozen=True, slots=True)
class _Graph:
    """A forward for `size` sequences with one row each, on tensors that stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    logits: Tensor
    best: Tensor


class CudaRunner:
    """Owns the model. Called by the step thread alone.

    `context`: tokens of the longest sequence. `sequences`, `tokens`: the most of one step. `ahead`:
    let the step loop queue a step before it has seen the one before it. Without `graph_sizes`
    every step is queued kernel by kernel.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        context: int,
        block_size: int,
        sequences: int,
        tokens: int,
        ahead: bool,
        graph_sizes: tuple[int, ...] = GRAPH_SIZES,
    ) -> None:
        self.ahead = ahead
        self.pulse = 0  # layers and graphs launched so far
        self._model = model
        self._device = model.ops.device
        self._width = -(-context // block_size)
        self._sequences = sequences
        chunk = min(context, tokens)
        self._prompts = (chunk,) * (tokens // chunk)  # rows of each in a step as large as can be
        samples = max(sequences, tokens)
        self._sizes = tuple(size for size in graph_sizes if size <= samples)
        self._graphs: dict[int, _Graph] = {}
        self._inbox = Inbox(self._device)
        self._outbox = cycle([Pinned(self._device) for _ in range(BUFFERS)])
        self._said = Said()
        # Sample i of the step before: what a placeholder -1 - i stands for.
        self._last = torch.zeros(samples, dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def warm_up(self, attention: Attention) -> None:
        """Compile the kernels of every kind of step and capture the graphs.

        So that nothing is left to compile when a request comes, and what does not fit into memory
        shows now: raises StartError. Graphs are captured the largest first: the others fit into its
        memory.
        """
        try:
            self._warm_up(attention)
        except torch.OutOfMemoryError as error:
            raise StartError(
                "the KV cache leaves too little memory for the steps: fewer --num-blocks, less "
                "--kv-cache-memory-bytes or --max-num-batched-tokens"
            ) from error

    def _warm_up(self, attention: Attention) -> None:
        with self._on_device():
            for prompts in (self._prompts, (min(2, *self._prompts),)):  # long chunks, short ones
                for singles in (0, 1):
                    self._step_idle(self._idle(singles, prompts), attention)
            pool = None
            for size in sorted({*self._sizes, *_doubled(self._sequences)}, reverse=True):
                batch = self._idle(size)
                self._step_idle(batch, attention)
                if size not in self._sizes:
                    continue
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    logits, best = self._forward(batch, attention(batch), batch.sampled_rows)
                pool = graph.pool()
                self._graphs[size] = _Graph(graph, _of(batch), logits, best)

    def _step_idle(self, batch: Batch, attention: Attention) -> None:
        """Compile what such a step launches, and what chooses tokens other than the greedy ones."""
        logits, _ = self._forward(batch, attention(batch), batch.sampled_rows)
        anything = Sequence(Request("", (0,), Sampling(repetition_penalty=2.0)), 0, 0, 0.0)
        how = SamplingTensors.of([anything] * len(logits), self._device)
        sample(logits, how)

    @torch.inference_mode()
    def launch(self, batch: Batch, attention: Attention) -> Outcome:
        """Queue one step. The outcome has one Sampled for each of `batch.samples`, None where the
        logits were not finite."""
        with self._on_device():
            return self._launch(batch, attention)

    def _launch(self, batch: Batch, attention: Attention) -> Outcome:
        size = self._graph_size(batch)
        if size:
            logits, best = self._replay(self._graphs[size], batch)
        else:
            logits, best = self._queue(batch, attention)
        if not batch.samples:
            return list
        asked = [row for row, one in enumerate(batch.samples) if _asked(one) is not None]
        # Before what chooses edits them. Rows one by one: a list as an index would be waited for.
        raw = torch.stack([logits[row] for row in asked]).log_softmax(dim=-1) if asked else None
        if all(map(is_plain, batch.samples)):
            tokens = best
        else:
            how = SamplingTensors.of(batch.samples, self._device, self._said)
            tokens = sample(logits, how)
        self._last[: len(tokens)].copy_(tokens)
        found = {"tokens": tokens}
        if raw is not None:
            chosen = torch.stack([tokens[row] for row in asked]).clamp_(min=0)
            found["own"] = raw.gather(1, chosen[:, None])[:, 0]
            most = max(_asked(one) or 0 for one in batch.samples)
            found["likely"], found["likely_ids"] = raw.topk(most)
        return self._download(found, batch.samples)

    def _on_device(self) -> AbstractContextManager[object]:
        """Events, graphs and Triton go to the thread's current device, whatever their tensors."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _graph_size(self, batch: Batch) -> int:
        """The smallest graph that holds it; 0 if none does."""
        rows = len(batch.counts)
        if batch.single < rows or len(batch.samples) < rows or not self._graphs:
            return 0
        if batch.block_table.shape[1] > self._width:
            return 0
        return min((size for size in self._graphs if size >= rows), default=0)

    def _replay(self, graph: _Graph, batch: Batch) -> tuple[Tensor, Tensor]:
        rows, size = len(batch.counts), len(graph.best)
        width = batch.block_table.shape[1]
        padded = {
            "tokens": _padded(batch.tokens, size, 0),
            "positions": _padded(batch.positions, size, 0),
            "slots": _padded(batch.slots, size, _NO_SLOT),
            "contexts": _padded(batch.contexts, size, 0),
            "block_table": batch.block_table,
        }
        packed = Packed(padded)
        arrived = packed.views(self._inbox.upload(packed, padded))
        for name in ("tokens", "positions", "slots", "contexts"):
            graph.inputs[name].copy_(arrived[name])
        graph.inputs["block_table"][:rows, :width].copy_(arrived["block_table"])
        graph.graph.replay()
        self.pulse += 1
        return graph.logits[:rows], graph.best[:rows]

    def _queue(self, batch: Batch, attention: Attention) -> tuple[Tensor, Tensor]:
        values = _of(batch)
        packed = Packed(values)
        there = batch.on(**packed.views(self._inbox.upload(packed, values)))
        return self._forward(there, attention(there), there.sampled_rows)

    def _forward(self, batch: Batch, attend: Attend, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [samples, vocab], the largest entry of each), on the device."""

        def counted(layer: int, write: Write) -> Tensor:
            self.pulse += 1
            return attend(layer, write)

        known = batch.tokens
        before = (-1 - known).clamp_(0, len(self._last) - 1)
        tokens = torch.where(known < 0, self._last[before], known)
        hidden = self._model.forward(tokens, batch.positions, counted)
        logits = self._model.logits(hidden[rows])
        return logits, self._model.ops.argmax(logits)

    def _idle(self, singles: int, prompts: tuple[int, ...] = ()) -> Batch:
        """A batch that means nothing, in tensors of its own: `singles` first tokens, then prompts
        of so many rows. All read the first block and none writes."""
        counts = (1,) * singles + prompts
        starts = list(accumulate(counts, initial=0))

        def tensor(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        return Batch(
            tokens=tensor([0] * starts[-1], torch.int64),
            positions=tensor([at for count in counts for at in range(count)], torch.int64),
            slots=tensor([_NO_SLOT] * starts[-1], torch.int64),
            starts=tensor(starts),
            contexts=tensor(list(counts)),
            block_table=tensor([0]).expand(len(counts), self._width).contiguous(),
            sampled_rows=tensor([start - 1 for start in starts[1:]], torch.int64),
            samples=(),
            counts=counts,
            lengths=counts,
            single=singles,
        )

    def _download(self, found: dict[str, Tensor], sequences: tuple[Sequence, ...]) -> Outcome:
        packed, pinned = Packed(found), next(self._outbox)
        for name, view in packed.views(pinned.take(packed.bytes)).items():
            view.copy_(found[name], non_blocking=True)
        pinned.used()

        def outcome() -> list[Sampled | None]:
            here = packed.views(pinned.take(packed.bytes))  # waits for the copy
            return list(_sampled({name: view.tolist() for name, view in here.items()}, sequences))

        return outcome


def _doubled(most: int) -> Iterator[int]:
    """1, 2, 4 and so on, and `most`: kernels are compiled for as many rows as the next of them."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _asked(sequence: Sequence) -> int | None:
    """How many alternatives are to be told with its token's own log-probability, if that is."""
    return sequence.request.sampling.logprobs


def _padded(values: Tensor, size: int, padding: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, size - len(values)), value=padding)


def _sampled(
    found: dict[str, list[Any]], sequences: tuple[Sequence, ...]
) -> Iterator[Sampled | None]:
    told = zip(*(found.get(name, ()) for name in ("own", "likely_ids", "likely")), strict=True)
    for token, sequence in zip(found["tokens"], sequences, strict=True):
        logprobs: tuple[tuple[int, float], ...] = ()
        if (count := _asked(sequence)) is not None:
            own, ids, values = next(told)
            logprobs = ((token, own), *zip(ids[:count], values[:count], strict=True))
        yield None if token < 0 else Sampled(token, logprobs)
