"""The load: when requests arrive and what they ask, as pure functions of a seed and a file."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bounds on a ShareGPT conversation, in tokens: what the field's benchmarks keep of that file.
_MIN_TOKENS = 4
_MAX_PROMPT_TOKENS = 1024
_MAX_TOTAL_TOKENS = 2048


@dataclass(frozen=True)
class Sample:
    """One request to send: a prompt as text, token ids or chat messages, and its answer's length.

    `prompt_tokens` is 0 where only the server can count them; `output_tokens` None leaves the
    length to the data set's own answer, given in `answer`.
    """

    prompt: str | list[int] | list[dict[str, Any]]
    output_tokens: int | None
    prompt_tokens: int = 0
    answer: str = ""

    @property
    def is_chat(self) -> bool:
        return bool(self.prompt) and isinstance(self.prompt[0], dict)


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the run's start to each of `count` arrivals, ascending.

    Gaps are gamma distributed with shape `burstiness` and mean 1/rate (burstiness 1 is a Poisson
    process, infinite burstiness is a metronome), then stretched so that the last arrival is at
    count/rate whatever the seed drew. An infinite rate is all at once.
    Source: `vllm bench serve`, --request-rate and --burstiness.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [(index + 1) / rate for index in range(count)]
    rng = random.Random(seed)
    gaps = [rng.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(count)]
    times = list(itertools.accumulate(gaps))
    if not times or times[-1] == 0.0:
        return times
    stretch = count / rate / times[-1]
    return [time * stretch for time in times]


def random_samples(
    count: int,
    allowed_ids: Sequence[int],
    *,
    input_len: int,
    output_len: int,
    range_ratio: float,
    prefix_len: int,
    seed: int,
) -> list[Sample]:
    """Prompts of random ids behind one shared prefix; lengths uniform within +-range_ratio.

    The prefix comes on top of `input_len`. Raises ValueError when a prompt could be empty.
    """
    low, high = _length_range(input_len, range_ratio)
    if prefix_len + low < 1:
        raise ValueError("--random-input-len and --random-prefix-len leave prompts without tokens")
    out_low, out_high = _length_range(output_len, range_ratio)
    rng = random.Random(seed)
    prefix = rng.choices(allowed_ids, k=prefix_len)
    samples = []
    for _ in range(count):
        prompt = prefix + rng.choices(allowed_ids, k=rng.randint(low, high))
        output = rng.randint(max(out_low, 1), max(out_high, 1))
        samples.append(Sample(prompt, output, prompt_tokens=len(prompt)))
    return samples


def prefix_repetition_samples(
    count: int,
    allowed_ids: Sequence[int],
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    seed: int,
) -> list[Sample]:
    """Prompts that share `num_prefixes` prefixes evenly, shuffled, each with its own suffix."""
    rng = random.Random(seed)
    prefixes = [rng.choices(allowed_ids, k=prefix_len) for _ in range(num_prefixes)]
    samples = []
    for index in range(count):
        prompt = prefixes[index % num_prefixes] + rng.choices(allowed_ids, k=suffix_len)
        samples.append(Sample(prompt, output_len, prompt_tokens=len(prompt)))
    rng.shuffle(samples)
    return samples


def read_custom(path: Path, output_len: int) -> list[Sample]:
    """Read JSONL lines with `prompt` (text or token ids) or `messages`.

    An `output_len` of -1 takes each line's own `output_tokens`. Raises ValueError, naming the
    line, for anything else, and OSError for a file that cannot be read.
    """
    samples = []
    for row, where in _json_lines(path.read_text(encoding="utf-8"), path):
        prompt: Any = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
        if not _is_prompt(prompt):
            raise ValueError(f"{where}: needs `prompt` (text or token ids) or `messages`")
        output = row.get("output_tokens") if output_len == -1 else output_len
        if not isinstance(output, int) or isinstance(output, bool) or output < 1:
            raise ValueError(f"{where}: `output_tokens` must be a positive integer")
        known = len(prompt) if isinstance(prompt[0], int) else 0
        samples.append(Sample(prompt, output, prompt_tokens=known))
    if not samples:
        raise ValueError(f"{path}: no prompts in the file")
    return samples


def read_sharegpt(path: Path, output_len: int | None) -> list[Sample]:
    """Read ShareGPT conversations, a JSON list or JSONL: the first turn asks, the second answers.

    Without `output_len` a sample keeps the answer, from whose length the caller sets its own.
    Raises ValueError for a file of another shape and OSError for one that cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        rows = _parse(text, str(path))
    else:
        rows = [row for row, _ in _json_lines(text, path)]
    samples = []
    for row in rows:
        turns = row.get("conversations") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{path}: an entry has no list of `conversations`")
        texts = [turn.get("value") for turn in turns[:2]]
        if len(texts) == 2 and all(isinstance(text, str) and text for text in texts):
            samples.append(Sample(texts[0], output_len, answer=texts[1]))
    if not samples:
        raise ValueError(f"{path}: no conversation with two turns in the file")
    return samples


def is_usual_length(sample: Sample) -> bool:
    """Whether a ShareGPT sample with known lengths is neither trivial nor over-long."""
    output = sample.output_tokens or 0
    return (
        sample.prompt_tokens >= _MIN_TOKENS
        and output >= _MIN_TOKENS
        and sample.prompt_tokens <= _MAX_PROMPT_TOKENS
        and sample.prompt_tokens + output <= _MAX_TOTAL_TOKENS
    )


def draw(samples: Sequence[Sample], count: int, seed: int, *, shuffle: bool) -> list[Sample]:
    """Take `count` of a file's samples; a file that is too short repeats some at random."""
    rng = random.Random(seed)
    taken = list(samples)
    if shuffle:
        rng.shuffle(taken)
    taken = taken[:count]
    return taken + rng.choices(samples, k=count - len(taken))


def _length_range(length: int, ratio: float) -> tuple[int, int]:
    return math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))


def _json_lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Yield each line's value with the words that name the line in a message."""
    # Not splitlines(): that also breaks at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _parse(line, where), where


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    if not isinstance(prompt, list) or not prompt:
        return False
    kind = type(prompt[0])
    return kind in (int, dict) and all(type(item) is kind for item in prompt)
