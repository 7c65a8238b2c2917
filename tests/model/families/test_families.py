"""Each family's published checkpoint is the same function in Megatron-Core, in every layout, and comes back unchanged.

A family is `configs/NAME.json`: each gets all tests here. Log-probabilities are transformers' in float32. Transformer
Engine's layers are stand-ins on a CPU: names and shapes of parameters are what is shown of them.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import published
from model.families.family_sync import SYNCED, Case
from processes import TESTS, launch
from safetensors.torch import load_file
from weight_receiver import digests

from megatron_bai.compat.releases import megatron_release
from megatron_bai.model.architecture import read_architecture
from megatron_bai.model.hf_mapping import slice_indices
from megatron_bai.rollout.servers.quantize import fake_quantize

pytestmark = pytest.mark.distributed
WORKER = TESTS / "model" / "families" / "family_worker.py"
TE_WORKER = TESTS / "model" / "families" / "te_worker.py"
LAYOUTS = ("tp1_ep2", "tp2_ep2", "pp2_uneven", "recompute_selective", "recompute_full", "packed")
EXPERT_BIASES = ("e_score_correction_bias", "expert_bias")  # endings of names
MORE = {"gpt_oss": ("tp2_ep1",)}  # biases of experts that tensor ranks hold whole
CASES = [(name, layout) for name in published.NAMES for layout in (*LAYOUTS, *MORE.get(name, ()))]
TOLERANCE = 5e-6  # nats, of float32
GRADIENT_TOLERANCE = 2e-5  # of a tensor's largest element: sums over tokens in another order


class Results:
    """What the worker left about families, and the reference's answers."""

    def __init__(self, directory: Path):
        self.directory = directory

    @functools.cache  # noqa: B019, there are few
    def __call__(self, name: str, layout: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.directory / name / f"{layout}.pt", weights_only=False)
        return found

    @functools.cache  # noqa: B019
    def reference(self, name: str, other: bool) -> tuple[torch.Tensor, torch.Tensor]:
        forced = None
        if other:
            forced = torch.from_numpy(self(name, "one")["other_routes"].astype("int64"))
            forced = torch.cat([forced, forced[:, -1:]], 1)  # the last token predicts nothing
        return published.logprobs(name, self.directory / name / "published", forced)

    def tensors(self, name: str, where: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = load_file(self.directory / name / where / "model.safetensors")
        return tensors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All families in a single process."""
    directory = tmp_path_factory.mktemp("families")
    for name in published.NAMES:
        published.make(name, directory / name / "published")
    launch(WORKER, directory, "one", *published.NAMES)
    return Results(directory)


@pytest.fixture(scope="module")
def with_transformer_engine(alone: Results) -> dict[str, Any]:
    """All families in a process that has stand-ins for Transformer Engine."""
    path = filter(None, [str(TESTS / "stubs"), os.environ.get("PYTHONPATH")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        found: dict[str, Any] = json.loads(
            launch(TE_WORKER, alone.directory, *published.NAMES, fresh=True).splitlines()[-1]
        )
    return found


@pytest.fixture(scope="module")
def in_layouts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One family in every layout, made once; called with its name."""

    @functools.cache
    def results(name: str) -> Results:
        directory = tmp_path_factory.mktemp(name)
        published.make(name, directory / name / "published")
        launch(WORKER, directory, ",".join(("one", *LAYOUTS, *MORE.get(name, ()))), name)
        return Results(directory)

    return results


def require_same_function(results: Results, name: str, layout: str) -> None:
    found, (wanted, _) = results(name, layout), results.reference(name, False)
    assert (found["logprobs"] - wanted)[:, :-1].abs().max() <= TOLERANCE
    assert torch.equal(found["replayed"], found["logprobs"]), "replaying recorded routes changes nothing"
    forced, _ = results.reference(name, True)
    assert (forced - wanted).abs().max() > 0.01, "other routes change the output"
    assert (found["other"] - forced)[:, :-1].abs().max() <= TOLERANCE
    assert found["rows"] > 0


def require_same_bits(results: Results, name: str, layout: str) -> None:
    wanted = results.tensors(name, "published")
    for where in ("hf", "loaded"):
        found = results.tensors(name, f"{layout}/{where}")
        assert found.keys() == {each for each in wanted if not published.is_dropped(name, each)}
        for key in found:
            assert found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]), (where, key)


def sent(name: str, tensor: torch.Tensor, case: Case) -> torch.Tensor:
    """A published tensor as servers must get it."""
    if name.endswith(EXPERT_BIASES):
        return tensor
    return fake_quantize(name, tensor.to(case.dtype), case.quantize)


def require_same_sync(results: Results, name: str, layout: str) -> None:
    """A server receives each tensor that the export has, once, bit for bit, and no other."""
    exported = results.tensors(name, f"{layout}/hf")
    family = read_architecture(results.directory / name / "published").family
    received = results(name, layout)["received"]
    for title, case in SYNCED[layout].items():
        requests = received[title]
        (on_first, on_second) = ([each for ranks in requests for each in ranks[i]] for i in range(2))
        assert on_first == on_second, "the ranks of a server"
        wanted = digests((key, sent(key, tensor, case)) for key, tensor in exported.items())
        assert sorted(on_first) == sorted(wanted), title
        assert (len(requests) > 5) == bool(case.bucket_bytes)
        if case.bucket_bytes:
            require_changed_alone(results, name, received, title)
        for first, _ in requests:
            keys = {each[0] for each in first}
            for ending in family.loaded_together:
                stems = {key.removesuffix(ending) for key in keys if key.endswith(ending)}
                assert {stem + other for stem in stems for other in family.loaded_together} & exported.keys() <= keys


def require_changed_alone(results: Results, name: str, received: dict[str, Any], title: str) -> None:
    """Of frozen routers a server gets those that moved all the same; of buffers none that did not."""
    first, frozen, moved = (
        {each[0]: each for ranks in received[case] for each in ranks[0]}
        for case in (title, f"{title}, frozen", f"{title}, moved")
    )
    architecture = read_architecture(results.directory / name / "published")
    of_router = [kind for kind in architecture.mappings.values() if ".router." in kind.megatron]
    routers = {
        key
        for kind in of_router
        if kind.trained
        for index in slice_indices(kind, architecture)
        for key in kind.names(index)
    }
    assert routers and routers <= first.keys()
    assert frozen.keys() == {key for key in first if key not in routers and not key.endswith(EXPERT_BIASES)}
    assert moved.keys() == frozen.keys() | routers
    assert all(moved[key] != first[key] for key in routers) and all(moved[key] == first[key] for key in frozen)


@pytest.mark.parametrize("name", published.NAMES)
def test_log_probabilities_and_forced_routes_are_those_of_the_reference(name: str, alone: Results) -> None:
    require_same_function(alone, name, "one")


@pytest.mark.parametrize("name", published.NAMES)
def test_routes_are_those_of_the_reference(name: str, alone: Results) -> None:
    routes = torch.cat(
        [each.long().unflatten(0, (published.LENGTH, -1)).transpose(0, 1) for each in alone(name, "one")["routes"]]
    )
    _, wanted = alone.reference(name, False)
    assert torch.equal(routes.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize("name", published.NAMES)
def test_what_is_imported_comes_back_bit_for_bit(name: str, alone: Results) -> None:
    require_same_bits(alone, name, "one")


@pytest.mark.parametrize("name", published.NAMES)
def test_servers_receive_what_is_exported_once_and_bit_for_bit(name: str, alone: Results) -> None:
    require_same_sync(alone, name, "one")


def test_families_have_what_a_weight_sync_could_lose(alone: Results) -> None:
    """What `require_same_sync` then is about: none of it may vanish from the configurations."""
    exported = {name: alone.tensors(name, "one/hf").keys() for name in published.NAMES}
    kinds = ("mlp.gate.", ".shared_expert.", ".shared_experts.", "shared_expert_gate.", *EXPERT_BIASES)
    kinds += ("layers.0.mlp.gate_proj.", "q_proj.bias", "q_norm.", "q_a_proj.", "kv_a_proj_with_mqa.", "kv_b_proj.")
    for kind in kinds:
        assert any(kind in key for keys in exported.values() for key in keys), kind
    tied = [name for name in published.NAMES if published.read(name).get("tie_word_embeddings")]
    assert tied and all(("lm_head.weight" in keys) == (name not in tied) for name, keys in exported.items())
    predicting = [name for name in published.NAMES if published.predicting_layer(name)]
    assert predicting and not any(published.is_dropped(name, key) for name in predicting for key in exported[name])


@pytest.mark.parametrize("name", published.NAMES)
def test_every_parameter_has_a_gradient_and_an_expert_bias_stays_as_it_is(name: str, alone: Results) -> None:
    gradients = alone(name, "one")["gradient"]
    still = {key for key, gradient in gradients.items() if not gradient.abs().max() > 0}
    assert still == {key for key in gradients if key.endswith(EXPERT_BIASES)}


@pytest.mark.parametrize("name", published.NAMES)
def test_transformer_engines_parameters_have_the_names_of_the_local_layers_in_checkpoints(
    name: str, alone: Results, with_transformer_engine: dict[str, Any]
) -> None:
    found = with_transformer_engine[name]
    if name == "moonlight" and megatron_release().norms_inputs_of_queries:
        assert "norms the input of the queries once more" in found["refused"]
        return
    assert any(".mlp.experts.linear_fc1.weight7" in key for key in found["engine_parameters"]), "not a grouped layer"
    assert set(found["engine_parameters"]) != set(found["local_parameters"])
    assert found["engine"] == found["local"] and found["engine_canonical"] == found["local_canonical"]
    wanted = [each for each in alone.tensors(name, "published") if not published.is_dropped(name, each)]
    assert found["exported"] == len(wanted) and found["difference"] <= 2 * TOLERANCE


def test_a_parameter_that_neither_table_knows_is_refused_before_it_is_trained(
    with_transformer_engine: dict[str, Any],
) -> None:
    said = with_transformer_engine["refusals"]
    assert "layernorm.offset' has no Hugging Face name in model/families/" in said["saved"]
    assert "core_attention.sink' is in no checkpoint" in said["not saved"]
    assert "has the shape (" in said["shape"] and "\n" not in "".join(said.values())


@pytest.mark.long
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_family_is_the_same_in_every_layout(name: str, layout: str, in_layouts: Any) -> None:
    results = in_layouts(name)
    require_same_function(results, name, layout)
    require_same_bits(results, name, layout)
    if layout in SYNCED:
        require_same_sync(results, name, layout)
    gradients, wanted = (results(name, each)["gradient"] for each in (layout, "one"))
    for key in wanted:
        tolerance = GRADIENT_TOLERANCE * max(float(wanted[key].abs().max()), 1e-6)
        assert (gradients[key] - wanted[key]).abs().max() <= tolerance, key
    assert results(name, layout)["unmarked"] == []
    # of all ranks' parameters, each once
    assert results(name, layout)["grad_norm"] == pytest.approx(results(name, "one")["grad_norm"], rel=1e-5)
