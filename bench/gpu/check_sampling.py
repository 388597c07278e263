"""Tokens drawn on the device against those of engine/sampler.py on the host, one by one."""

from __future__ import annotations

import random

import torch

from bench.gpu.setting import Rows, Setting, checked
from cluster.messages import Request, Sampling
from engine.kernels.sampling import sample, sample_reference
from engine.kernels.sampling_tensors import SamplingTensors
from engine.sampler import sample as sample_on_host
from engine.sequence import Sequence


def drawing(setting: Setting) -> Rows:
    """Rows with all kinds of filters and penalties at once, and one that is broken."""
    rows, vocab = setting.sizes.draws, setting.sizes.vocab
    for spread in (1.0, 3.0, 8.0):
        logits = torch.randn(
            (rows, vocab), generator=setting.random(int(spread)), device=setting.place
        )
        logits *= spread
        logits[rows // 2, vocab // 2] = float("nan")
        sequences = _sequences(setting, rows, f"{setting.seed} {spread}")
        wanted = [
            -1 if one is None else one.token
            for one in sample_on_host(logits.cpu().clone(), sequences)
        ]
        how = SamplingTensors.of(sequences, setting.place)
        got = sample(logits, how).tolist()
        wrong = [
            str(sequence.request.sampling)
            for sequence, token, mine in zip(sequences, wanted, got, strict=True)
            if token != mine
        ]
        yield checked(
            f"{rows}x{vocab}, spread {spread:g}: other tokens", len(wrong), 0, wrong=wrong
        )


def ties(setting: Setting) -> Rows:
    """Logits as a bf16 head makes them: the filters' borders lie among equal ones."""
    rows, vocab = max(4, setting.sizes.draws // 4), setting.sizes.vocab
    logits = torch.randn((rows, vocab), generator=setting.random(9), device=setting.place)
    logits = (3 * logits).mul_(32).round_().div_(32)
    how = SamplingTensors.of(_sequences(setting, rows, f"{setting.seed} ties"), setting.place)
    wanted = sample_reference(logits, how)
    wrong = int((sample(logits.clone(), how) != wanted).sum())
    yield checked(f"{rows}x{vocab} with ties: other tokens", wrong, 0)


def _sequences(setting: Setting, rows: int, seed: str) -> list[Sequence]:
    dice, vocab = random.Random(seed), setting.sizes.vocab
    made = []
    for row in range(rows):
        penalised = dice.random() < 0.3
        sampling = Sampling(
            temperature=dice.choice((0.0, 0.3, 0.7, 1.0, 1.5)),
            top_k=dice.choice((0, 0, 1, 20, 50, 1000)),
            top_p=dice.choice((1.0, 1.0, 0.5, 0.9, 0.95, 0.999)),
            min_p=dice.choice((0.0, 0.0, 0.05, 0.5)),
            presence_penalty=dice.choice((0.0, 0.5)) if penalised else 0.0,
            frequency_penalty=dice.choice((0.0, -0.3, 0.4)) if penalised else 0.0,
            repetition_penalty=dice.choice((1.0, 1.2, 0.9)) if penalised else 1.0,
            logit_bias=((dice.randrange(vocab), 5.0),) if dice.random() < 0.1 else (),
            seed=dice.getrandbits(64),
            choice=row % 3,
            max_tokens=1000,
        )
        prompt = tuple(dice.randrange(vocab) for _ in range(dice.randrange(1, 200)))
        sequence = Sequence(Request(str(row), prompt, sampling), 1, 1, 0.0)
        sequence.tokens += [dice.randrange(vocab) for _ in range(dice.randrange(100))]
        made.append(sequence)
    return made
