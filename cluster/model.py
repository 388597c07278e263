"""What a model is: `config.json` and `generation_config.json` read once, checked, and frozen.

Torch-free, so that the gateway and the workers read the same file the same way. Supported are the
architectures that one parameterised decoder covers; anything else raises `BadModel` with a message
of the form `file: field reason`. Defaults for absent fields are those of transformers 5, because a
checkpoint is written against them.

Source: the configuration classes and `modeling_rope_utils.py` of transformers 5.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from cluster.errors import BadModel
from cluster.fields import Fields, read_object

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"

ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES: Final = ("float32", "float16", "bfloat16")
ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")
_ROPE_FIELDS: Final = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "finetuned",
}  # fmt: skip

_MAX_LAYERS: Final = 4096


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that a type does not use keep their defaults.

    `dynamic` rescales only beyond the trained length, which is never served (see `max_model_len`),
    so it equals `default`; its name is kept for the digest.
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's authors recommend for sampling. None: they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that the decoder, the KV layout and the gateway need to know of a model."""

    architecture: str  # the model_type: llama, mistral, qwen2 or qwen3
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int, ...]  # per layer: tokens a query sees, itself included; 0 is all
    dtype: str  # as the checkpoint states it: float32, float16, bfloat16; "" if it does not
    eos_ids: tuple[int, ...]
    bos_id: int | None
    generation: GenerationDefaults


def load_config(directory: Path) -> ModelConfig:
    """Read a Hugging Face model directory's configuration. Raises BadModel."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise BadModel(
            f"model {directory} {what}; give a Hugging Face directory: {CONFIG} and safetensors"
        )
    if not (directory / CONFIG).is_file():
        raise BadModel(f"{CONFIG}: missing in {directory}{_other_formats(directory)}")
    fields = Fields(CONFIG, read_object(directory / CONFIG))
    generation = Fields(GENERATION, {})
    if (directory / GENERATION).is_file():
        generation = Fields(GENERATION, read_object(directory / GENERATION))
    _refuse_unsupported(directory, fields)
    return _model_config(fields, generation)


def config_digest(directory: Path) -> str:
    """What two processes must share to speak of the same tokens and the same model.

    blake2b over the configuration as understood (so the old and the new spelling of RoPE agree)
    and the bytes of tokenizer.json. Sampling recommendations are left out: each gateway's own.
    """
    understood = asdict(load_config(directory))
    del understood["generation"]
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(understood, sort_keys=True).encode())
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file():
        digest.update(b"\0tokenizer\0" + tokenizer.read_bytes())
    return digest.hexdigest()


def _other_formats(directory: Path) -> str:
    """A hint for a directory that holds weights of a kind which is never read."""
    for suffix in (".gguf", ".bin", ".pt", ".pth"):
        if any(directory.glob(f"*{suffix}")):
            return f" ({suffix} files are not supported, only Hugging Face safetensors)"
    return ""


def _refuse_unsupported(directory: Path, fields: Fields) -> None:
    """What would load and then answer wrongly, or would need code from the checkpoint."""
    architecture = fields.text("model_type", "")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise fields.bad("model_type", f"{architecture!r} is not supported ({supported})")
    classes = fields.get("architectures")
    if classes is not None and classes != [ARCHITECTURES[architecture]]:
        raise fields.bad(
            "architectures",
            f"must be [{ARCHITECTURES[architecture]!r}] for {architecture}, not {classes!r:.80}",
        )
    for name, reason in (
        ("quantization_config", "is set, but quantised weights are not supported"),
        ("compression_config", "is set, but quantised weights are not supported"),
        ("auto_map", "is set, but code from a checkpoint is never run"),
    ):
        if fields.get(name) is not None:
            raise fields.bad(name, reason)
    for name in ("quantize_config.json", "quant_config.json"):
        if (directory / name).exists():
            raise BadModel(f"{name}: quantised weights are not supported")
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.bad("hidden_act", f"{activation!r} is not supported (silu)")


def _model_config(fields: Fields, generation: Fields) -> ModelConfig:
    architecture = fields.get("model_type")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    vocab = fields.integer("vocab_size")
    trained_len = fields.integer("max_position_embeddings")
    rope = _rope(fields, trained_len)
    attention_bias = architecture in ("llama", "qwen3") and fields.flag("attention_bias", False)
    bos = fields.ids("bos_token_id", vocab)
    eos = fields.ids("eos_token_id", vocab) + generation.ids("eos_token_id", vocab)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(fields, heads),
        head_dim=_head_dim(fields, hidden, heads),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=vocab,
        max_model_len=_max_model_len(rope, trained_len),
        norm_eps=fields.number("rms_norm_eps", high=1.0),
        rope=rope,
        qkv_bias=architecture == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=architecture == "llama" and fields.flag("mlp_bias", False),
        qk_norm=architecture == "qwen3",
        tied=fields.flag("tie_word_embeddings", False),
        windows=_windows(fields, layers),
        dtype=_dtype(fields),
        eos_ids=tuple(dict.fromkeys(eos)),
        bos_id=bos[0] if bos else None,
        generation=_generation_defaults(generation),
    )


def _kv_heads(fields: Fields, heads: int) -> int:
    name = "num_key_value_heads"
    if name not in fields.values and fields.get("model_type") != "llama":
        raise fields.bad(name, "is missing")
    kv_heads = fields.integer(name, default=heads)
    if heads % kv_heads:
        raise fields.bad(name, f"{kv_heads} does not divide num_attention_heads {heads}")
    return kv_heads


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    default = 128 if fields.get("model_type") == "qwen3" else None
    if fields.get("head_dim") is None and default is None:
        if hidden % heads:
            raise fields.bad("hidden_size", f"{hidden} is no multiple of {heads} attention heads")
        default = hidden // heads
    head_dim = fields.integer("head_dim", default=default)
    if head_dim % 2:
        raise fields.bad("head_dim", f"must be even for RoPE, not {head_dim}")
    return head_dim


def _max_model_len(rope: RopeConfig, trained_len: int) -> int:
    """Tokens per sequence. YaRN raises it: its recipe leaves max_position_embeddings alone."""
    if rope.type != "yarn":
        return trained_len
    return max(trained_len, int(rope.factor * rope.original_max_len))


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.text(name, "").removeprefix("torch.")
    if dtype and dtype not in DTYPES:
        raise fields.bad(name, f"{dtype!r} is not supported ({', '.join(DTYPES)})")
    return dtype


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Mistral slides on every layer or none; Qwen on those its config names; Llama never."""
    architecture = fields.get("model_type")
    if architecture == "llama":
        if fields.get("sliding_window") is not None:
            raise fields.bad("sliding_window", "is not supported for llama")
        window, first = 0, layers
    elif architecture == "mistral":
        window, first = _window(fields), 0
    elif fields.flag("use_sliding_window", False):
        window = _window(fields)
        first = fields.integer("max_window_layers", default=28, low=0)
    else:
        window, first = 0, layers
    windows = tuple(window if layer >= first else 0 for layer in range(layers))
    kinds = fields.get("layer_types")
    if kinds is None:
        return windows
    return _windows_by_type(fields, kinds, window, windows)


def _window(fields: Fields) -> int:
    """Null means none; an absent field means the classes' default."""
    if "sliding_window" in fields.values and fields.get("sliding_window") is None:
        return 0
    return fields.integer("sliding_window", default=4096)


def _windows_by_type(
    fields: Fields, kinds: object, window: int, windows: tuple[int, ...]
) -> tuple[int, ...]:
    """`layer_types` wins for Qwen; elsewhere transformers ignores it, so it must agree."""
    known = ("full_attention", "sliding_attention")
    if type(kinds) is not list or len(kinds) != len(windows) or any(k not in known for k in kinds):
        raise fields.bad("layer_types", f"must name one of {', '.join(known)} for each layer")
    if not window and "sliding_attention" in kinds:
        raise fields.bad("layer_types", "has sliding_attention, but there is no sliding_window")
    named = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if named != windows and fields.get("model_type") not in ("qwen2", "qwen3"):
        raise fields.bad("layer_types", f"disagrees with how {fields.get('model_type')} slides")
    return named


def _rope(fields: Fields, trained_len: int) -> RopeConfig:
    """Both spellings: `rope_scaling` beside `rope_theta`, and `rope_parameters` with all in one."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = fields.get(name)
    if values is not None and type(values) is not dict:
        raise fields.bad(name, f"must be an object, not {values!r:.80}")
    rope = Fields(fields.file, values or {}, prefix=f"{name}.")
    for key, value in rope.values.items():
        if key not in _ROPE_FIELDS and value is not None:
            raise rope.bad(str(key), "is not supported")
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.bad("partial_rotary_factor", "other than 1 is not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise rope.bad("rope_type", f"{kind!r} is not supported ({', '.join(ROPE_TYPES)})")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0, low=1.0), low=1.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = rope.number("factor", low=1.0, low_open=False)
    if kind in ("linear", "dynamic"):
        return RopeConfig(type=kind, theta=theta, factor=factor)
    outer = fields.integer("original_max_position_embeddings", default=0, low=0)
    original = outer or rope.integer("original_max_position_embeddings", default=trained_len)
    if kind == "llama3":
        low = rope.number("low_freq_factor")
        high = rope.number("high_freq_factor", low=low)
        return RopeConfig(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    slow = rope.number("beta_slow", 0.0, low_open=False) or 1.0
    fast = rope.number("beta_fast", 0.0, low_open=False) or 32.0
    if fast < slow:
        raise rope.bad("beta_fast", f"{fast:g} is below beta_slow {slow:g}")
    return RopeConfig(
        kind,
        theta,
        factor,
        original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """Stated, or inferred from the factor as in YaRN (Peng et al. 2023), section 3.4."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    above = rope.number("mscale", 0.0, low_open=False)
    below = rope.number("mscale_all_dim", 0.0, low_open=False)
    return mscale(above) / mscale(below) if above and below else mscale(1.0)


def _generation_defaults(fields: Fields) -> GenerationDefaults:
    """`do_sample: false` means greedy, and that the sampling fields beside it do not count."""

    def given(
        name: str, low: float, high: float = math.inf, *, open_: bool = False
    ) -> float | None:
        if fields.get(name) is None:
            return None
        return fields.number(name, low=low, high=high, low_open=open_)

    penalty = given("repetition_penalty", 0.0, open_=True)
    if not fields.flag("do_sample", True):
        return GenerationDefaults(temperature=0.0, repetition_penalty=penalty)
    return GenerationDefaults(
        temperature=given("temperature", 0.0),
        top_p=given("top_p", 0.0, 1.0, open_=True),
        top_k=None if fields.get("top_k") is None else fields.integer("top_k", low=0),
        min_p=given("min_p", 0.0, 1.0),
        repetition_penalty=penalty,
    )
