"""The values that transformers takes for fields which a `config.json` lacks, by family.

These are the defaults of its config classes in version 5.24. Sizes of the model are
left out: without them a config is broken, and moex says which one is missing. None
stands for null, whose meaning is told where the field is read.

`own_rope` is what a family takes for `rope_parameters` where they are null.
`tests/interop/make_readings.py` compares all of this with transformers.
"""

from typing import Any

COMMON: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": None,
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "own_rope": {},
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": COMMON
    | {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    "olmoe": COMMON
    | {
        "clip_qkv": None,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
    },
    "qwen3_moe": COMMON
    | {
        "decoder_sparse_step": 1,
        "max_position_embeddings": 32_768,
        "mlp_only_layers": None,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    "deepseek_v2": COMMON
    | {
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": COMMON
    | {
        "first_k_dense_replace": 3,
        "max_position_embeddings": 4096,
        "n_group": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    },
    "gpt_oss": COMMON
    | {
        "attention_bias": True,
        "head_dim": 64,
        "layer_types": None,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "own_rope": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
    },
    "llama": COMMON | {"max_position_embeddings": 2048},
    "qwen3": COMMON
    | {
        "head_dim": 128,
        "layer_types": None,
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
}
