"""The smaller model: the same function as the masked one, and exactly as many parameters as promised."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.model.decoder import forward
from efx_jax.model.spec import param_shapes
from efx_jax.structural.slicing import (
    admissible_heads,
    parameter_count,
    promise,
    settle_masks,
    slice_model,
    sliced_spec,
)
from efx_jax.structural.units import kept_fraction, unit_weights, units_of

CASES = ("llama", "llama-mha-tied", "llama-biases", "qwen2", "qwen3")
SPACES = ("paper", "sliceable")
run = jax.jit(forward, static_argnames="spec")


def assert_same_logits(found: Any, expected: Any) -> None:
    """1e-5 of the largest logit, in float32."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.max(np.abs(expected))), rtol=0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_sliced_and_merged_model_computes_what_the_masked_one_does(
    case: str, space: str, make_tiny: Callable, draw_masks: Callable, zero_by_hand: Callable
) -> None:
    tiny = make_tiny(case)
    unit_masks = draw_masks(tiny.spec, space)
    params, adapters, spec = slice_model(tiny.params, tiny.adapters, unit_masks, tiny.spec, space)
    assert jax.tree.map(np.shape, params) == param_shapes(spec)
    masked = zero_by_hand(merge(tiny.params, tiny.adapters, None), unit_masks, tiny.spec)
    expected = run(masked, tiny.tokens, tiny.spec)
    assert_same_logits(run(merge(params, adapters, None), tiny.tokens, spec), expected)


def test_sliced_adapters_fit_the_sliced_base(make_tiny: Callable, draw_masks: Callable) -> None:
    tiny = make_tiny("qwen2")
    unit_masks = draw_masks(tiny.spec, "sliceable")
    params, adapters, spec = slice_model(tiny.params, tiny.adapters, unit_masks, tiny.spec, "sliceable")
    expected = run(merge(params, adapters, None), tiny.tokens, spec)
    assert_same_logits(run(params, tiny.tokens, spec, adapters), expected)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_promise_counts_what_is_kept_and_what_is_written(
    case: str, space: str, make_tiny: Callable, draw_masks: Callable, zero_by_hand: Callable
) -> None:
    tiny = make_tiny(case)
    unit_masks = draw_masks(tiny.spec, space)
    params, _, _ = slice_model(tiny.params, None, unit_masks, tiny.spec, space)
    found = promise(unit_masks, tiny.spec, space)
    masked = zero_by_hand(tiny.params, unit_masks, tiny.spec)
    assert found.original == sum(leaf.size for leaf in jax.tree.leaves(tiny.params))
    assert found.kept == sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(masked))
    assert found.written == sum(leaf.size for leaf in jax.tree.leaves(params))
    # Rows that fill a layer up, and head dimensions, are exact zeros.
    assert found.kept == sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(params))


def test_a_layer_may_lose_everything(make_tiny: Callable, draw_masks: Callable, zero_by_hand: Callable) -> None:
    tiny = make_tiny("qwen3")
    unit_masks = draw_masks(tiny.spec, "sliceable")
    for mask in unit_masks.values():
        mask[1] = False
    params, _, spec = slice_model(tiny.params, None, unit_masks, tiny.spec, "sliceable")
    expected = run(zero_by_hand(tiny.params, unit_masks, tiny.spec), tiny.tokens, tiny.spec)
    assert_same_logits(run(params, tiny.tokens, spec), expected)


def test_slicing_keeps_dtypes_and_exact_values(make_tiny: Callable, draw_masks: Callable) -> None:
    tiny = make_tiny("llama")
    unit_masks = draw_masks(tiny.spec, "sliceable")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    params, _, _ = slice_model(half, None, unit_masks, tiny.spec, "sliceable")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    kept = np.flatnonzero(unit_masks["hidden"][2])
    up = half["layers"]["up_proj"][2][kept]
    np.testing.assert_array_equal(params["layers"]["up_proj"][2][: len(kept)], up)


def test_heads_of_a_llama_divide_its_width(make_tiny: Callable) -> None:
    spec = dataclasses.replace(make_tiny("llama-mha-tied").spec, hidden_size=16, num_heads=8, num_kv_heads=8)
    assert admissible_heads(spec) == [1, 2, 4, 8]
    assert admissible_heads(dataclasses.replace(spec, num_kv_heads=4)) == [1, 2, 4]
    assert admissible_heads(dataclasses.replace(spec, model_type="qwen3")) == list(range(1, 9))
    masks = {"heads": np.zeros((3, 8), bool), "hidden": np.ones((3, 12), bool)}
    masks["heads"][:, :3] = True
    assert sliced_spec(spec, masks).num_kv_heads == 4


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.8])
def test_settled_layers_are_equally_wide_and_meet_the_ratio(ratio: float, make_tiny: Callable) -> None:
    spec = dataclasses.replace(make_tiny("qwen2").spec, intermediate_size=96)
    rng = np.random.default_rng(0)
    logits = {"heads": rng.standard_normal((3, 3)), "hidden": rng.standard_normal((3, 96))}
    masks = settle_masks(logits, spec, "sliceable", ratio)
    for kind, mask in masks.items():
        counts = mask.sum(axis=1)
        assert len(set(counts)) == 1
        for layer in range(3):
            lowest_kept = logits[kind][layer][mask[layer]].min()
            assert np.all(logits[kind][layer][~mask[layer]] < lowest_kept)
    kept = float(kept_fraction(masks, spec, "sliceable"))
    one_more = 3 * unit_weights(units_of(spec, "sliceable")["hidden"], spec)
    total = 3 * sum(units.count * unit_weights(units, spec) for units in units_of(spec, "sliceable").values())
    assert kept <= 1 - ratio + 1e-6
    assert kept + one_more / total > 1 - ratio or masks["hidden"].all()
    promised = promise(masks, spec, "sliceable")
    assert promised.kept == promised.written == parameter_count(sliced_spec(spec, masks))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_settling_in_the_papers_space_drops_the_lowest_until_the_ratio(ratio: float, make_tiny: Callable) -> None:
    spec = make_tiny("llama").spec
    rng = np.random.default_rng(1)
    kinds = units_of(spec, "paper")
    logits = {kind: rng.standard_normal((3, units.count)).astype(np.float32) for kind, units in kinds.items()}
    masks = settle_masks(logits, spec, "paper", ratio)
    ranked = sorted(
        (float(logits[kind][place]), unit_weights(units, spec), bool(masks[kind][place]))
        for kind, units in kinds.items()
        for place in np.ndindex(3, units.count)
    )
    total, gone = sum(size for _, size, _ in ranked), 0
    for _, size, kept in ranked:
        assert kept == (gone >= ratio * total - 1e-6)
        gone += size


def test_equal_logits_keep_the_lower_index(make_tiny: Callable) -> None:
    spec = make_tiny("llama").spec
    logits = {kind: np.zeros((3, units.count)) for kind, units in units_of(spec, "sliceable").items()}
    masks = settle_masks(logits, spec, "sliceable", 0.5)
    for mask in masks.values():
        assert np.all(np.diff(mask.astype(int), axis=1) <= 0)


@pytest.mark.parametrize(("ratio", "reason"), [(1.0, "expected a value in \\[0, 1\\)"), (0.99, "leaves no layer one")])
def test_impossible_ratios_are_refused(ratio: float, reason: str, make_tiny: Callable) -> None:
    spec = make_tiny("llama").spec
    logits = {kind: np.zeros((3, units.count)) for kind, units in units_of(spec, "sliceable").items()}
    with pytest.raises(InputError, match=reason):
        settle_masks(logits, spec, "sliceable", ratio)
