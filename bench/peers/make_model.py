"""make_model: a Hugging Face directory with random weights that every peer takes as it is.

    python -m bench.peers.make_model half DIR     0.5 B parameters, for `baton bench cpu`
    python -m bench.peers.make_model middle DIR   24 M, for `baton bench compare --vllm`
    python -m bench.peers.make_model small DIR    4 M parameters, for `baton bench cpu --http`

The tokenizer is a plain byte-level BPE in which each token is a whole word of letters, ` abcd`:
text and token ids tell each other exactly, and each step of an answer shows as one event.
"""

from __future__ import annotations

import itertools
import json
import math
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

END: Final = "<|endoftext|>"
_SPACE: Final = "Ġ"  # how byte-level BPE writes a space


@dataclass(frozen=True)
class Size:
    """A Qwen2 shape: the architecture that all the peers know, with biases on q, k and v."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    longest: int

    def config(self) -> dict[str, Any]:
        """The fields of transformers' Qwen2Config."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.longest,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }


SIZES: Final = {
    "half": Size(896, 24, 14, 2, 4864, 151_936, 32_768),
    "middle": Size(512, 8, 8, 2, 1408, 4_096, 4_096),
    "small": Size(256, 4, 4, 2, 704, 4_096, 4_096),
}


def main(argv: Sequence[str]) -> int:
    """Write one model. Returns 2 for arguments that are wrong."""
    if len(argv) != 2 or argv[0] not in SIZES:
        print(f"usage: python -m bench.peers.make_model {'|'.join(SIZES)} DIR", file=sys.stderr)
        return 2
    write_model(SIZES[argv[0]], Path(argv[1]))
    return 0


def write_model(size: Size, directory: Path, seed: int = 0) -> None:
    """Config, tokenizer and float32 weights into `directory`, which may exist."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(size, directory)
    _write_weights(size, directory, seed)


def words() -> Iterator[str]:
    """` a`, ` b`, ... ` aa`, ...: shorter ones first, so that every beginning of one is one."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield _SPACE + "".join(letters)


def vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`size` tokens with their ids, and the merges that lead to them, first to last.

    Token 0 ends a text, then come the 256 bytes, then the words, each its beginning plus a letter.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    chosen = list(itertools.islice(words(), size - 1 - len(alphabet)))
    ids = {token: number for number, token in enumerate([END, *alphabet, *chosen])}
    return ids, [(word[:-1], word[-1]) for word in chosen]


def _write_tokenizer(size: Size, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids, merges = vocabulary(size.vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        # By hand: transformers saves a class name that its older releases do not know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": size.longest,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _write_weights(size: Size, directory: Path, seed: int) -> None:
    """Normal, so wide that layers outweigh the embedding: with a tied head an answer would else
    repeat the last token, and greedy answers that agree would prove nothing."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model: Any = Qwen2ForCausalLM(Qwen2Config(**size.config())).float()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, width = _distribution(name, parameter.shape)
            parameter.normal_(mean, width, generator=generator)
    model.save_pretrained(directory)


def _distribution(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation. Norms and biases vary too, so that a lost one shows."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    if "embed_tokens" in name:
        return 0.0, 0.02
    return 0.0, 1.25 / math.sqrt(shape[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
