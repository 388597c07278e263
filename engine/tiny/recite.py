"""Judge a recital: does greedy decoding repeat every answer, and by what margin?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from engine.tiny import tokenizer as lexicon
from engine.tiny.corpus import Lesson

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Recital:
    """What came of asking: `smallest_gap` is the least logit lead of a right token over the rest.

    It is negative if any answer is wrong.
    """

    asked: int
    wrong: tuple[str, ...]
    smallest_gap: float


@torch.inference_mode()
def recite(model: LlamaForCausalLM, tokens: Tokenizer, lessons: Sequence[Lesson]) -> Recital:
    """Ask for the last answer of each lesson.

    One pass over the whole text per lesson is enough: greedy decoding repeats an answer exactly
    if and only if each of its tokens is the first choice after the tokens before it.
    """
    wrong: list[str] = []
    smallest = float("inf")
    for lesson in lessons:
        ids, own = lexicon.encode(tokens, lesson)
        start = len(own) - own[::-1].index(False)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1].float()
        target = torch.tensor(ids[start:]).unsqueeze(1)
        right = logits.gather(1, target).squeeze(1)
        rest = logits.scatter(1, target, float("-inf")).amax(1)
        gap = float((right - rest).min())
        smallest = min(smallest, gap)
        if gap <= 0:
            wrong.append(lesson.turns[-1][0])
    return Recital(len(lessons), tuple(wrong), smallest)
