"""Training conversations: the known answers, asked in many ways and in many contexts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engine.tiny import Conversation, Knowledge, WayOut

_SYSTEM: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a helpful, concise assistant. Answer briefly.",
    "Answer the user's questions about serving language models.",
)
_OPENERS: Final = ("please ", "Please tell me: ", "Hi! ", "can you tell me ", "ok, ", "And ")
_CLOSERS: Final = (" please", ", please", " Thanks!")
_REWRITES: Final = (
    (r"^What is ", "What's "),
    (r"^What is ", "whats "),
    (r"^What is ", "Tell me what is "),
    (r"^What is an? ", "What is "),
    (r"^How do I ", "How can I "),
    (r"^How do I ", "How to "),
    (r"quantis", "quantiz"),
    (r"\bKV cache\b", "kv-cache"),
    (r"[-_]", " "),
)


@dataclass(frozen=True)
class Lesson:
    """One training sequence. `chat` is False for a bare question followed by its answer."""

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    chat: bool = True


def epoch(known: Knowledge, rng: random.Random) -> Iterator[Lesson]:
    """Every conversation once as the end of a lesson, in random order, wording and context.

    The ways out follow in a smaller dose, so that they stay exceptions.
    """
    openings = [talk for talk in known.conversations if len(talk.turns) == 1]
    ends = [_retell(talk, rng) for talk in known.conversations]
    strange = [*known.off_topic.questions, *(_strange(known.off_topic, rng) for _ in range(24))]
    ends += [((vary(question, rng), known.off_topic.answer),) for question in strange]
    ends += [_dead_end(known, openings, rng) for _ in range(len(openings) // 16)]
    rng.shuffle(ends)
    for turns in ends:
        if len(turns) == 1 and rng.random() < 0.08:
            yield Lesson(turns, chat=False)
            continue
        before = rng.choices((0, 1, 2, 3, 8, 20), (56, 22, 10, 6, 4, 2))[0]
        history = tuple(_retell(rng.choice(openings), rng)[0] for _ in range(before))
        system = rng.choice(_SYSTEM) if rng.random() < 0.25 else None
        yield Lesson(history + turns, system)


def vary(question: str, rng: random.Random) -> str:
    """The question as people type it: half the time untouched, else with small liberties."""
    if rng.random() < 0.5:
        return question
    text = question
    if rng.random() < 0.25:
        pattern, better = rng.choice(_REWRITES)
        text = re.sub(pattern, better, text)
    if rng.random() < 0.45:
        text = text.rstrip("?!.")
    if rng.random() < 0.12:
        text = rng.choice(_OPENERS) + (text[:1].lower() + text[1:])
    elif rng.random() < 0.1:
        text = text.rstrip("?!.") + rng.choice(_CLOSERS)
    shape = rng.random()
    if shape < 0.45:
        text = text.lower()
    elif shape < 0.48:
        text = text.upper()
    if rng.random() < 0.12:
        text = rng.choice((" " + text, text + " ", text + "  ", text.replace(" ", "  ", 1)))
    return text


def _retell(talk: Conversation, rng: random.Random) -> tuple[tuple[str, str], ...]:
    """The conversation with its questions worded anew; the answers stay."""
    *before, (question, answer) = talk.turns
    if talk.also and rng.random() < 0.45:
        question = rng.choice(talk.also)
    return (*((vary(q, rng), a) for q, a in before), (vary(question, rng), answer))


def _strange(way_out: WayOut, rng: random.Random) -> str:
    """A made-up question from outside the field."""
    return rng.choice(way_out.patterns).format(rng.choice(way_out.things))


def _dead_end(
    known: Knowledge, openings: list[Conversation], rng: random.Random
) -> tuple[tuple[str, str], ...]:
    """A follow-up question to an opening that has no follow-ups."""
    followed = {talk.turns[0] for talk in known.conversations if len(talk.turns) > 1}
    opening = rng.choice([talk for talk in openings if talk.turns[0] not in followed])
    question = rng.choice(known.unknown_follow_up.questions)
    return (*_retell(opening, rng), (vary(question, rng), known.unknown_follow_up.answer))
