"""A model's shape for tests that need no checkpoint."""

from __future__ import annotations

from cluster.model import GenerationDefaults, ModelConfig, RopeConfig

CONFIG = ModelConfig(
    architecture="llama",
    hidden_size=24,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    vocab_size=100,
    max_model_len=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied=False,
    windows=(0, 0),
    dtype="float32",
    eos_ids=(0,),
    bos_id=None,
    generation=GenerationDefaults(),
)
