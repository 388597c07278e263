"""SamplingTensors: how each row of a step chooses its token, on the device, in one upload."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.sequence import Sequence

Edits = tuple[
    npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]
]
"""tokens, biases, divisors, penalties of one row, aligned; each token once."""

_NO_EDITS: Final[Edits] = (
    np.empty(0, np.int32),
    np.empty(0, np.float32),
    np.empty(0, np.float32),
    np.empty(0, np.float32),
)

_DTYPES: Final[dict[str, torch.dtype]] = {
    "seeds": torch.int64,
    "top_ps": torch.float64,
    "choices": torch.int32,
    "positions": torch.int32,
    "temperatures": torch.float32,
    "top_ks": torch.int32,
    "log_min_ps": torch.float32,
    "starts": torch.int32,
    "tokens": torch.int32,
    "biases": torch.float32,
    "divisors": torch.float32,
    "penalties": torch.float32,
}
"""In the order of the upload."""


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """One entry per row of logits, and a list of logits to edit for each. Views of one buffer.

    Row i edits tokens[starts[i] : starts[i + 1]]: logit + bias, a positive one divided and any
    other multiplied by the divisor, minus the penalty. A banned token has the bias -inf.
    """

    seeds: Tensor  # [rows] int64, the bits of the unsigned seed
    top_ps: Tensor  # [rows] float64; 1 keeps all
    choices: Tensor  # [rows] int32
    positions: Tensor  # [rows] int32
    temperatures: Tensor  # [rows] float32; 0 is greedy
    top_ks: Tensor  # [rows] int32; 0 keeps all
    log_min_ps: Tensor  # [rows] float32; -inf keeps all
    starts: Tensor  # [rows + 1] int32
    tokens: Tensor  # [edits] int32
    biases: Tensor  # [edits] float32
    divisors: Tensor  # [edits] float32
    penalties: Tensor  # [edits] float32

    @classmethod
    def of(
        cls,
        sequences: Rows[Sequence],
        device: torch.device | str,
        said: Said | None = None,
    ) -> SamplingTensors:
        """For the next token of each sequence. `said`, kept by the caller from step to step, saves
        counting what was counted before. The upload is asynchronous; nothing waits for it."""
        said = Said() if said is None else said
        edits = said.edits(sequences)
        rows, count = len(sequences), sum(len(tokens) for tokens, *_ in edits)
        names = ("tokens", "biases", "divisors", "penalties")
        columns = {name: [edit[at] for edit in edits] for at, name in enumerate(names)}
        lengths = {name: rows for name in _DTYPES}
        lengths |= {"starts": rows + 1} | dict.fromkeys(columns, count)
        pinned = torch.device(device).type == "cuda"
        size = sum(_padded(lengths[name], dtype) for name, dtype in _DTYPES.items())
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        parts = _divide(host, lengths)
        for name, column in _rows(sequences).items():
            parts[name].numpy()[:] = column
        parts["starts"].numpy()[:] = np.cumsum([0, *(len(tokens) for tokens, *_ in edits)])
        for name, column in columns.items():
            np.concatenate([*column, parts[name].numpy()[:0]], out=parts[name].numpy())
        return cls(**_divide(host.to(device, non_blocking=True), lengths))


def _divide(buffer: Tensor, lengths: dict[str, int]) -> dict[str, Tensor]:
    """The columns, each at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that
    are not, and where they are must not depend on how many rows there are."""
    pieces = torch.split(buffer, [_padded(lengths[name], dtype) for name, dtype in _DTYPES.items()])
    return {
        name: piece.view(dtype)[: lengths[name]]
        for (name, dtype), piece in zip(_DTYPES.items(), pieces, strict=True)
    }


def _padded(length: int, dtype: torch.dtype) -> int:
    """Bytes, to a multiple of 16."""
    return -(-length * dtype.itemsize // 16) * 16


def _rows(sequences: Rows[Sequence]) -> dict[str, list[Any]]:
    """A greedy row has no filters: the definition ignores them."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "seeds",
            "top_ps",
            "choices",
            "positions",
            "temperatures",
            "top_ks",
            "log_min_ps",
        )
    }
    for sequence in sequences:
        sampling = sequence.request.sampling
        drawn = sampling.temperature > 0
        seed = sampling.seed & 0xFFFFFFFFFFFFFFFF
        columns["seeds"].append(seed - (1 << 64) if seed >> 63 else seed)
        columns["top_ps"].append(sampling.top_p if drawn else 1.0)
        columns["choices"].append(sampling.choice)
        columns["positions"].append(len(sequence.tokens))
        columns["temperatures"].append(sampling.temperature)
        columns["top_ks"].append(sampling.top_k if drawn else 0)
        filtered = drawn and sampling.min_p > 0
        columns["log_min_ps"].append(np.log(sampling.min_p) if filtered else -np.inf)
    return columns


class Said:
    """What each sequence that is penalised has said so far, so that a step counts only new tokens.

    Sequences that are not in a step are forgotten with it. Used by the step thread alone.
    """

    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = {}

    def edits(self, sequences: Rows[Sequence]) -> list[Edits]:
        """Of each sequence's next logits."""
        before, self._counts = self._counts, {}
        made = []
        for sequence in sequences:
            sampling = sequence.request.sampling
            repeated = sampling.repetition_penalty != 1
            if repeated or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
                counts = before.get(id(sequence))
                if counts is None:
                    counts = _Counts(sequence, prompt=repeated)
                self._counts[id(sequence)] = counts
                made.append(_edits(sequence, counts))
            else:
                made.append(_edits(sequence, None))
        return made


class _Counts:
    """The distinct tokens of one sequence, in order of appearance, and how often it answered each.

    Without `prompt`, of its answer alone. Holds the sequence, so its id is not another's.
    """

    def __init__(self, sequence: Sequence, prompt: bool) -> None:
        self._sequence = sequence
        self._places: dict[int, int] = {}
        self._tokens = np.empty(0, np.int32)
        self._answered = np.empty(0, np.int32)
        self._known = 0 if prompt else sequence.request.prompt_tokens

    def update(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], dict[int, int]]:
        """(distinct tokens, how often each is in the answer, where each stands)."""
        tokens, places = self._sequence.tokens, self._places
        if len(places) + len(tokens) - self._known > len(self._tokens):
            size = 2 * (len(places) + len(tokens) - self._known)
            self._tokens = np.resize(self._tokens, size) if places else np.empty(size, np.int32)
            grown = np.zeros(size, np.int32)
            grown[: len(places)] = self._answered[: len(places)]
            self._answered = grown
        for at in range(self._known, len(tokens)):
            place = places.setdefault(tokens[at], len(places))
            self._tokens[place] = tokens[at]
            self._answered[place] += at >= self._sequence.request.prompt_tokens
        self._known = len(tokens)
        return self._tokens[: len(places)], self._answered[: len(places)], places


def _edits(sequence: Sequence, counts: _Counts | None) -> Edits:
    sampling = sequence.request.sampling
    biases: dict[int, float] = {}
    for token, bias in sampling.logit_bias:
        biases[token] = biases.get(token, 0.0) + bias
    if sequence.next_index < sampling.min_tokens:
        biases |= dict.fromkeys(sampling.stop_token_ids, -np.inf)
    if counts is None and not biases:
        return _NO_EDITS
    said = answered = _NO_EDITS[0]
    places: dict[int, int] = {}
    if counts is not None:
        said, answered, places = counts.update()
    others = [token for token in biases if token not in places]
    tokens = np.concatenate((said, np.array(others, np.int32)))
    shifts = np.zeros(len(tokens), np.float32)
    divisors = np.ones(len(tokens), np.float32)
    penalties = np.zeros(len(tokens), np.float32)
    for at, token in enumerate(others, start=len(said)):
        shifts[at] = biases[token]
    for token in biases.keys() & places.keys():
        shifts[places[token]] = biases[token]
    divisors[: len(said)] = sampling.repetition_penalty
    penalties[: len(said)] = (
        sampling.presence_penalty * (answered > 0) + sampling.frequency_penalty * answered
    )
    return tokens, shifts, divisors, penalties
