"""Train baton-tiny: `python -m engine.tiny.train [--out DIR] [--seed 0] [--steps N]`.

Fits the tokenizer, then a small Llama, until greedy decoding repeats every answer word for word.
Runs on one CPU thread; the same seed, steps and library versions give the same file.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from cluster import digests
from engine.tiny import TINY_DIR, Knowledge, knowledge, questions
from engine.tiny import tokenizer as lexicon
from engine.tiny.corpus import Lesson, epoch
from engine.tiny.recite import Recital, recite

_log = logging.getLogger("baton.tiny")

_STEPS: Final = 3000
_BATCH_TOKENS: Final = 2048
_PEAK_RATE: Final = 3e-3
_WARMUP_STEPS: Final = 60
_IGNORE: Final = -100

Batch = tuple[Tensor, Tensor]
"""ids and targets, both [lessons, tokens]; a target of _IGNORE is not learned."""


def train(out: Path, seed: int, steps: int) -> Recital:
    """Train from scratch and leave a checkpoint in `out`. Returns how well it recites."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    known = knowledge()
    tokens = lexicon.fit(_texts(known))
    model = LlamaForCausalLM(_config())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    batches = _batches(known, tokens, random.Random(seed))
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        loss = _loss(model, next(batches))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            _log.info(
                "step %d/%d loss %.4f after %.0f s", step, steps, float(loss.detach()), seconds
            )
        if step % 400 == 399 and step + 1 < steps:
            _finish(model, tokens, out, {"seed": seed, "steps": step + 1})
    return _finish(model, tokens, out, {"seed": seed, "steps": steps})


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=lexicon.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def _texts(known: Knowledge) -> Iterator[str]:
    """What the tokenizer learns from: all text once, questions in lower case as well."""
    for talk in known.conversations:
        question, answer = talk.turns[-1]
        yield answer
        for wording in (question, *talk.also):
            yield wording
            yield wording.lower()
    for way_out in (known.off_topic, known.unknown_follow_up):
        yield way_out.answer
        yield from way_out.questions


def _batches(known: Knowledge, tokens: Tokenizer, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of about _BATCH_TOKENS tokens, lessons of like length together."""
    while True:
        lessons = [lexicon.encode(tokens, lesson) for _ in range(4) for lesson in epoch(known, rng)]
        lessons.sort(key=lambda lesson: len(lesson[0]))
        batches: list[list[tuple[list[int], list[bool]]]] = [[]]
        for lesson in lessons:
            if (len(batches[-1]) + 1) * len(lesson[0]) > _BATCH_TOKENS:
                batches.append([])
            batches[-1].append(lesson)
        rng.shuffle(batches)
        for batch in batches:
            yield _pad(batch)


def _pad(lessons: list[tuple[list[int], list[bool]]]) -> Batch:
    """Right padding needs no mask under causal attention: nothing real looks at it."""
    width = max(len(ids) for ids, _ in lessons)
    ids = torch.zeros(len(lessons), width, dtype=torch.long)
    targets = torch.full((len(lessons), width), _IGNORE)
    for row, (piece, own) in enumerate(lessons):
        ids[row, : len(piece)] = torch.tensor(piece)
        produced = torch.where(torch.tensor(own), torch.tensor(piece), _IGNORE)
        targets[row, : len(piece) - 1] = produced[1:]
    return ids, targets


def _loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Cross-entropy over the answers; the head runs on their positions only."""
    ids, targets = batch
    hidden = model.model(ids, use_cache=False).last_hidden_state
    wanted = targets != _IGNORE
    return functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to nearly nothing."""
    if step < _WARMUP_STEPS:
        return _PEAK_RATE * (step + 1) / _WARMUP_STEPS
    done = (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)
    return _PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _finish(
    model: LlamaForCausalLM, tokens: Tokenizer, out: Path, facts: dict[str, int]
) -> Recital:
    """Store in half precision, then judge what was stored, computing in fp32."""
    out.mkdir(parents=True, exist_ok=True)
    lexicon.save(tokens, out)
    halved = copy.deepcopy(model)
    for weight in halved.parameters():
        weight.data = weight.data.to(torch.float16)
    halved.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    _write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": [0]})
    stored = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    recital = recite(stored, tokens, [Lesson(talk.turns) for talk in questions()])
    record = {
        **facts,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "conversations": recital.asked,
        "exact": recital.asked - len(recital.wrong),
        "smallest_gap": round(recital.smallest_gap, 3),
    }
    _write_json(out / "training.json", record)
    digests.write(out)
    _log.info("%s", record)
    for question in recital.wrong[:20]:
        _log.info("not word for word: %s", question)
    return recital


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Exit status 0 only if every answer is exact."""
    parser = argparse.ArgumentParser(description="Train the built-in model, baton-tiny.")
    parser.add_argument("--out", type=Path, default=TINY_DIR, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=_STEPS, help="default: %(default)s")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return 1 if train(args.out, args.seed, args.steps).wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
