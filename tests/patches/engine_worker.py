"""An engine of SGLang serves a tiny random model on the CPU and returns routes. Arguments: the family (`qwen3`,
`qwen3-mixed`, `mixtral` or `gpt-oss`), a directory for the model, and `fixed` where this package's fixes at run time
are wanted, or `fixed-but=NAME` for all but one. Prints a JSON object: the largest difference of a log-probability from
those of transformers, and how many rows of routes differ.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts_per_tok=2, max_position_embeddings=128, initializer_range=0.2, eos_token_id=1, bos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
SCOPES = ("sglang-models", "sglang-cpu")  # of every server on a CPU; the others change what a server returns
PROMPTS = [[5, 6, 7, 8], [9, 3], [11] * 20]


def save(family: str, path: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()  # tqdm's thread would keep the engine from forking
    torch.manual_seed(0)
    if family == "mixtral":
        settings = transformers.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=8, sliding_window=None)
        model = transformers.MixtralForCausalLM(settings)
    elif family == "gpt-oss":
        limits = {"sliding_window": 6, "swiglu_limit": 7.0}
        settings = transformers.GptOssConfig(**SIZES, **limits, intermediate_size=32, num_local_experts=8)
        model = transformers.GptOssForCausalLM(settings)
    else:
        mixed = {"mlp_only_layers": [1], "tie_word_embeddings": True} if family == "qwen3-mixed" else {}
        settings = transformers.Qwen3MoeConfig(
            **SIZES, **mixed, intermediate_size=64, moe_intermediate_size=32, num_experts=8, norm_topk_prob=True
        )
        model = transformers.Qwen3MoeForCausalLM(settings)
    model.save_pretrained(path)
    return model.eval()


def replies(path: Path, seeded: bool) -> list[dict[str, Any]]:
    import sglang

    engine = sglang.Engine(
        model_path=str(path), device="cpu", dtype="float32", attention_backend="torch_native",
        sampling_backend="pytorch", grammar_backend="none", disable_radix_cache=True, disable_cuda_graph=True,
        max_total_tokens=2048, max_running_requests=8, context_length=128, enable_return_routed_experts=True,
        enable_deterministic_inference=seeded, skip_tokenizer_init=True, disable_overlap_schedule=True,
        log_level="error",
    )  # fmt: skip
    sampling = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True} | ({"sampling_seed": 3} if seeded else {})
    try:
        return engine.generate(
            input_ids=PROMPTS, sampling_params=sampling, return_logprob=True, return_routed_experts=True
        )
    finally:
        engine.shutdown()


def main(family: str, directory: Path, fixed: str) -> None:
    if fixed:
        from megatron_bai import compat

        for patch in compat.PATCHES:
            if patch.scope in SCOPES and patch.name != fixed.removeprefix("fixed-but="):
                patch.apply()
    model = save(family, directory)
    worst, wrong, rows = 0.0, 0, 0
    for prompt, reply in zip(PROMPTS, replies(directory, seeded=family != "mixtral"), strict=True):
        tokens, meta = prompt + reply["output_ids"], reply["meta_info"]
        with torch.no_grad():
            known = model(torch.tensor([tokens[:-1]]), output_router_logits=True)
        logprobs = known.logits[0].log_softmax(-1)[range(len(prompt) - 1, len(tokens) - 1), reply["output_ids"]]
        found = torch.tensor([each[0] for each in meta["output_token_logprobs"]])
        worst = max(worst, float((logprobs - found).abs().max()))
        routes = torch.frombuffer(bytearray(base64.b64decode(meta["routed_experts"])), dtype=torch.int32)
        routes = routes.view(len(tokens) - 1, SIZES["num_hidden_layers"], SIZES["num_experts_per_tok"])
        if dense := getattr(model.config, "mlp_only_layers", None):
            assert not routes[:, dense].any()
            routes = routes[:, [layer for layer in range(routes.shape[1]) if layer not in dense]]
        chosen = torch.stack([each.topk(2).indices for each in known.router_logits], dim=1)
        wrong += int((routes.sort().values != chosen.sort().values).any(-1).sum())
        rows += routes.shape[0] * routes.shape[1]
    print(json.dumps({"logprobs": worst, "wrong": wrong, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "".join(sys.argv[3:]))
