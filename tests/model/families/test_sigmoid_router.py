"""Routers with a sigmoid that Megatron-Core computes otherwise than the published model are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published

from megatron_bai.errors import UserError
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.families.sigmoid_router import sigmoid_router_arguments

NAMES = [name for name in published.NAMES if published.read(name).get("n_group")]


def architecture(directory: Path, name: str, **changes: Any) -> Any:
    described = published.read(name)
    described |= {key: 8 for key in ("num_experts", "n_routed_experts") if key in described}
    described |= {"num_experts_per_tok": 4, **changes}
    (directory / "config.json").write_text(json.dumps(described))
    return read_architecture(directory)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 1}, "norm_topk_prob"),
        ({"n_group": 2, "topk_group": 1}, r"topk_group is 1 of 2 groups .* by its 4 best experts"),
        ({"n_group": 4, "topk_group": 3}, r"topk_group is 3 of 4 groups .* by its 1 best experts"),
        ({"n_group": 3, "topk_group": 2}, "n_group is 3, which does not divide the 8 experts"),
        ({"n_group": 2, "topk_group": 4}, "topk_group is 4, more than the 2 groups"),
        ({"n_group": 8, "topk_group": 2}, "fewer than the 4 experts of a token"),
        ({"n_group": 0, "topk_group": 1}, "n_group is 0"),
        ({"n_group": 4.0, "topk_group": 2}, "n_group"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"num_experts_per_tok": 1, "topk_group": 1, "n_group": 1}, "norm_topk_prob is True"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0"),
    ],
)
def test_what_would_be_another_model_is_refused(name: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        architecture(tmp_path, name, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_which_all_are_chosen_are_none(name: str, tmp_path: Path) -> None:
    found = sigmoid_router_arguments(architecture(tmp_path, name, n_group=4, topk_group=4))
    assert "moe_router_num_groups" not in found
    found = sigmoid_router_arguments(architecture(tmp_path, name, n_group=4, topk_group=2))
    assert (found["moe_router_num_groups"], found["moe_router_group_topk"]) == (4, 2)


def test_megatron_scores_a_group_by_another_number_of_experts() -> None:
    """The reason: with topk = 2 · groups the choices are transformers', with topk = 4 · groups they are not."""
    from megatron.core.transformer.moe.moe_utils import group_limited_topk

    scores, groups = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)), 4

    def choice_of_transformers(topk: int, chosen: int) -> torch.Tensor:
        best = scores.view(64, groups, -1).topk(2, dim=-1).values.sum(-1).topk(chosen, dim=-1).indices
        allowed = torch.zeros(64, groups).scatter_(1, best, 1).repeat_interleave(4, dim=1).bool()
        return scores.masked_fill(~allowed, -1).topk(topk, dim=-1).indices.sort(-1).values

    for topk, chosen, same in ((4, 2, True), (2, 1, True), (4, 1, False), (6, 2, False)):
        found = group_limited_topk(scores, topk, 64, 16, groups, chosen)[1].sort(-1).values
        wanted = choice_of_transformers(topk, chosen)
        if (topk, chosen) == (4, 1):  # a group's four experts are chosen: which group is what differs
            assert (found != wanted).any(-1).float().mean() > 0.1
        assert torch.equal(found, wanted) == same, (topk, chosen)
