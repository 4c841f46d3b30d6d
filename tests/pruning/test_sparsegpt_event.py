"""SparseGPT as an event: what the sweep starts from, what it leaves, and with which other score or repair it goes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.lora import effective_weight, merge
from efx_jax.model.decoder import forward
from efx_jax.model.spec import LINEARS
from efx_jax.pruning import block_recovery
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.recovery import admm_update
from efx_jax.pruning.scores import wanda_score
from efx_jax.pruning.selection import select_mask
from efx_jax.pruning.sparsegpt import Sweep, obs_update, sparsegpt
from efx_jax.pruning.statistics import Statistics, collect_statistics

Tree = dict[str, Any]
TWO = ("k_proj", "down_proj")
SPARSEGPT = PruneConfig(score="sparsegpt", group="matrix", recovery="obs", targets=TWO)

forward_jit = jax.jit(forward, static_argnums=2)
sweep_all = jax.jit(jax.vmap(sparsegpt, in_axes=(0, 0, None, None)), static_argnums=(2, 3))
update_all = jax.jit(jax.vmap(obs_update))


@pytest.fixture(scope="module")
def old_masks(llama: Any) -> Tree:
    rng = np.random.default_rng(8)
    return {name: jnp.asarray(rng.random(llama.params["layers"][name].shape) < 0.6) for name in TWO}


def effective(llama: Any, name: str) -> jax.Array:
    """U `[L,O,I]`."""
    adapters = llama.adapters
    return effective_weight(llama.params["layers"][name], adapters.lora_a[name], adapters.lora_b[name], adapters.scale)


def swept(llama: Any, stats: Statistics, name: str, group: str, old: Tree | None = None) -> Sweep:
    weight = effective(llama, name)
    return sweep_all(weight if old is None else weight * old[name], stats.input_gram(name), 0.5, group)


@pytest.mark.parametrize("group", ["matrix", "2:4"])
def test_with_its_own_update_the_base_becomes_the_swept_weight(llama: Any, stats: Statistics, group: str) -> None:
    config = dataclasses.replace(SPARSEGPT, group=group)
    params, adapters, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    for name in TWO:
        alone = swept(llama, stats, name, group)
        np.testing.assert_array_equal(masks[name], alone.mask)
        np.testing.assert_allclose(params["layers"][name], alone.weight, rtol=0, atol=1e-5)
        assert not np.any(adapters.lora_b[name])
    for name in set(LINEARS) - set(TWO):
        np.testing.assert_array_equal(params["layers"][name], llama.params["layers"][name])
        np.testing.assert_array_equal(adapters.lora_b[name], llama.adapters.lora_b[name])
    merged = merge(params, adapters, masks)
    for name in TWO:
        zeros = np.asarray(merged["layers"][name]) == 0
        np.testing.assert_array_equal(zeros, ~np.asarray(masks[name]))
        assert (zeros.sum((1, 2)) == zeros[0].size // 2).all()
    tokens = llama.batches[0]["tokens"]
    np.testing.assert_allclose(
        forward_jit(merged, tokens, llama.spec),
        forward_jit(params, tokens, llama.spec, adapters, masks),
        rtol=1e-4,
        atol=1e-4,
    )


def test_under_an_old_mask_the_sweep_starts_from_the_model_that_the_mask_made(
    llama: Any, stats: Statistics, old_masks: Tree
) -> None:
    params, _, masks, _ = prune_event(llama.params, llama.adapters, old_masks, stats, None, llama.spec, SPARSEGPT)
    for name in TWO:
        alone = swept(llama, stats, name, "matrix", old_masks)
        np.testing.assert_array_equal(masks[name], alone.mask)
        np.testing.assert_allclose(params["layers"][name], alone.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recovery", ["none", "admm"])
def test_with_another_recovery_the_mask_alone_is_taken_from_the_sweep(
    llama: Any, stats: Statistics, old_masks: Tree, recovery: Any
) -> None:
    config = dataclasses.replace(SPARSEGPT, recovery=recovery)
    params, adapters, masks, _ = prune_event(llama.params, llama.adapters, old_masks, stats, None, llama.spec, config)
    for name in TWO:
        np.testing.assert_array_equal(masks[name], swept(llama, stats, name, "matrix").mask)
        if recovery == "none":
            assert params["layers"][name] is llama.params["layers"][name]
            np.testing.assert_array_equal(adapters.lora_b[name], llama.adapters.lora_b[name])
        else:
            before = effective(llama, name) * old_masks[name]
            refitted = jax.jit(jax.vmap(admm_update))(before, masks[name], stats.input_gram(name))
            np.testing.assert_allclose(params["layers"][name], refitted, rtol=1e-4, atol=1e-5)


def test_another_score_with_the_update_sweeps_under_that_scores_mask(
    llama: Any, stats: Statistics, old_masks: Tree
) -> None:
    config = PruneConfig(score="wanda", recovery="obs", targets=TWO)
    params, adapters, masks, _ = prune_event(llama.params, llama.adapters, old_masks, stats, None, llama.spec, config)
    for name in TWO:
        weight = effective(llama, name)
        for layer in range(llama.spec.num_layers):
            score = wanda_score(weight[layer], stats.input_norm(name)[layer])
            np.testing.assert_array_equal(masks[name][layer], select_mask(score, 0.5))
        alone = update_all(weight * old_masks[name], masks[name], stats.input_gram(name))
        np.testing.assert_allclose(params["layers"][name], alone, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(params["layers"][name])[~np.asarray(masks[name])], 0)
        assert not np.any(adapters.lora_b[name])


def test_block_by_block_the_second_block_is_swept_behind_the_first(llama: Any, stats: Statistics) -> None:
    config = dataclasses.replace(SPARSEGPT, sequential=True)
    params, adapters, masks, _ = prune_event_blockwise(
        llama.params, llama.adapters, None, llama.batches, None, llama.spec, config
    )
    layers = {
        name: llama.params["layers"][name].at[0].set(params["layers"][name][0]) for name in llama.params["layers"]
    }
    lora_b = {name: b.at[0].set(adapters.lora_b[name][0]) for name, b in llama.adapters.lora_b.items()}
    behind = collect_statistics(
        {**llama.params, "layers": layers},
        llama.batches,
        llama.spec,
        dataclasses.replace(llama.adapters, lora_b=lora_b),
        {name: mask.at[1].set(True) for name, mask in masks.items()},
        gram=True,
    )
    for name in TWO:
        first, second = swept(llama, stats, name, "matrix"), swept(llama, behind, name, "matrix")
        np.testing.assert_array_equal(masks[name][0], first.mask[0])
        np.testing.assert_array_equal(masks[name][1], second.mask[1])
        np.testing.assert_allclose(params["layers"][name][1], second.weight[1], rtol=0, atol=1e-4)
    assert any(np.any(masks[name][1] != swept(llama, stats, name, "matrix").mask[1]) for name in TWO)


def test_a_new_sparsity_needs_no_new_program(llama: Any, stats: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced_again(*_: Any) -> None:
        raise AssertionError("a new trace")

    prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, SPARSEGPT)
    monkeypatch.setattr(block_recovery, "inverse_factor", traced_again)
    for sparsity in (0.0, 0.3, 0.9):
        config = dataclasses.replace(SPARSEGPT, sparsity=sparsity)
        _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
        assert int(np.sum(~np.asarray(masks["down_proj"]))) == 2 * int(sparsity * 16 * 24 + 1e-9)


@pytest.mark.parametrize("change", [{"score": "wanda"}, {"recovery": "none"}])
def test_without_grams_there_is_no_sweep(llama: Any, stats: Statistics, change: Tree) -> None:
    config = dataclasses.replace(SPARSEGPT, **change)
    without = dataclasses.replace(stats, gram={})
    with pytest.raises(InputError, match="expected Gram matrices, found none"):
        prune_event(llama.params, llama.adapters, None, without, None, llama.spec, config)
