"""Masks of units: what they remove, how much that is, and what a soft one does."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.masks import unpack_mask
from efx_jax.model.decoder import forward
from efx_jax.model.spec import LINEARS, linear_shapes
from efx_jax.structural.units import kept_fraction, soften, unit_weights, units_of, weight_masks, without_pruned_biases
from efx_jax.weights.shapes import find_spec

CASES = ("llama", "llama-mha-tied", "llama-biases", "qwen2", "qwen3")
SPACES = ("paper", "sliceable")
run = jax.jit(forward, static_argnames=("spec", "mask_forward"))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_weight_masks_and_biases_are_the_ones_written_out_by_hand(
    case: str, space: str, make_tiny: Callable, draw_masks: Callable, zero_by_hand: Callable
) -> None:
    tiny = make_tiny(case)
    unit_masks = draw_masks(tiny.spec, space)
    masks = weight_masks(unit_masks, tiny.spec, space)
    assert set(masks) == set(LINEARS)
    found = merge(without_pruned_biases(tiny.params, unit_masks, tiny.spec, space), None, masks)
    expected = zero_by_hand(tiny.params, unit_masks, tiny.spec)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_kept_fraction_is_the_share_of_kept_weights(
    case: str, space: str, make_tiny: Callable, draw_masks: Callable
) -> None:
    tiny = make_tiny(case)
    unit_masks = draw_masks(tiny.spec, space)
    shapes = linear_shapes(tiny.spec)
    kept = sum(
        int(np.sum(unpack_mask(mask, shapes[name][1])))
        for name, mask in weight_masks(unit_masks, tiny.spec, space).items()
    )
    total = tiny.spec.num_layers * sum(math.prod(shape) for shape in shapes.values())
    np.testing.assert_allclose(kept_fraction(unit_masks, tiny.spec, space), kept / total, rtol=1e-6)


def test_a_model_of_more_weights_than_an_int32_holds_has_a_kept_fraction() -> None:
    spec = find_spec("llama-2-7b").spec
    masks = {
        kind: jax.ShapeDtypeStruct((spec.num_layers, units.count), bool)
        for kind, units in units_of(spec, "paper").items()
    }
    assert jax.eval_shape(functools.partial(kept_fraction, spec=spec, space="paper"), masks).dtype == jnp.float32


def test_a_rope_pair_goes_together(make_tiny: Callable) -> None:
    spec = make_tiny("llama").spec
    rows = units_of(spec, "paper")["key_dims"].rows
    for name in ("q_proj", "k_proj"):
        by_head = rows[name].reshape(-1, spec.head_dim)
        np.testing.assert_array_equal(by_head[:, :2], by_head[:, 2:])


def test_a_head_takes_all_its_query_heads(make_tiny: Callable) -> None:
    spec = make_tiny("qwen2").spec
    heads = units_of(spec, "sliceable")["heads"]
    assert unit_weights(heads, spec) == (2 * 4 + 4 + 4 + 2 * 4) * spec.hidden_size
    np.testing.assert_array_equal(heads.rows["q_proj"], np.repeat([0, 1, 2], 8))
    np.testing.assert_array_equal(heads.rows["v_proj"], np.repeat([0, 1, 2], 4))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_a_soft_mask_of_zeros_and_ones_is_the_hard_mask(
    case: str, space: str, make_tiny: Callable, draw_masks: Callable
) -> None:
    tiny = make_tiny(case)
    unit_masks = draw_masks(tiny.spec, space)
    soft = {kind: jnp.asarray(mask, jnp.float32) for kind, mask in unit_masks.items()}
    params, adapters = soften(tiny.params, tiny.adapters, soft, tiny.spec, space)
    masks = weight_masks(unit_masks, tiny.spec, space)
    # Under masks that keep all, U is formed here too: adapters with products of their own round otherwise.
    whole = {name: jnp.ones(tiny.params["layers"][name].shape, bool) for name in masks}
    found = run(params, tiny.tokens, tiny.spec, adapters, whole, mask_forward="exact")
    base = without_pruned_biases(tiny.params, unit_masks, tiny.spec, space)
    expected = run(base, tiny.tokens, tiny.spec, tiny.adapters, masks, mask_forward="exact")
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("space", SPACES)
def test_gradient_of_soft_masks_is_the_finite_difference(space: str, make_tiny: Callable) -> None:
    tiny = make_tiny("llama")
    rng = np.random.default_rng(0)
    # Low masks keep the softmax of such large logits nearly straight over the step of the difference.
    soft = {
        kind: jnp.asarray(rng.uniform(0.1, 0.4, (tiny.spec.num_layers, units.count)), jnp.float32)
        for kind, units in units_of(tiny.spec, space).items()
    }

    @jax.jit
    def loss(soft: dict[str, jax.Array]) -> jax.Array:
        params, adapters = soften(tiny.params, tiny.adapters, soft, tiny.spec, space)
        return jnp.mean(jnp.square(forward(params, tiny.tokens, tiny.spec, adapters)))

    gradient = jax.jit(jax.grad(loss))(soft)
    for kind, mask in soft.items():
        slope = jnp.sqrt(jnp.sum(jnp.square(gradient[kind])))
        ahead, behind = (loss(soft | {kind: mask + step * gradient[kind] / slope}) for step in (3e-3, -3e-3))
        np.testing.assert_allclose((ahead - behind) / 6e-3, slope, rtol=1e-2)
        assert np.all(np.asarray(gradient[kind]) != 0)


def test_an_unknown_space_is_refused(make_tiny: Callable) -> None:
    with pytest.raises(InputError, match="space: expected one of paper, sliceable, found 'disp'"):
        units_of(make_tiny("llama").spec, "disp")


def test_weight_masks_run_under_jit(make_tiny: Callable, draw_masks: Callable) -> None:
    tiny = make_tiny("llama")
    unit_masks = draw_masks(tiny.spec, "sliceable")
    compiled = jax.jit(functools.partial(weight_masks, spec=tiny.spec, space="sliceable"))(unit_masks)
    jax.tree.map(np.testing.assert_array_equal, compiled, weight_masks(unit_masks, tiny.spec, "sliceable"))
