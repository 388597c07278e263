"""A model directory with a shape and no weights: for `--load-format dummy`.

Large enough that computing outweighs everything else on a CPU core, small enough that a comparison
of three modes takes minutes: 24 M parameters, 94 MB of fp32 that each decode step reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

NAME: Final = "llama-24m"

# The head is its own matrix: tied to embeddings that are random, it would name the last token
# again and again, and greedy answers that agree would prove nothing.
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1408,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def write_model(directory: Path) -> Path:
    """Write config and tokenizer into `directory`/NAME and return that.

    Each token is a whole word of its own, ` w17`: so every step of an answer shows as one event,
    where a real vocabulary holds half characters back, and the text tells the tokens exactly.
    """
    # Imported here: a comparison of real checkpoints does without it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = directory / NAME
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    words = {f"Ġw{number}": number for number in range(CONFIG["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path
