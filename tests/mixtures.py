"""Small mixtures of experts of every family that transformers keeps in fused weights."""

from __future__ import annotations

from typing import Any

import torch

from .zoo import VOCABULARY

SIZE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
MOE = {"moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": LOCAL,
    "Qwen2Moe": {**MANY, **MOE, **SHARED},
    "Qwen3Moe": {**MANY, **MOE, "head_dim": 8},
    "Qwen3Next": {
        **MANY, **MOE, **SHARED, "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "Olmoe": MANY,
    "GptOss": {**LOCAL, "head_dim": 8},
    "DeepseekV3": {
        **MOE, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "GraniteMoe": LOCAL,
    "Phimoe": LOCAL,
    "JetMoe": {**LOCAL, "kv_channels": 8},
    "Jamba": {
        **MANY, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
        "expert_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}  # fmt: skip


def mixture(family: str, **changes: Any) -> Any:
    """A causal language model with random weights, some of which transformers leaves empty."""
    import transformers as tf

    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**SIZE, **FAMILIES[family], **changes})
    model = getattr(tf, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 2 or (parameter.ndim == 2 and not parameter.any()):
                parameter.normal_(0, 0.1)
    return model
