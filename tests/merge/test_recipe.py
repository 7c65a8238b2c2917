import dataclasses
import json
import math

import pytest

from megatron_bai.errors import UserError
from megatron_bai.merge.execution import provenance
from megatron_bai.merge.methods.bai import Bai
from megatron_bai.merge.methods.linear import Linear
from megatron_bai.merge.recipe import output_spec


def bai(pretrained, members, weights, alpha, **patterns) -> Bai:
    return Bai(pretrained, members, weights=weights, alpha=alpha, **patterns)


def test_two_stages_are_one_sum():
    terms = bai("base", ("instruct", "reasoning"), (0.25, 0.75), 0.6).terms()
    assert [t.source for t in terms] == ["base", "instruct", "reasoning"]
    assert [t.coefficient for t in terms] == pytest.approx([0.6, 0.4 * 0.25, 0.4 * 0.75], abs=1e-15)


def test_any_number_of_members():
    recipe = bai("base", tuple("abcdefg"), (1 / 7,) * 7, 0.3)
    assert math.fsum(t.coefficient for t in recipe.terms()) == pytest.approx(1, abs=1e-15)


def test_a_source_named_twice_is_read_once():
    terms = bai("base", ("a", "base", "a"), (0.25, 0.25, 0.5), 0.5).terms()
    assert {t.source: t.coefficient for t in terms} == {"base": 0.625, "a": 0.375}


def test_weights_written_with_seven_decimals_are_brought_to_one():
    terms = bai("base", ("a", "b", "c"), (0.3333333,) * 3, 0.1).terms()
    assert math.fsum(t.coefficient for t in terms) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    "weights, alpha, message",
    [
        ((0.5, 0.4), 0.5, r"\[0.5, 0.4\] sum to 0.9"),
        ((0.5, 0.50001), 0.5, "sum to 1.00001"),
        ((1.0,), 0.5, "1 entries for 2 members"),
        ((), 0.5, "merge.weights is not given: merge.method=bai needs a weight for each of the 2 members"),
        ((math.nan, 1.0), 0.5, "not finite"),
        ((math.inf, -math.inf), 0.5, "not finite"),
        ((0.5, 0.5), 1.5, "alpha is 1.5"),
        ((0.5, 0.5), -0.1, "alpha is -0.1"),
        ((0.5, 0.5), math.nan, "alpha is nan"),
    ],
)
def test_refused(weights, alpha, message):
    with pytest.raises(UserError, match=message):
        bai("base", ("a", "b"), weights, alpha)


@pytest.mark.parametrize("method", [Bai, Linear])
def test_one_member_needs_no_weight(method):
    assert method("base", ("a",)).terms() == method("base", ("a",), weights=(1.0,)).terms()
    assert method("base", ("a",)).describe()["weights"] == (1.0,)
    with pytest.raises(UserError, match=r"merge.weights \[0.5\] sum to 0.5: they must sum to 1"):
        method("base", ("a",), weights=(0.5,))
    with pytest.raises(UserError, match=r"merge.weights_for\[router\] \[0.5\] sum to 0.5"):
        method("base", ("a",), weights_for=(("router", (0.5,)),))


def test_paths_are_needed():
    with pytest.raises(UserError, match="merge.pretrained is empty"):
        bai("", ("a",), (1.0,), 0.5)
    with pytest.raises(UserError, match="merge.members is empty"):
        bai("base", (), (), 0.5)


def test_the_first_pattern_that_fits_decides():
    recipe = bai(
        "base",
        ("a", "b"),
        (0.5, 0.5),
        0.5,
        alpha_for=(("router", 1.0), (r"layers\.[01]\.", 0.2)),
        weights_for=(("norms", (0.0, 1.0)),),
    )

    def coefficients(key):
        return [term.coefficient for term in recipe.terms(key)]

    assert coefficients("model.layers.7.mlp.experts.3.up_proj.weight") == [0.5, 0.25, 0.25]
    assert coefficients("model.layers.1.mlp.experts.3.up_proj.weight") == pytest.approx([0.2, 0.4, 0.4])
    assert coefficients("model.layers.1.mlp.gate.weight") == [1.0, 0.0, 0.0]
    assert coefficients("model.layers.0.input_layernorm.weight") == pytest.approx([0.2, 0.0, 0.8])
    assert [term.coefficient for term in recipe.terms()] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alpha_for": (("router", 1.5),)}, r"merge.alpha_for\[router\] is 1.5"),
        ({"weights_for": (("router", (0.5, 0.6)),)}, r"merge.weights_for\[router\] \[0.5, 0.6\] sum to 1.1"),
        ({"weights_for": (("router", (1.0,)),)}, "1 entries for 2 members"),
        ({"alpha_for": (("(", 0.5),)}, "neither a parameter group nor a regular expression"),
    ],
)
def test_patterns_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        bai("base", ("a", "b"), (0.5, 0.5), 0.5, **change)


@dataclasses.dataclass(frozen=True)
class NewerSpec(output_spec.OutputSpec):
    extra: int = 3


def test_a_field_that_came_later_enters_fingerprints_only_if_it_says_something():
    old = output_spec.OutputSpec(vocab_size=7)
    assert old.fingerprint_fields() == dataclasses.astuple(old)[:4]
    assert NewerSpec(vocab_size=7).fingerprint_fields() == old.fingerprint_fields()
    assert NewerSpec(vocab_size=7, extra=4).fingerprint_fields() == (*old.fingerprint_fields(), ("extra", 4))


def test_a_setting_that_a_merge_did_not_have_is_no_difference(tmp_path):
    recipe = bai("base", ("a",), (1.0,), 0.3)
    noted = recipe.describe()
    del noted["alpha_for"], noted["normalize"]
    (tmp_path / "provenance.json").write_text(json.dumps({"recipe": noted}))
    assert "of sources that have changed" in provenance.describe_difference(tmp_path, recipe)
    other = bai("base", ("a",), (1.0,), 0.3, alpha_for=(("norms", 0.1),))
    assert provenance.describe_difference(tmp_path, other) == "with merge.alpha_for {} instead of {'norms': 0.1}"
