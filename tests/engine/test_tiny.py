"""The built-in model: what it promises to know, and that it does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from engine.tiny import TINY_DIR, Conversation, knowledge, questions
from engine.tiny import tokenizer as lexicon
from engine.tiny.corpus import Lesson, epoch, vary
from engine.tiny.recite import recite

KNOWN = questions()


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return Tokenizer.from_file(str(TINY_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(TINY_DIR, dtype=torch.float32)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((TINY_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))


def render(config: dict[str, Any], messages: list[dict[str, Any]], *, ask: bool) -> str:
    """The chat template as any server renders it: plain Jinja, sandboxed."""
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return jinja.from_string(config["chat_template"]).render(
        messages=messages,
        add_generation_prompt=ask,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )


def test_weights_stay_small() -> None:
    assert (TINY_DIR / "model.safetensors").stat().st_size < 10_000_000


def test_there_is_enough_to_ask() -> None:
    openings = [talk for talk in knowledge().conversations if len(talk.turns) == 1]
    follow_ups = [talk for talk in KNOWN if len(talk.turns) > 1]
    assert len(openings) >= 170
    assert len(follow_ups) >= 30


def test_no_question_has_two_answers() -> None:
    asked = Counter(
        (talk.turns[:-1], question.lower())
        for talk in KNOWN
        for question in (talk.turns[-1][0], *talk.also)
    )
    assert [what for what, times in asked.items() if times > 1] == []


def test_answers_are_a_few_sentences() -> None:
    lengths = {talk.turns[-1][0]: len(talk.turns[-1][1].split()) for talk in KNOWN}
    assert {q: words for q, words in lengths.items() if not 15 <= words <= 60} == {}


def test_some_answers_leave_ascii() -> None:
    assert sum(not talk.turns[-1][1].isascii() for talk in KNOWN) >= 5


def test_every_answer_survives_the_tokenizer(tokens: Tokenizer) -> None:
    for talk in KNOWN:
        answer = talk.turns[-1][1]
        assert tokens.decode(tokens.encode(answer).ids) == answer


def test_any_text_has_tokens(tokens: Tokenizer) -> None:
    text = "日本語 \x00\t\r\n ünïcödé 🦆 " + "".join(map(chr, range(32, 0x250)))
    assert tokens.decode(tokens.encode(text).ids) == text


def test_checkpoint_files_agree(tokens: Tokenizer, config: dict[str, Any]) -> None:
    model = json.loads((TINY_DIR / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((TINY_DIR / "generation_config.json").read_text(encoding="utf-8"))
    end = tokens.token_to_id(config["eos_token"])
    assert model["model_type"] == "llama"
    assert model["tie_word_embeddings"] is True
    assert model["vocab_size"] == tokens.get_vocab_size()
    assert model["eos_token_id"] == end
    assert generation["eos_token_id"] == [end]


def test_template_renders_what_was_trained(tokens: Tokenizer, config: dict[str, Any]) -> None:
    turns = (("What is TTFT?", "A delay → measured."), ("Why?", "Because."))
    lesson = Lesson(turns, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    trained, own = lexicon.encode(tokens, lesson)
    assert tokens.encode(render(config, messages, ask=False)).ids == trained
    prompt = tokens.encode(render(config, messages[:-1], ask=True)).ids
    assert trained[: len(prompt)] == prompt
    assert own[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_template_takes_content_in_parts_and_none(config: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "SSE?"}]
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts},
    ]
    text = "<|assistant|><|end|><|user|>What is SSE?<|end|><|assistant|>"
    assert render(config, messages, ask=True) == text


def test_every_answer_word_for_word(model: LlamaForCausalLM, tokens: Tokenizer) -> None:
    recital = recite(model, tokens, [Lesson(talk.turns) for talk in KNOWN])
    assert recital.wrong == ()
    assert recital.smallest_gap > 1.0  # far beyond what another kernel's rounding can move


def test_generation_says_the_same(model: LlamaForCausalLM, tokens: Tokenizer) -> None:
    question, answer = KNOWN[0].turns[0]
    ids, own = lexicon.encode(tokens, Lesson(((question, answer),)))
    prompt = torch.tensor([ids[: own.index(True)]])
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=100, pad_token_id=0)
    assert tokens.decode(out[0, prompt.shape[1] :].tolist()) == answer


def test_a_second_question_gets_its_answer(model: LlamaForCausalLM, tokens: Tokenizer) -> None:
    """Unrelated turns before the question change nothing, nor does a system prompt."""
    rng = random.Random(7)
    openings = [talk for talk in KNOWN if len(talk.turns) == 1]
    lessons = [
        Lesson((*rng.choice(openings).turns, *talk.turns), system="You are a helpful assistant.")
        for talk in rng.sample(KNOWN, 40)
    ]
    assert len(recite(model, tokens, lessons).wrong) <= 2


def test_a_wrong_answer_is_noticed(model: LlamaForCausalLM, tokens: Tokenizer) -> None:
    question, _ = KNOWN[0].turns[0]
    recital = recite(model, tokens, [Lesson(((question, "Something else."),))])
    assert recital.wrong == (question,)
    assert recital.smallest_gap < 0


def test_an_epoch_tells_every_conversation_once() -> None:
    known = replace(knowledge(), conversations=knowledge().conversations[:60])
    told = Counter(lesson.turns[-1][1] for lesson in epoch(known, random.Random(0)))
    answers = {talk.turns[-1][1] for talk in known.conversations}
    assert {answer: told[answer] for answer in answers} == dict.fromkeys(answers, 1)


def test_variations_keep_most_questions_recognisable() -> None:
    rng = random.Random(0)
    told = Counter(vary("What is a KV cache?", rng) for _ in range(400))
    assert told["What is a KV cache?"] > 200
    assert len(told) > 20


def test_questions_import_no_torch() -> None:
    code = "import sys, engine.tiny; engine.tiny.questions(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_follow_up_carries_its_history() -> None:
    talk = next(talk for talk in KNOWN if talk.turns[-1][0] == "Are you intelligent?")
    assert isinstance(talk, Conversation)
    assert talk.turns[0][0] == "Who are you?"
