"""Load-balancing and z losses of routers beside the text's: closed forms in float64, in every layout.

The whole gradient of one update is compared, experts and embeddings as well as routers: relative to each tensor's
largest element 1e-4 to plain torch in float64, 2e-5 between layouts, as in `test_layouts.py`.
"""

from collections import Counter
from typing import Any

import pytest
import reference
import torch
from distributed.router_losses_worker import BALANCED, CASES, LENGTH, LOSSES, QUICK, ROWS, TEXT, Z, text
from distributed.test_layouts import relative
from moe import MODEL
from processes import TESTS, Layouts, launch
from tiers import tiered, wants_long
from torch import Tensor

Gradient = dict[str, Tensor]
pytestmark = pytest.mark.distributed
each_case = pytest.mark.parametrize("case", tiered(CASES, QUICK))
each_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.fixture(scope="module")
def updates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    directory = tmp_path_factory.mktemp("router-losses")
    chosen = CASES if wants_long(request.session, "updates") else QUICK
    launch(TESTS / "distributed" / "router_losses_worker.py", directory, *chosen)
    return Layouts(directory)


def micro_batches(case: str) -> list[list[list[int]]]:
    """The rows of each micro-batch of each replica: those of all replicas at a time."""
    layout = CASES[case]
    replicas = layout.processes // (layout.parallel.tensor * layout.parallel.pipeline)
    rows, size = ROWS // replicas, layout.micro
    return [
        [list(range(replica * rows + start, replica * rows + start + size)) for replica in range(replicas)]
        for start in range(0, rows, size)
    ]


def shares(chosen: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[…, E]` choices of tokens, the sums over those that are `valid`, and how many there are of these."""
    return chosen[valid].sum(0), valid.sum()


def of_layer(logits: Tensor, kind: str, case: str) -> tuple[Tensor, Tensor]:
    """A layer's load-balancing and z loss, from its `[ROWS, LENGTH, E]` logits and the definitions."""
    valid = torch.arange(LENGTH) < torch.tensor(TEXT)[:, None]
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(MODEL.moe_topk).indices, 1.0).detach()

    def balance(load: Tensor, of: Any) -> Tensor:
        """E Σ f P, f from the load."""
        total, count = shares(probabilities[of], valid[of])
        return MODEL.num_experts * (load / load.sum() * total / count).sum()

    squares, balances, seen = [], [], torch.zeros(MODEL.num_experts, dtype=logits.dtype)
    for together in micro_batches(case):
        everyone = [row for rows in together for row in rows]
        loads, tokens = shares(chosen[everyone], valid[everyone])
        seen = seen + loads
        for rows in together:
            total, count = shares(logits.logsumexp(-1)[rows].square()[..., None], valid[rows])
            squares.append(total[0] / count)
            if kind == "aux_loss":
                balances.append(balance(shares(chosen[rows], valid[rows])[0], rows))
            elif kind == "seq_aux_loss":
                balances.append(torch.stack([balance(shares(chosen[r], valid[r])[0], r) for r in rows]).mean())
        if kind == "global_aux_loss":
            balances.append(balance(seen, everyone))
    return torch.stack(balances).mean(), torch.stack(squares).mean()


def in_float64(updates: Layouts, kind: str, case: str) -> tuple[dict[str, float], list[Counter[int]], Gradient]:
    """Values, the load of each layer, and the gradient of text, load balancing and z loss together, in plain torch."""
    weights = reference.load(updates.directory / "one" / "hf")
    tokens, target = map(torch.from_numpy, text())
    scores: list[Tensor] = []
    logprobs = reference.next_logprobs(reference.logits(weights, MODEL, tokens, router_logits=scores), tokens)
    of_text = -logprobs[target[:, 1:]].mean()
    balanced, squared = zip(*(of_layer(layer, kind, case) for layer in scores))
    (of_text + BALANCED * sum(balanced) + Z * sum(squared)).backward()
    valid = torch.arange(LENGTH) < torch.tensor(TEXT)[:, None]
    load = [Counter(layer.topk(MODEL.moe_topk).indices[valid].flatten().tolist()) for layer in scores]
    values = {
        "loss": float(of_text.detach()),
        "load_balancing_loss": float(torch.stack(balanced).detach().mean()),
        "z_loss": float(torch.stack(squared).detach().mean()),
    }
    return values, load, {name: tensor.grad for name, tensor in weights.items()}


@each_loss
@each_case
def test_values_load_and_gradient_are_those_of_plain_torch(case: str, loss: str, updates: Layouts) -> None:
    found = updates[case][loss]
    values, load, gradient = in_float64(updates, loss, case)
    assert found["text"]["loss"] == pytest.approx(values.pop("loss"), rel=1e-5)
    assert found["routers"] == pytest.approx(values, rel=1e-5)
    assert found["load"] == {f"expert_load/{layer}": counts for layer, counts in enumerate(load)}
    gap, name = relative(found["gradient"], gradient)
    assert gap <= 1e-4, name


@each_loss
@pytest.mark.parametrize("case", tiered([name for name in CASES if name not in ("one", "one_micro8")], QUICK))
def test_the_gradient_is_the_same_in_every_layout(case: str, loss: str, updates: Layouts) -> None:
    """But where the definition says otherwise: f of `global_aux_loss` is of other rows where there are replicas."""
    if micro_batches(case) != micro_batches("one") and loss == "global_aux_loss":
        return
    one, other = updates["one"][loss], updates[case][loss]
    assert other["routers"] == pytest.approx(one["routers"], rel=3e-6)
    gap, name = relative(other["gradient"], one["gradient"])
    assert gap <= 2e-5, name


def test_the_losses_are_as_large_as_the_texts_and_differ(updates: Layouts) -> None:
    """So that the comparisons above are of something; without the settings there is none of them."""
    one = updates["one"]
    assert set(one["none"]["routers"]) == set()
    gaps = [relative(one[a]["gradient"], one[b]["gradient"])[0] for a in one for b in one if a < b]
    assert min(gaps) > 0.02
    values = {one[loss]["routers"]["load_balancing_loss"] for loss in LOSSES}
    assert len(values) == 3 and min(values) > 1
