"""Published models at full size: what their `config.json` says otherwise than the shrunk one here, and what they hold.

The keys are those of `configs/NAME.json`; the values are facts of the models on Hugging Face. `stored` is the number of
elements in their safetensors files, as these count them.
"""

from dataclasses import dataclass, field
from typing import Any

from model.families import published

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class FullSize:
    """A model.

    Attributes:
        shrunk: name of the configuration here that has its keys.
        changes: its values of them, where they are others.
        arguments: Megatron-Core's, beyond the sizes and those that are the family's own.
        dense: number of layers without experts, which are the first.
        billions: its parameters, and those of them that a token passes, as its makers state them.
        uncounted: embedding and output layer, how many of the two they leave out of the second number.
        stored: elements of all its tensors; 0: not known.
        beside: what of that is none of its parameters: `frequencies`, `predicting` (a layer), `copies` (of embedding
            and output layer, for that layer).
        quantised: what its file says of eight bits.
    """

    shrunk: str
    changes: dict[str, Any]
    arguments: dict[str, Any]
    billions: tuple[float, float]
    stored: int = 0
    dense: int = 0
    uncounted: int = 0
    beside: tuple[str, ...] = ()
    quantised: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return its `config.json`, of weights that are not quantised."""
        return published.read(self.shrunk) | self.changes


def _sizes(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    width: int,
    dense_width: int,
    topk: int,
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    """Return sizes under the keys that most model types have."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "moe_intermediate_size": width,
        "intermediate_size": dense_width,
        "num_experts_per_tok": topk,
        "vocab_size": vocabulary,
        **more,
    }


def _latent(experts: int, positions: int, q_latent: int | None = 1536, **more: Any) -> dict[str, Any]:
    """Return what models with latent attention say of it and of their experts."""
    heads = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return {**heads, "q_lora_rank": q_latent, "n_routed_experts": experts, "max_position_embeddings": positions, **more}


def _yarn(factor: float, fast: float) -> dict[str, Any]:
    """Return the scaling of DeepSeek-V3 and Kimi-K2."""
    scales = {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
    return {"type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": 1, **scales}


_SOFTMAX = {"moe_router_score_function": "softmax"}
_SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
_GROUPS = {"moe_router_num_groups": 8, "moe_router_group_topk": 4}
_QWEN3 = {**_SOFTMAX, "moe_router_pre_softmax": False, "qk_layernorm": True, "add_qkv_bias": False}
_QWEN2 = {**_SOFTMAX, "moe_router_pre_softmax": True, "moe_shared_expert_gate": True, "add_qkv_bias": True}
_GLM = {**_SIGMOID, "add_qkv_bias": True, "rotary_percent": 0.5, "rotary_base": 1000000}
_GLM_SIZES = _sizes(
    92, 5120, 96, 8, 1536, 12288, 8, 151552, n_routed_experts=160, first_k_dense_replace=3, head_dim=128
)
_GLM_LARGE = {
    **_GLM, "qk_layernorm": True, "moe_router_topk_scaling_factor": 2.5, "moe_shared_expert_intermediate_size": 1536
}  # fmt: skip
_MIXTRAL = {**_SOFTMAX, "moe_router_pre_softmax": False, "rotary_base": 1000000}
_LING_2 = {
    **_SIGMOID, **_GROUPS, "qk_layernorm": True, "add_qkv_bias": False, "moe_router_topk_scaling_factor": 2.5,
    "rotary_percent": 0.5, "rotary_base": 600000,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "qk_layernorm": True}
_YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
# `stored` without the 41,540,496 scales of its FP8 weights.
_DEEPSEEK = FullSize(
    "deepseek_v3",
    _sizes(61, 7168, 128, 128, 2048, 18432, 8, 129280, n_group=8, topk_group=4, first_k_dense_replace=3)
    | _latent(256, 163840, rope_scaling=_yarn(40, 32)),
    {
        **_SIGMOID, **_LATENT, **_GROUPS, **_YARN, "q_lora_rank": 1536, "rotary_base": 10000, "beta_fast": 32,
        "rotary_scaling_factor": 40, "moe_router_topk_scaling_factor": 2.5, "moe_shared_expert_intermediate_size": 2048,
    },
    (671, 37), 684_489_845_504, dense=3, uncounted=1, beside=("predicting", "copies"), quantised=_FP8,
)  # fmt: skip

MODELS = {
    "Qwen3-30B-A3B": FullSize(
        "qwen3_moe",
        _sizes(48, 2048, 32, 4, 768, 6144, 8, 151936, num_experts=128, head_dim=128, max_position_embeddings=40960),
        {**_QWEN3, "rotary_base": 1000000}, (30.5, 3.3), 30_532_122_624,
    ),
    "Qwen3-235B-A22B": FullSize(
        "qwen3_moe",
        _sizes(94, 4096, 64, 4, 1536, 12288, 8, 151936, num_experts=128, head_dim=128, max_position_embeddings=40960),
        {**_QWEN3, "rotary_base": 1000000}, (235, 22), 235_093_634_560,
    ),
    "Qwen3-Coder-480B-A35B": FullSize(
        "qwen3_moe",
        _sizes(62, 6144, 96, 8, 2560, 8192, 8, 151936, num_experts=160, head_dim=128, max_position_embeddings=262144)
        | {"rope_theta": 10000000, "qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
        {**_QWEN3, "rotary_base": 10000000}, (480, 35), 480_154_875_392,
    ),
    "Qwen2-57B-A14B": FullSize(
        "qwen2_moe",
        _sizes(28, 3584, 28, 4, 2560, 18944, 8, 151936, num_experts=64, shared_expert_intermediate_size=20480)
        | {"max_position_embeddings": 131072, "sliding_window": 131072, "max_window_layers": 28},
        {**_QWEN2, "moe_shared_expert_intermediate_size": 20480, "rotary_base": 1000000}, (57.4, 14), 57_408_658_944,
    ),
    "Qwen1.5-MoE-A2.7B": FullSize(
        "qwen2_moe",
        _sizes(24, 2048, 16, 16, 1408, 5632, 4, 151936, num_experts=60, shared_expert_intermediate_size=5632)
        | {"max_position_embeddings": 8192, "sliding_window": 32768, "max_window_layers": 21},
        {**_QWEN2, "moe_shared_expert_intermediate_size": 5632, "rotary_base": 1000000}, (14.3, 2.7), 14_315_784_192,
    ),
    "GLM-4.5": FullSize(
        "glm4_moe", _GLM_SIZES | {"max_position_embeddings": 131072}, _GLM_LARGE, (355, 32), 358_337_791_296,
        dense=3, uncounted=2, beside=("predicting", "copies"),
    ),
    "GLM-4.6": FullSize(
        "glm4_moe", _GLM_SIZES | {"max_position_embeddings": 202752}, _GLM_LARGE, (355, 32), 356_785_898_816,
        dense=3, uncounted=2, beside=("predicting",),
    ),
    "GLM-4.5-Air": FullSize(
        "glm4_moe_air",
        _sizes(46, 4096, 96, 8, 1408, 10944, 8, 151552, n_routed_experts=128, n_shared_experts=1, head_dim=128)
        | {"first_k_dense_replace": 1, "max_position_embeddings": 131072},
        {
            **_GLM, "qk_layernorm": False, "moe_router_topk_scaling_factor": 1.0,
            "moe_shared_expert_intermediate_size": 1408,
        },
        (106, 12), 110_468_824_832, dense=1, uncounted=2, beside=("predicting", "copies"),
    ),
    "Mixtral-8x7B": FullSize(
        "mixtral",
        _sizes(32, 4096, 32, 8, 0, 14336, 2, 32000, num_local_experts=8, max_position_embeddings=32768),
        _MIXTRAL, (46.7, 12.9), 46_702_792_704,
    ),
    "Mixtral-8x22B": FullSize(
        "mixtral",
        _sizes(56, 6144, 48, 8, 0, 16384, 2, 32000, num_local_experts=8, max_position_embeddings=65536),
        _MIXTRAL, (141, 39), 140_620_634_112,
    ),
    "DeepSeek-V3": _DEEPSEEK,
    "DeepSeek-R1": _DEEPSEEK,
    "Kimi-K2": FullSize(
        "kimi_k2",
        _sizes(61, 7168, 64, 64, 2048, 18432, 8, 163840) | _latent(384, 131072, rope_scaling=_yarn(32.0, 1.0)),
        {
            **_SIGMOID, **_LATENT, **_YARN, "q_lora_rank": 1536, "rotary_base": 50000, "beta_fast": 1,
            "rotary_scaling_factor": 32, "moe_router_topk_scaling_factor": 2.827,
            "moe_shared_expert_intermediate_size": 2048,
        },
        (1040, 32.6), 1_026_408_235_864, dense=1, beside=("frequencies",), quantised=_FP8,
    ),
    "Moonlight-16B-A3B": FullSize(
        "moonlight",
        _sizes(27, 2048, 16, 16, 1408, 11264, 6, 163840) | _latent(64, 8192, None),
        {
            **_SIGMOID, **_LATENT, "q_lora_rank": None, "rope_type": "rope", "rotary_base": 50000,
            "moe_router_topk_scaling_factor": 2.446, "moe_shared_expert_intermediate_size": 2816,
        },
        (16, 2.24), 15_960_111_936, dense=1, uncounted=2, beside=("frequencies",),
    ),
    "OLMoE-1B-7B": FullSize(
        "olmoe",
        _sizes(16, 2048, 16, 16, 0, 1024, 8, 50304, num_experts=64, max_position_embeddings=4096),
        {**_SOFTMAX, "moe_router_pre_softmax": True, "rotary_base": 10000}, (6.92, 1.3), 6_919_161_856,
    ),
    "MiniMax-M2": FullSize(
        "minimax_m2",
        _sizes(62, 3072, 48, 8, 0, 1536, 8, 200064, num_local_experts=256, head_dim=128, rotary_dim=64)
        | {"max_position_embeddings": 196608, "attn_type_list": [1] * 62, "mlp_intermediate_size": 8192},
        {**_SIGMOID, "moe_router_topk_scaling_factor": 1.0, "rotary_percent": 0.5, "rotary_base": 5000000},
        (230, 10), 228_689_764_864, uncounted=1, quantised=_FP8,
    ),
    "Ling-lite-1.5": FullSize(
        "bailing_moe",
        _sizes(28, 2048, 16, 4, 1408, 1408, 6, 126464, num_experts=64, max_position_embeddings=32768),
        {
            **_SOFTMAX, "moe_router_pre_softmax": False, "qk_layernorm": False, "add_qkv_bias": False,
            "moe_shared_expert_intermediate_size": 2816, "rotary_base": 600000,
        },
        (16.8, 2.75),
    ),
    "Ling-flash-2.0": FullSize(
        "bailing_moe_v2",
        _sizes(32, 4096, 32, 4, 1024, 9216, 8, 157184, num_experts=256, n_group=8, topk_group=4, head_dim=128)
        | {"rotary_dim": 64, "moe_shared_expert_intermediate_size": 1024, "max_position_embeddings": 32768}
        | {"num_nextn_predict_layers": 0},
        {**_LING_2, "moe_shared_expert_intermediate_size": 1024}, (103, 6.1), 102_889_705_216, dense=1,
    ),
    "Ling-mini-2.0": FullSize(
        "bailing_moe_v2",
        _sizes(20, 2048, 16, 4, 512, 5120, 8, 157184, num_experts=256, n_group=8, topk_group=4, head_dim=128)
        | {"rotary_dim": 64, "moe_shared_expert_intermediate_size": 512, "max_position_embeddings": 32768}
        | {"num_nextn_predict_layers": 0},
        {**_LING_2, "moe_shared_expert_intermediate_size": 512}, (16, 1.4), 16_255_643_392, dense=1,
    ),
}  # fmt: skip
