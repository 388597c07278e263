"""Model directories with a published shape and no weights: for `--load-format dummy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

LLAMA_8B: Final = "llama-3.1-8b"
QWEN_06B: Final = "qwen3-0.6b"
SMALL: Final = "small"

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    LLAMA_8B: {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 128001,
    },
    QWEN_06B: {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    },
    SMALL: {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 96,
        "vocab_size": 384,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": 0,
    },
}


def write_model(directory: Path, name: str) -> Path:
    """Write config and tokenizer into `directory`/`name` and return that.

    Each token is a word of its own, ` w17`, so that each shows as an event of its own.
    """
    # Imported here: what runs in one process does without it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = write_config(directory, name)
    words = {f"Ġw{number}": number for number in range(CONFIGS[name]["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_config(directory: Path, name: str) -> Path:
    path = directory / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name], indent=2), encoding="utf-8")
    return path
