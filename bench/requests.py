"""Requests: a data set's samples as bodies ready to send."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from typing import Any

from bench import load
from bench.load import Sample
from bench.options import ServeOptions
from bench.vocabulary import Vocabulary
from cluster.errors import StartError

# The body as bytes, and its prompt's tokens as far as they are known (0: ask the server's usage).
Request = tuple[bytes, int]


async def prepare(
    options: ServeOptions, model: str, vocabulary: Vocabulary, count: int, seed: int
) -> list[Request]:
    """Make `count` requests before the clock runs. Raises StartError for data that is no good."""
    if count == 0:
        return []
    try:
        samples = await _samples(options, vocabulary, count, seed)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from None
    requests = []
    for sample in samples:
        if sample.is_chat and not options.is_chat:
            raise StartError("the data holds chat messages: use --backend openai-chat")
        if options.is_chat and isinstance(sample.prompt[0], int):
            text = await vocabulary.decode([token for token in sample.prompt if type(token) is int])
            sample = dataclasses.replace(sample, prompt=text)
        body = json.dumps(request_body(options, model, sample)).encode()
        requests.append((body, sample.prompt_tokens))
    return requests


async def _samples(
    options: ServeOptions, vocabulary: Vocabulary, count: int, seed: int
) -> list[Sample]:
    if options.dataset_name == "random":
        return load.random_samples(
            count,
            vocabulary.ids,
            input_len=options.random_input_len,
            output_len=options.random_output_len,
            range_ratio=options.random_range_ratio,
            prefix_len=options.random_prefix_len,
            seed=seed,
        )
    if options.dataset_name == "prefix_repetition":
        return load.prefix_repetition_samples(
            count,
            vocabulary.ids,
            prefix_len=options.prefix_repetition_prefix_len,
            suffix_len=options.prefix_repetition_suffix_len,
            num_prefixes=options.prefix_repetition_num_prefixes,
            output_len=options.prefix_repetition_output_len,
            seed=seed,
        )
    assert options.dataset_path is not None  # checked by ServeOptions
    if options.dataset_name == "custom":
        samples = load.read_custom(options.dataset_path, options.custom_output_len)
    else:
        rows = load.read_sharegpt(options.dataset_path, options.sharegpt_output_len)
        if not options.disable_shuffle:
            random.Random(seed).shuffle(rows)
        return await _measured(rows, vocabulary, count, seed)
    return load.draw(samples, count, seed, shuffle=not options.disable_shuffle)


async def _measured(
    rows: Sequence[Sample], vocabulary: Vocabulary, count: int, seed: int
) -> list[Sample]:
    """The first `count` conversations of usual length, their lengths counted by the vocabulary."""
    samples: list[Sample] = []
    for row in rows:
        if len(samples) == count:
            break
        assert isinstance(row.prompt, str)  # read_sharegpt makes no others
        prompt_tokens = len(await vocabulary.encode(row.prompt))
        output = row.output_tokens or len(await vocabulary.encode(row.answer))
        sample = dataclasses.replace(row, prompt_tokens=prompt_tokens, output_tokens=output)
        if load.is_usual_length(sample):
            samples.append(sample)
    if not samples:
        raise ValueError("no conversation of usual length (4 to 1024 prompt tokens) in the file")
    return load.draw(samples, count, seed, shuffle=False)


def request_body(options: ServeOptions, model: str, sample: Sample) -> dict[str, Any]:
    """The JSON body for a sample whose prompt fits the endpoint."""
    body: dict[str, Any] = {"model": model}
    if options.is_chat:
        body["messages"] = (
            sample.prompt if sample.is_chat else [{"role": "user", "content": sample.prompt}]
        )
        body["max_completion_tokens"] = sample.output_tokens
    else:
        body["prompt"] = sample.prompt
        body["max_tokens"] = sample.output_tokens
    body |= {"stream": True, "stream_options": {"include_usage": True}, **options.sampling}
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.timeline:
        body["return_timeline"] = True
    return body | options.extra_body
