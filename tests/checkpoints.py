"""Small random checkpoints of each architecture, complete for serving: `build("qwen3", tmp_path)`.

Written by transformers, so that they are what a real one is. Weights are large and biases and
norms random: logits spread, and a part that is left out or misplaced shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

BOS, EOS, USER, ASSISTANT, SYSTEM = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _architecture(
    config: Callable[..., Any], model: Callable[[Any], PreTrainedModel], **shape: Any
) -> Callable[..., PreTrainedModel]:
    def make(**overrides: Any) -> PreTrainedModel:
        return model(config(**{**_SHAPE, **shape, **overrides}))

    return make


_LLAMA = (LlamaConfig, LlamaForCausalLM)
_QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
_QWEN3 = (Qwen3Config, Qwen3ForCausalLM)
_MISTRAL = (MistralConfig, MistralForCausalLM)

ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _architecture(*_LLAMA),
    "llama-odd-heads": _architecture(*_LLAMA, num_attention_heads=3, num_key_value_heads=1),
    "llama-rope-llama3": _architecture(*_LLAMA, rope_parameters=_LLAMA3),
    "llama-rope-yarn": _architecture(*_LLAMA, rope_parameters=_YARN),
    "llama-rope-linear": _architecture(
        *_LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-rope-dynamic": _architecture(
        *_LLAMA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-biases": _architecture(*_LLAMA, attention_bias=True, mlp_bias=True),
    "qwen2": _architecture(*_QWEN2),
    "qwen2-tied": _architecture(*_QWEN2, tie_word_embeddings=True),
    "qwen2-rope-yarn": _architecture(*_QWEN2, rope_parameters=_YARN),
    "qwen2-window": _architecture(
        *_QWEN2, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": _architecture(*_QWEN3, head_dim=40, tie_word_embeddings=True),
    "qwen3-biases": _architecture(*_QWEN3, head_dim=8, attention_bias=True),
    "mistral": _architecture(*_MISTRAL, sliding_window=None),
    "mistral-window": _architecture(*_MISTRAL, sliding_window=9, head_dim=24),
}


def build(
    name: str,
    directory: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `ARCHITECTURES[name]` with a tokenizer and return its directory.

    dtype is that of storage. Further overrides are fields of the transformers configuration.
    """
    disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    _write_tokenizer(tokenizer, directory)
    ids = {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = ARCHITECTURES[name](**{**ids, **overrides})
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        model.to(getattr(torch, dtype))
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@cache
def _tokenizer() -> Tokenizer:
    """Byte-level BPE: any text round-trips, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[BOS, EOS, USER, ASSISTANT, SYSTEM],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "The prefill worker reads the prompt, the decode worker writes the answer. "
    tokenizer.train_from_iterator([text, text.lower(), text.upper()] * 3, trainer)
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _SHAPE["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
