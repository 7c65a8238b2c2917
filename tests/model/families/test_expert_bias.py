"""An expert bias under training: float32, frozen unless a setting moves it, and then by the routers' own choices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published
from model.families.expert_bias_worker import LENGTHS, RATE
from processes import TESTS, launch
from safetensors.torch import load_file

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.model.architecture import read_architecture
from megatron_bai.rl.validate_settings import validate_settings

pytestmark = pytest.mark.distributed
WORKER = TESTS / "model" / "families" / "expert_bias_worker.py"
NAME = "glm4_moe"


class Facts:
    """What the worker left, and the biases that the reference expects."""

    def __init__(self, directory: Path, *layouts: str):
        self.directory = directory / NAME
        published.make(NAME, self.directory / "published")
        launch(WORKER, self.directory, ",".join(layouts))
        tensors = load_file(self.directory / "published" / "model.safetensors")
        layers = [n for n in sorted(tensors) if n.endswith("_bias") and not published.is_dropped(NAME, n)]
        self.published = {name: tensors[name] for name in layers}

    def of(self, layout: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.directory / f"{layout}.pt", weights_only=False)
        return found

    def moved(self, forced: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Each bias after an update: where an expert has fewer tokens than the mean it grows, where more it shrinks."""
        routes = published.own_choices(NAME, self.directory / "published", forced)
        found = {}
        for column, (name, bias) in enumerate(self.published.items()):
            chosen = torch.cat([routes[i, : n - 1, column].flatten() for i, n in enumerate(LENGTHS)])
            load = torch.bincount(chosen, minlength=len(bias)).float()
            found[name] = bias + torch.sign(load.mean() - load) * RATE
        return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return Facts(tmp_path_factory.mktemp("bias"), "one")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return Facts(tmp_path_factory.mktemp("bias"), "pp2_uneven", "tp1_ep2", "tp2_ep2")


def require_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


def require_facts(facts: Facts, layout: str) -> None:
    found, moved = facts.of(layout), facts.moved(None)
    assert all((moved[name] != facts.published[name]).any() for name in moved)
    require_same(found["live"], moved)
    require_same(found["masked"], moved)  # as in supervised training
    assert found["masked norm"] == pytest.approx(found["live norm"], rel=1e-6)
    routes = torch.from_numpy(found["other routes"].astype("int64"))
    forced = facts.moved(torch.cat([routes, routes[:, -1:]], 1))  # the last token's predict nothing
    for recompute in ("none", "full"):
        require_same(found[f"forced, recompute {recompute}"], forced)
    require_same(found["frozen"], facts.published)  # with a weight decay of 0.5 and a learning rate of 1
    require_same(found["copied"], facts.published)
    require_same(found["swapped back"], moved)
    resumed = [key.removeprefix("resumed from ") for key in found if key.startswith("resumed")]
    assert layout in resumed and len(found["steps"]) == 1
    for origin in resumed:
        require_same(found[f"resumed from {origin}"], moved)
        assert found[f"steps from {origin}"] == found["steps"]
    assert found["critic's rate"] == 0
    for actors, critics in found["critic"]:
        assert actors.keys() == critics.keys() and all(torch.equal(actors[key], critics[key]) for key in actors)


def test_the_bias_moves_by_the_routers_own_choices_without_padding_and_is_copied_and_resumed(alone: Facts) -> None:
    require_facts(alone, "one")


def test_the_bias_stays_float32_in_bfloat16(alone: Facts) -> None:
    found = alone.of("one")["bfloat16"]
    for name, dtype in found["dtypes"].items():
        assert dtype is (torch.float32 if name in alone.published else torch.bfloat16), name
    require_same(found["before"], alone.published)
    for name, tensor in found["after"].items():
        steps = (tensor - alone.published[name]).abs() / RATE
        assert tensor.dtype == torch.float32 and torch.allclose(steps, steps.round(), atol=1e-4) and steps.max() > 0.5


def test_no_optimizer_has_the_bias(alone: Facts) -> None:
    from megatron_bai.memory_plan.rank_memory import count_params

    assert alone.of("one")["optimized"] == count_params(read_architecture(alone.directory / "published")).total


@pytest.mark.long
@pytest.mark.parametrize("layout", ["tp1_ep2", "tp2_ep2", "pp2_uneven"])
def test_the_bias_moves_alike_in_every_layout(layout: str, split: Facts) -> None:
    """The first stage of the pipeline has the dense layer alone: its optimizer of experts has no parameters."""
    require_facts(split, layout)


def test_a_rate_without_a_bias_is_refused() -> None:
    from moe import MODEL

    settings = config.Config(model=MODEL, trainer=config.Trainer(expert_bias_update_rate=0.001))
    with pytest.raises(UserError, match=r"trainer.expert_bias_update_rate is 0.001, and the model's routers have no"):
        validate_settings(settings)
