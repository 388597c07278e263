"""The built-in model's tokenizer: byte-level BPE, so that every text has tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.tiny.corpus import Lesson

VOCAB_SIZE: Final = 2048
END: Final = "<|end|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"

CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
    {%- if message['role'] in ['system', 'developer'] %}
        {{- '<|system|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
    {%- else %}
        {{- '<|user|>' }}
    {%- endif %}
    {%- set content = message['content'] or '' %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {{- content | map(attribute='text') | join('') }}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def fit(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from the texts. Ids 0-3 are the special tokens, then the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"too little text for {VOCAB_SIZE} tokens")
    return tokenizer


def encode(tokenizer: Tokenizer, lesson: Lesson) -> tuple[list[int], list[bool]]:
    """The lesson's token ids, and which of them the model has to produce itself."""
    ids: list[int] = []
    own: list[bool] = []

    def write(text: str, produced: bool) -> None:
        piece = tokenizer.encode(text).ids
        ids.extend(piece)
        own.extend([produced] * len(piece))

    if not lesson.chat:
        ((question, answer),) = lesson.turns
        write(question, False)
        write("\n" + answer + END, True)
        return ids, own
    if lesson.system is not None:
        write(SYSTEM + lesson.system + END, False)
    for question, answer in lesson.turns:
        write(USER + question + END + ASSISTANT, False)
        write(answer + END, True)
    return ids, own


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
