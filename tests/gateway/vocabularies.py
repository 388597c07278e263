"""Small tokenizers of the kinds that the served models have, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "The decode workers write the answers, the prefill workers read the prompts.",
    "A prompt's KV cache is handed over from one worker to the other, like a baton.",
    "Grüße aus Köln, 你好世界, привет мир, 👋🏽 emoji 👩‍👩‍👧 and so on. ",
    '   spaces   and\n\nlines\t and 1234567890 digits {"json": [true, null]}',
]

LLAMA_3_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MISTRAL_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")

LLAMA_3_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' -%}
{%- if loop.first -%}{%- set content = bos_token + content -%}{%- endif -%}
{{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

CHATML_TEMPLATE = """\
{% if messages[0].role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{% for message in messages %}
{% if loop.last and message.role == 'nobody' %}{% break %}{% endif %}
<|im_start|>{{ message.role }}
{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] | trim + eos_token }}
{%- endif %}
{%- endfor %}
"""


def special_tokens(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


@cache
def _byte_level(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_special_tokens(special_tokens(*special))
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return str(tokenizer.to_str())


def llama_3() -> Tokenizer:
    """Byte-level, whole words kept from merging, BOS before every text."""
    data = json.loads(_byte_level(LLAMA_3_SPECIAL))
    data["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(data))
    bos = LLAMA_3_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def chatml() -> Tokenizer:
    """Byte-level, NFC, nothing around a text: Qwen's kind."""
    tokenizer = Tokenizer.from_str(_byte_level(CHATML_SPECIAL))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@cache
def _sentencepiece() -> str:
    """BPE over characters with ▁ for space and a token for each byte, as converted from .model."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(MISTRAL_SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([text for text in TEXT * 3 if text.isascii()], trainer)
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    data["model"]["byte_fallback"] = True
    return json.dumps(data)


def llama_2() -> Tokenizer:
    """The older form: a normalizer writes ▁, the decoder strips one space."""
    tokenizer = Tokenizer.from_str(_sentencepiece())
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def mistral() -> Tokenizer:
    """The newer form: Metaspace does it, and only at the beginning of a text."""
    tokenizer = Tokenizer.from_str(_sentencepiece())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = MISTRAL_SPECIAL[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """The third form: Metaspace decodes too. No byte fallback: what is unknown is <unk>."""
    data = json.loads(_sentencepiece())
    data["model"]["byte_fallback"] = False
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def words() -> Tokenizer:
    """Whole words, no decoder."""
    vocab = {"<unk>": 0, "<s>": 1, "hello": 2, "there": 3, "world": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special_tokens("<unk>", "<s>"))
    return tokenizer
