"""baton-tiny: the built-in model, and the questions that it answers word for word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

_HERE: Final = Path(__file__).resolve().parent
TINY_DIR: Final = _HERE / "model"
"""The checkpoint, laid out like any Hugging Face directory."""


@dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer); the model recites each answer after what stands before it."""

    turns: tuple[tuple[str, str], ...]
    also: tuple[str, ...] = ()
    """Other wordings of the last question: trained on, but not promised word for word."""


@dataclass(frozen=True)
class WayOut:
    """One polite answer to many questions that the model has no real answer to."""

    questions: tuple[str, ...]
    answer: str
    patterns: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    """More questions, for training: any pattern with any thing in its braces."""


@dataclass(frozen=True)
class Knowledge:
    """Everything in questions.yaml."""

    conversations: tuple[Conversation, ...]
    off_topic: WayOut
    unknown_follow_up: WayOut


def knowledge() -> Knowledge:
    """Read questions.yaml. A follow-up becomes a conversation of two turns."""
    data = yaml.safe_load((_HERE / "questions.yaml").read_text(encoding="utf-8"))
    conversations = []
    for entry in data["questions"]:
        opening = (entry["q"], entry["a"])
        conversations.append(Conversation((opening,), tuple(entry.get("also", ()))))
        follow_ups = ((then["q"], then["a"]) for then in entry.get("then", ()))
        conversations += [Conversation((opening, follow_up)) for follow_up in follow_ups]
    return Knowledge(
        tuple(conversations), _way_out(data["off_topic"]), _way_out(data["unknown_follow_up"])
    )


def questions() -> list[Conversation]:
    """Every conversation that must come out word for word under greedy decoding.

    The last turn is the one to ask for; the turns before it are its history. Off-topic questions
    are among them, as conversations of one turn.
    """
    known = knowledge()
    polite = [Conversation(((q, known.off_topic.answer),)) for q in known.off_topic.questions]
    return [*known.conversations, *polite]


def _way_out(entry: dict[str, Any]) -> WayOut:
    patterns, things = entry.get("patterns", ()), entry.get("things", ())
    return WayOut(tuple(entry["questions"]), entry["a"], tuple(patterns), tuple(things))
