"""config.json: understood as transformers understands it, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadModel
from cluster.model import GenerationDefaults, ModelConfig, RopeConfig, config_digest, load_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DROP = object()


def _write(directory: Path, name: str = "config.json", **fields: Any) -> Path:
    (directory / name).write_text(json.dumps({k: v for k, v in fields.items() if v is not DROP}))
    return directory


def _load(directory: Path, **fields: Any) -> ModelConfig:
    return load_config(_write(directory, **{**LLAMA, **fields}))


def _typed(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": DROP, **fields}


def test_a_llama(tmp_path: Path) -> None:
    assert _load(tmp_path) == ModelConfig(
        architecture="llama",
        hidden_size=64,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=8,
        intermediate_size=128,
        vocab_size=1000,
        max_model_len=2048,
        norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=False,
        windows=(0, 0, 0, 0),
        dtype="bfloat16",
        eos_ids=(2,),
        bos_id=1,
        generation=GenerationDefaults(),
    )


def test_what_each_architecture_adds(tmp_path: Path) -> None:
    llama = _load(tmp_path, attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = _load(tmp_path, **_typed("qwen2", mlp_bias=True))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, *[False] * 3)
    qwen3 = _load(tmp_path, **_typed("qwen3"))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert _load(tmp_path, **_typed("mistral", head_dim=20)).head_dim == 20


def test_absent_kv_heads_mean_one_each_only_for_llama(tmp_path: Path) -> None:
    assert _load(tmp_path, num_key_value_heads=DROP).kv_heads == 8
    assert _load(tmp_path, **_typed("qwen2", num_key_value_heads=None)).kv_heads == 8
    with pytest.raises(BadModel, match=r"config\.json: num_key_value_heads is missing"):
        _load(tmp_path, **_typed("qwen2", num_key_value_heads=DROP))


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (_typed("mistral", sliding_window=16), (16, 16, 16, 16)),
        (_typed("mistral", sliding_window=None), (0, 0, 0, 0)),
        (_typed("mistral"), (4096, 4096, 4096, 4096)),
        (_typed("qwen2", sliding_window=16, max_window_layers=1), (0, 0, 0, 0)),
        (
            _typed("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=3),
            (0, 0, 0, 16),
        ),
        (_typed("qwen3", use_sliding_window=True, max_window_layers=2), (0, 0, 4096, 4096)),
        (
            _typed(
                "qwen3",
                use_sliding_window=True,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            (16, 0, 16, 0),
        ),
    ],
)
def test_sliding_windows(fields: dict[str, Any], windows: tuple[int, ...], tmp_path: Path) -> None:
    assert _load(tmp_path, **fields).windows == windows


ROPES: list[tuple[dict[str, Any], RopeConfig]] = [
    ({"rope_type": "default"}, RopeConfig(theta=500000.0)),
    ({"type": "linear", "factor": 2}, RopeConfig("linear", 500000.0, 2.0)),
    ({"type": "dynamic", "factor": 2.5}, RopeConfig("dynamic", 500000.0, 2.5)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        RopeConfig("llama3", 500000.0, 8.0, 1024, 1.0, 4.0),
    ),
    (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        RopeConfig("yarn", 500000.0, 4.0, 1024, attention_factor=0.1 * math.log(4.0) + 1.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 16},
        RopeConfig("yarn", 500000.0, 4.0, 2048, attention_factor=1.0, beta_fast=16.0),
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False},
        RopeConfig("yarn", 500000.0, 4.0, 2048, attention_factor=1.5, truncate=False),
    ),
]


@pytest.mark.parametrize(("rope", "wanted"), ROPES)
def test_rope_in_both_spellings(rope: dict[str, Any], wanted: RopeConfig, tmp_path: Path) -> None:
    assert _load(tmp_path, rope_scaling=rope).rope == wanted
    old = config_digest(tmp_path)
    new = {**rope, "rope_theta": 500000.0}
    assert _load(tmp_path, rope_theta=DROP, rope_parameters=new).rope == wanted
    assert config_digest(tmp_path) == old


def test_yarn_alone_stretches_the_served_length(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert _load(tmp_path, rope_scaling=yarn).max_model_len == 8192
    assert _load(tmp_path, rope_scaling={**yarn, "type": "linear"}).max_model_len == 2048


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    _write(tmp_path, "generation_config.json", eos_token_id=[2, 9, 8])
    assert _load(tmp_path, eos_token_id=[5, 2]).eos_ids == (5, 2, 9, 8)
    assert _load(tmp_path, eos_token_id=None).eos_ids == (2, 9, 8)


def test_generation_defaults(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
    _write(tmp_path, "generation_config.json", do_sample=True, **given)
    assert _load(tmp_path).generation == GenerationDefaults(**given)
    _write(tmp_path, "generation_config.json", do_sample=False, **given)
    greedy = GenerationDefaults(temperature=0.0, repetition_penalty=1.05)
    assert _load(tmp_path).generation == greedy


def test_digest_tells_models_and_tokenizers_apart_but_not_recommendations(tmp_path: Path) -> None:
    _load(tmp_path)
    plain = config_digest(tmp_path)
    _write(tmp_path, "generation_config.json", temperature=0.5)
    assert config_digest(tmp_path) == plain
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenized = config_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ }")
    _load(tmp_path, rms_norm_eps=1e-6)
    assert len({plain, tokenized, config_digest(tmp_path)}) == 3


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "gemma2"},
        "config.json: model_type 'gemma2' is not supported (llama, mistral, qwen2, qwen3)",
    ),
    ({"model_type": DROP}, "config.json: model_type '' is not supported"),
    ({"model_type": 3}, "config.json: model_type must be a string"),
    ({"architectures": ["LlamaModel"]}, "config.json: architectures must be"),
    ({"quantization_config": {"bits": 4}}, "config.json: quantization_config is set"),
    ({"auto_map": {"AutoModel": "x.py"}}, "config.json: auto_map is set"),
    ({"hidden_act": "gelu"}, "config.json: hidden_act 'gelu' is not supported"),
    ({"hidden_size": DROP}, "config.json: hidden_size is missing"),
    ({"hidden_size": "64"}, "config.json: hidden_size must be an integer"),
    ({"hidden_size": True}, "config.json: hidden_size must be an integer"),
    ({"hidden_size": 64.0}, "config.json: hidden_size must be an integer"),
    ({"hidden_size": -64}, "config.json: hidden_size must be between"),
    ({"hidden_size": 65}, "config.json: hidden_size 65 is no multiple of 8"),
    ({"num_hidden_layers": 0}, "config.json: num_hidden_layers must be between"),
    ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers must be between"),
    ({"vocab_size": 10**4000}, "config.json: vocab_size must be between"),
    ({"num_key_value_heads": 3}, "config.json: num_key_value_heads 3 does not divide"),
    ({"head_dim": 7}, "config.json: head_dim must be even"),
    ({"rms_norm_eps": DROP}, "config.json: rms_norm_eps is missing"),
    ({"rms_norm_eps": 0}, "config.json: rms_norm_eps must be above 0"),
    ({"rms_norm_eps": math.nan}, "config.json: rms_norm_eps must be finite"),
    ({"rope_theta": math.inf}, "config.json: rope_theta must be finite"),
    ({"rope_theta": 1}, "config.json: rope_theta must be above 1"),
    ({"rope_theta": 10**400}, "config.json: rope_theta must be finite"),
    ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor other than 1"),
    ({"rope_scaling": [1]}, "config.json: rope_scaling must be an object"),
    (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "config.json: rope_scaling.rope_type 'longrope' is not supported",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "config.json: rope_scaling.factor is missing"),
    (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "config.json: rope_scaling.factor must be at least 1",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
        "config.json: rope_parameters.mrope_section is not supported",
    ),
    (
        {
            "rope_scaling": {
                "type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            }
        },
        "config.json: rope_scaling.high_freq_factor must be above 4",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
        "config.json: rope_scaling.beta_fast 1 is below beta_slow 2",
    ),
    ({"torch_dtype": "float8_e4m3fn"}, "config.json: torch_dtype 'float8_e4m3fn'"),
    ({"tie_word_embeddings": "yes"}, "config.json: tie_word_embeddings must be true or false"),
    ({"eos_token_id": 1000}, "config.json: eos_token_id must be token ids below 1000"),
    ({"eos_token_id": [2, "3"]}, "config.json: eos_token_id must be token ids below 1000"),
    ({"sliding_window": 16}, "config.json: sliding_window is not supported for llama"),
    (
        {"layer_types": ["sliding_attention"] * 4},
        "config.json: layer_types has sliding_attention, but there is no sliding_window",
    ),
    ({"layer_types": ["full_attention"]}, "config.json: layer_types must name one of"),
    (
        _typed("mistral", sliding_window=8, layer_types=["full_attention"] * 4),
        "config.json: layer_types disagrees with how mistral slides",
    ),
    (_typed("mistral", sliding_window=0), "config.json: sliding_window must be between 1"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refusals_name_file_field_and_reason(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadModel) as refused:
        _load(tmp_path, **fields)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "generation_config.json: temperature must be at least 0"),
        ({"top_p": 0}, "generation_config.json: top_p must be above 0 and at most 1"),
        ({"top_k": 1.5}, "generation_config.json: top_k must be an integer"),
        ({"eos_token_id": -1}, "generation_config.json: eos_token_id must be token ids"),
    ],
)
def test_a_bad_generation_config(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    _write(tmp_path, "generation_config.json", **fields)
    with pytest.raises(BadModel) as refused:
        _load(tmp_path)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "config.json: not JSON"),
        (b"\xff\xfe{}", "config.json: not JSON"),
        (b'{"hidden_size": ', "config.json: not JSON"),
        (b"[" * 100_000, "config.json: not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json: not JSON"),
        (b"[]", "config.json: must be a JSON object, not list"),
    ],
)
def test_not_json(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(BadModel) as refused:
        load_config(tmp_path)
    assert str(refused.value).startswith(message)


def test_not_a_model_directory(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="does not exist"):
        load_config(tmp_path / "none")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadModel, match="is not a directory"):
        load_config(tmp_path / "model.gguf")
    with pytest.raises(BadModel, match=r"config\.json: missing in .* \(\.gguf files are not"):
        load_config(tmp_path)
    _write(tmp_path, "quantize_config.json", bits=4)
    with pytest.raises(BadModel, match=r"quantize_config\.json: quantised weights"):
        _load(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_FIELDS = [
    *LLAMA, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim",
    "use_sliding_window", "max_window_layers", "attention_bias", "dtype", "partial_rotary_factor",
    "original_max_position_embeddings",
]  # fmt: skip


@settings(deadline=None)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4),
)
def test_any_json_is_understood_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, fields: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("model", numbered=True)
    try:
        config = _load(directory, **{**_typed(kind), **fields})
    except BadModel as refused:
        assert str(refused).startswith("config.json: ")
    else:
        assert config.heads % config.kv_heads == 0 and len(config.windows) == config.layers


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    _load(tmp_path)
    (tmp_path / "generation_config.json").symlink_to("/proc/self/mem")
    with pytest.raises(BadModel, match=r"generation_config\.json: cannot be read"):
        load_config(tmp_path)
