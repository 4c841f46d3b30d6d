"""ATP's formulas against plain NumPy."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.structural.losses import (
    generator_loss,
    group_norms,
    lasso_strength,
    proximal_step,
    pruned_shares,
    ratio_loss,
)
from efx_jax.structural.units import units_of

SPACES = ("paper", "sliceable")
shrink = jax.jit(proximal_step, static_argnames=("spec", "space"))


@pytest.mark.parametrize(("kept", "target"), [(0.8, 0.5), (0.3, 0.5), (1.0, 0.6)])
def test_ratio_loss_is_the_distance_of_logarithms(kept: float, target: float) -> None:
    expected = np.log(max(kept, target) / min(kept, target))
    np.testing.assert_allclose(ratio_loss(jnp.float32(kept), target), expected, rtol=1e-6)
    slope = jax.grad(ratio_loss)(jnp.float32(kept), target)
    np.testing.assert_allclose(slope, np.sign(kept - target) / kept, rtol=1e-6)


def test_ratio_loss_rests_on_the_target() -> None:
    assert float(ratio_loss(jnp.float32(0.5), 0.5)) == 0.0
    assert float(jax.grad(ratio_loss)(jnp.float32(0.5), 0.5)) == 0.0


def test_generator_loss_weighs_the_ratio_five_times() -> None:
    found = generator_loss(jnp.float32(2.5), jnp.float32(0.9), 0.4)
    np.testing.assert_allclose(found, 2.5 + 5 * np.log(0.9 / 0.6), rtol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 37, 99])
def test_lasso_strength_grows_with_the_logarithm_of_the_step(step: int) -> None:
    np.testing.assert_allclose(lasso_strength(step, 100), 1e5 * np.log(step + 1) / np.log(101), rtol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_shares_count_pruned_channels_and_sum_to_one(space: str, make_tiny: Callable, draw_masks: Callable) -> None:
    spec = make_tiny("qwen2").spec
    masks = draw_masks(spec, space)
    lead = {"key_dims": "k_proj", "value_dims": "v_proj", "heads": "v_proj", "hidden": "up_proj"}
    channels = {
        kind: [sum(not masks[kind][layer][unit] for unit in units.rows[lead[kind]]) for layer in range(spec.num_layers)]
        for kind, units in units_of(spec, space).items()
    }
    total = sum(sum(counts) for counts in channels.values())
    shares = pruned_shares(jax.tree.map(jnp.asarray, masks), spec, space)
    for kind, counts in channels.items():
        np.testing.assert_allclose(shares[kind], np.array(counts) / total, rtol=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("threshold", [0.3, 2.0])
def test_proximal_step_is_the_one_of_numpy(
    space: str, threshold: float, make_tiny: Callable, draw_masks: Callable
) -> None:
    tiny = make_tiny("qwen2")
    masks = jax.tree.map(jnp.asarray, draw_masks(tiny.spec, space))
    shares = pruned_shares(masks, tiny.spec, space)
    strength, learning_rate = jnp.float32(threshold * 1e4), 1e-3
    found = shrink(tiny.adapters, masks, tiny.spec, space, strength, learning_rate)
    lora_a = {name: np.array(leaf, np.float64) for name, leaf in tiny.adapters.lora_a.items()}
    lora_b = {name: np.array(leaf, np.float64) for name, leaf in tiny.adapters.lora_b.items()}
    for kind, units in units_of(tiny.spec, space).items():
        for layer, unit in zip(*np.nonzero(~np.asarray(masks[kind])), strict=True):
            parts = [lora_b[name][layer, rows == unit] for name, rows in units.rows.items()]
            parts += [lora_a[name][layer][:, columns == unit] for name, columns in units.columns.items()]
            norm = np.sqrt(sum(np.sum(part**2) for part in parts))
            shrunk = max(0.0, norm - float(strength) * float(shares[kind][layer]) * learning_rate)
            for name, rows in units.rows.items():
                lora_b[name][layer, rows == unit] *= shrunk / norm
            for name, columns in units.columns.items():
                lora_a[name][layer][:, columns == unit] *= shrunk / norm
    for name in lora_a:
        np.testing.assert_allclose(found.lora_a[name], lora_a[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.lora_b[name], lora_b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_proximal_step_empties_pruned_groups_and_leaves_the_others(
    space: str, make_tiny: Callable, draw_masks: Callable
) -> None:
    tiny = make_tiny("llama")
    masks = jax.tree.map(jnp.asarray, draw_masks(tiny.spec, space))
    found = shrink(tiny.adapters, masks, tiny.spec, space, jnp.float32(1e5), 1.0)
    for kind, units in units_of(tiny.spec, space).items():
        before, after = (np.asarray(group_norms(adapters, units)) for adapters in (tiny.adapters, found))
        kept = np.asarray(masks[kind])
        assert np.all(after[~kept] == 0) and np.all(before[~kept] > 0)
        np.testing.assert_array_equal(after[kept], before[kept])


def test_empty_groups_and_missing_adapters_stay_finite(make_tiny: Callable, draw_masks: Callable) -> None:
    tiny = make_tiny("llama")
    masks = jax.tree.map(jnp.asarray, draw_masks(tiny.spec, "sliceable"))
    empty = dataclasses.replace(
        tiny.adapters,
        lora_a={"o_proj": jnp.zeros_like(tiny.adapters.lora_a["o_proj"])},
        lora_b={"o_proj": tiny.adapters.lora_b["o_proj"]},
    )
    found = shrink(empty, masks, tiny.spec, "sliceable", jnp.float32(1.0), 1.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found.lora_b["o_proj"], empty.lora_b["o_proj"])
