"""Facts about routers of every kind Megatron-Core has, gathered in one process by `replay_worker`."""

from typing import Any

import torch
from torch import Tensor

HIDDEN, EXPERTS, TOPK, GROUPS, ROWS = 16, 8, 2, 4, 40

# TransformerConfig's settings of the router, by name.
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "softmax before top-k, scaled": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "softmax, groups": {"moe_router_num_groups": GROUPS, "moe_router_group_topk": 1},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid, bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
    },
    "sigmoid, bias, groups, scaled": {  # DeepSeek-V3
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 1e-3,
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": GROUPS,
        "moe_router_group_topk": 1,
        "moe_router_topk_scaling_factor": 2.5,
    },
}


def settings(**changes: Any) -> Any:
    """A `TransformerConfig` that replay works with, but for `changes`."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = {
        "num_layers": 3, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "ffn_hidden_size": 24, "moe_ffn_hidden_size": 24, "moe_router_topk": TOPK, "moe_enable_routing_replay": True,
        "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32", "add_bias_linear": False, "use_cpu_initialization": True,
        "normalization": "RMSNorm", "gradient_accumulation_fusion": False, "masked_softmax_fusion": False,
        "bias_dropout_fusion": False, "apply_rope_fusion": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return TransformerConfig(**values | changes)


class Alone(torch.nn.Module):
    """A model that is one router."""

    def __init__(self, **changes: Any):
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
        from megatron.core.transformer.moe.router import TopKRouter

        super().__init__()
        self.config = settings(num_layers=1, **changes)
        self.router = TopKRouter(self.config, get_default_pg_collection())
        self.router.set_layer_number(1)
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(ROWS, 1, HIDDEN, generator=generator).requires_grad_()
        with torch.no_grad():
            self.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator))
            if self.router.expert_bias is not None:
                self.router.expert_bias.copy_(torch.randn(EXPERTS, generator=generator))
        self.cotangent = torch.randn(ROWS, EXPERTS, generator=generator)

    def step(self) -> dict[str, Tensor]:
        self.hidden.grad = self.router.weight.grad = None
        probs, chosen = self.router(self.hidden)
        (probs * self.cotangent).sum().backward()
        found = {"probs": probs.detach(), "map": chosen, "hidden": self.hidden.grad, "weight": self.router.weight.grad}
        return {name: value.clone() for name, value in found.items()}


def kind(changes: dict[str, Any]) -> dict[str, Any]:
    """A live pass, its replay, and a pass with random experts forced of which the last rows are padding."""
    from megatron_bai.routing.replay.replay_pass import MicroRoutes
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    model = Alone(**changes)
    replay = RoutingReplay([model])
    with replay.record() as recorded:
        live = model.step()
    with replay.force(recorded):
        replayed = model.step()
    ids = torch.rand(ROWS, 1, EXPERTS, generator=torch.Generator().manual_seed(2)).argsort(dim=-1)[..., :TOPK]
    counted = torch.arange(ROWS) < ROWS - 5
    load = model.router.local_tokens_per_expert
    before = None if load is None else load.clone()
    with replay.force([MicroRoutes(ids, counted)]):
        forced = model.step()
    with replay.force([MicroRoutes(ids, counted)]), torch.no_grad():
        model.router(model.hidden)
    inputs = {"hidden": model.hidden, "weight": model.router.weight, "cotangent": model.cotangent}
    return {
        "live": live,
        "replayed": replayed,
        "forced": forced,
        "ids": ids[:, 0],
        "counted": counted,
        "load": None if load is None else load - before,
        "inputs": {name: value.detach().clone() for name, value in inputs.items()},
    }


def sparse_model(device: Any) -> dict[str, Any]:
    """A decoder whose first layer is dense, with a layer for multi-token prediction behind it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_bai.model.spec_parts import decoder_spec
    from megatron_bai.routing.layout import filler_routes
    from megatron_bai.routing.replay.replay_pass import MicroRoutes
    from megatron_bai.routing.replay.routing_replay import RoutingReplay

    config = settings(moe_layer_freq=[0, 1, 1], mtp_num_layers=1)
    spec = decoder_spec(config, transformer_engine=False, vp_stage=None)
    gpt = GPTModel(
        config,
        spec,
        vocab_size=32,
        max_sequence_length=16,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    replay = RoutingReplay([gpt])
    ids = torch.from_numpy(filler_routes(16, replay.signature)).flip(0)
    maps: dict[str, Tensor] = {}
    for name, module in gpt.named_modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda m, i, out, name=name: maps.update({name: out[1]}))
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(8).expand(2, -1)
    with replay.force([MicroRoutes(ids)]):
        gpt(tokens, positions, None, labels=tokens).sum().backward()
    numbers = {name: m.layer_number for name, m in gpt.named_modules() if isinstance(m, TopKRouter)}
    return {"layers": replay.layers, "columns": replay.columns, "ids": ids, "maps": maps, "numbers": numbers}


def checks() -> dict[str, Any]:
    """What `preflight` says about each setting that bypasses or breaks replay, and about those that only mislead."""
    from megatron_bai.compat.releases import megatron_release
    from megatron_bai.errors import UserError
    from megatron_bai.routing.replay.preflight import preflight

    def said(**changes: Any) -> Any:
        config = settings()
        for name, value in changes.items():
            assert hasattr(config, name), name
            setattr(config, name, value)
        try:
            return preflight(config)
        except UserError as error:
            return str(error)

    graph, graphed, some = {"cuda_graph_impl": "local"}, megatron_release().graph_setting, {}
    for name in megatron_release().refused_settings:
        some[name] = said(**{name: 0.5})
    return {
        **some,
        "nothing": said(),
        "dense": said(num_moe_experts=None),
        "off": said(moe_enable_routing_replay=False),
        "fusion": said(moe_router_fusion=True),
        "sinkhorn": said(moe_router_load_balancing_type="sinkhorn"),
        "quantile": said(moe_router_load_balancing_type=["aux_loss", "quantile"], moe_aux_loss_coeff=[0.0, 0.0]),
        "capacity": said(moe_expert_capacity_factor=1.0),
        "padded capacity": said(moe_pad_expert_input_to_capacity=True),
        "random scores": said(moe_router_force_load_balancing=True),
        "graphed layer": said(**graph, **{graphed: []}),
        "graphed router": said(**graph, **{graphed: ["attn", "moe_router"]}),
        "graphed iteration": said(**graph, **{graphed: ["full_iteration"]}),
        "graphed attention": said(**graph, **{graphed: ["attn"]}),
        "overlap": said(overlap_moe_expert_parallel_comm=True),
        "two at once": said(moe_router_fusion=True, moe_expert_capacity_factor=1.0),
        "auxiliary loss": said(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3),
        "auxiliary losses": said(moe_router_load_balancing_type=["seq_aux_loss"], moe_aux_loss_coeff=[1e-3]),
        "auxiliary loss of zero": said(moe_router_load_balancing_type="aux_loss"),
        "moving bias": said(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-3),
    }


def later_rows() -> dict[str, dict[str, str]]:
    """What is said, by release, of what only some have: their settings, and routers that are meant for inference."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_bai.compat import releases
    from megatron_bai.errors import UserError
    from megatron_bai.routing.replay.preflight import preflight
    from megatron_bai.routing.replay.router_binding import bind_routers

    def said(function: Any, *arguments: Any) -> str:
        try:
            function(*arguments)
        except UserError as error:
            return str(error)
        return "nothing"

    biased, model, installed, found = settings(), Alone(), releases.megatron_release, {}
    biased.moe_router_force_biased = 0.5
    model.router.__class__ = type("InferenceTopKRouter", (type("Between", (TopKRouter,), {}),), {})
    for release, row in releases.MEGATRON.items():
        releases.megatron_release = lambda _=None, row=row: row
        found[release] = {"biased": said(preflight, biased), "router": said(bind_routers, [model], [0])}
    releases.megatron_release = installed
    return found


def gather(device: Any) -> dict[str, Any]:
    return {
        "kinds": {name: kind(changes) for name, changes in KINDS.items()},
        "sparse": sparse_model(device),
        "checks": checks(),
        "later": later_rows(),
    }
