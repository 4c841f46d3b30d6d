"""What an event mends under a mask that is already there, and what a merge leaves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.linear import linear
from efx_jax.lora import Adapters, effective_weight
from efx_jax.model.spec import LINEARS
from efx_jax.model.stack import stack_layers
from efx_jax.pruning.average import init_prune_state
from efx_jax.pruning.block_recovery import weight_before
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.recovery import admm_update, gram_brain_surgeon
from efx_jax.pruning.statistics import Statistics
from tests.pruning.event_parts import SOME, TWO, Tree, effective, random_masks


def recovered(llama: Any, stats: Statistics, recovery: Any) -> tuple[Tree, tuple[Tree, Adapters, Tree, Any]]:
    """Random masks in force before an event, and the event's outcome."""
    config = PruneConfig(score="wanda", recovery=recovery, targets=SOME)
    old = random_masks(llama, SOME)
    return old, prune_event(llama.params, llama.adapters, old, stats, None, llama.spec, config)


def test_admm_refits_to_the_masked_model_before_the_event(llama: Any, stats: Statistics) -> None:
    old, (params, adapters, masks, _) = recovered(llama, stats, "admm")
    refit = jax.jit(jax.vmap(admm_update))
    for name in SOME:
        before = effective(llama.params, llama.adapters, name) * np.asarray(old[name])
        alone = refit(before, masks[name], stats.input_gram(name))
        np.testing.assert_allclose(params["layers"][name], alone, rtol=1e-4, atol=1e-5)
        assert not np.any(adapters.lora_b[name])
    for name in set(LINEARS) - set(SOME):
        np.testing.assert_array_equal(params["layers"][name], llama.params["layers"][name])
        np.testing.assert_array_equal(adapters.lora_b[name], llama.adapters.lora_b[name])


@pytest.mark.parametrize("group", ["bounded", "2:4"])
def test_an_event_keeps_the_refined_masks_and_their_counts(llama: Any, stats: Statistics, group: str) -> None:
    plain = PruneConfig(score="wanda", recovery="admm", group=group, targets=TWO)
    refining = dataclasses.replace(plain, admm_refine=12)
    found = [
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config) for config in (plain, refining)
    ]
    for name in TWO:
        (_, _, fixed, _), (moved, _, refined, _) = found
        np.testing.assert_array_equal(jnp.sum(refined[name], axis=-1), jnp.sum(fixed[name], axis=-1))
        assert np.any(np.asarray(refined[name]) != np.asarray(fixed[name]))
        assert not np.any(np.asarray(moved["layers"][name])[~np.asarray(refined[name])])
        if group == "2:4":
            blocks = np.asarray(refined[name]).reshape(*refined[name].shape[:2], -1, 4)
            assert (blocks.sum(-1) == 2).all()


def test_gram_pbs_mends_what_the_new_mask_changes_and_not_what_the_old_one_did(llama: Any, stats: Statistics) -> None:
    old, (_, adapters, masks, _) = recovered(llama, stats, "gram_pbs")
    for name in SOME:
        before = effective(llama.params, llama.adapters, name) * np.asarray(old[name])
        only_masked = effective(llama.params, llama.adapters, name) * np.asarray(masks[name])
        repaired = effective(llama.params, adapters, name) * np.asarray(masks[name])
        for layer in range(llama.spec.num_layers):
            gram = np.asarray(stats.input_gram(name)[layer], np.float64)
            left, plain = (new[layer] - before[layer] for new in (repaired, only_masked))
            errors = np.einsum("oi,ij,oj->o", left, gram, left), np.einsum("oi,ij,oj->o", plain, gram, plain)
            assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_gram_pbs_with_a_refitted_leaves_less_than_with_a_as_it_was(llama: Any, stats: Statistics) -> None:
    old = random_masks(llama, SOME)
    found = {}
    for rounds in (0, 1, 3):
        config = PruneConfig(score="wanda", recovery="gram_pbs", pbs_rounds=rounds, targets=SOME)
        params, adapters, masks, _ = prune_event(llama.params, llama.adapters, old, stats, None, llama.spec, config)
        assert params["layers"]["q_proj"] is llama.params["layers"]["q_proj"]
        total = 0.0
        for name in SOME:
            before = effective(llama.params, llama.adapters, name) * np.asarray(old[name])
            left = effective(llama.params, adapters, name) * np.asarray(masks[name]) - before
            gram = np.asarray(stats.input_gram(name), np.float64)
            total += np.einsum("loi,lij,loj->", left, gram, left)
        found[rounds] = total
    assert found[3] < found[1] < found[0]


@pytest.mark.parametrize("group", ["row", "2:4"])
def test_swaps_lower_the_error_of_every_row_and_keep_its_count(llama: Any, stats: Statistics, group: str) -> None:
    old = random_masks(llama, TWO)
    plain = PruneConfig(score="wanda", group=group, targets=TWO)
    swapping = dataclasses.replace(plain, swaps=20)
    fixed, swapped = (
        prune_event(llama.params, llama.adapters, old, stats, None, llama.spec, config)[2]
        for config in (plain, swapping)
    )
    for name in TWO:
        u = effective(llama.params, llama.adapters, name)
        gram = np.asarray(stats.input_gram(name), np.float64)
        left = [u * ~np.asarray(masks[name]) for masks in (fixed, swapped)]
        first, last = (np.einsum("loi,lij,loj->lo", e, gram, e) for e in left)
        assert (last <= first * (1 + 1e-5)).all()
        assert last.sum() < 0.9 * first.sum()
        np.testing.assert_array_equal(jnp.sum(swapped[name], axis=-1), jnp.sum(fixed[name], axis=-1))
        # What an old mask has dropped may come back.
        assert np.any(np.asarray(swapped[name]) & ~np.asarray(old[name]))
        if group == "2:4":
            blocks = np.asarray(swapped[name]).reshape(*swapped[name].shape[:2], -1, 4)
            assert (blocks.sum(-1) == 2).all()


@pytest.mark.parametrize("mask_forward", ["exact", "ste", "frozen", "dense"])
def test_the_weight_before_an_event_is_what_the_model_computed_with(llama: Any, mask_forward: Any) -> None:
    name, x = "down_proj", np.random.default_rng(6).standard_normal((5, 24)).astype(np.float32)
    layer = jax.tree.map(lambda leaf: leaf[0], stack_layers(llama.params, llama.adapters, random_masks(llama, (name,))))
    weight, lora_a, lora_b = layer.weights[name], layer.lora_a[name], layer.lora_b[name]
    config = PruneConfig(mask_forward=mask_forward)
    before = weight_before(layer, effective_weight(weight, lora_a, lora_b, 2.0), name, config)
    y = linear(x, weight, None, lora_a, lora_b, layer.masks[name], scale=2.0, mask_forward=mask_forward)
    np.testing.assert_allclose(x @ np.asarray(before).T, y, rtol=1e-5, atol=1e-5)


def test_a_target_moves_gram_pbs_towards_it(llama: Any, stats: Statistics) -> None:
    name = "down_proj"
    weight, gram = effective(llama.params, llama.adapters, name)[0], stats.input_gram(name)[0]
    mask, lora_a = random_masks(llama, (name,))[name][0], llama.adapters.lora_a[name][0]
    plain = gram_brain_surgeon(weight, lora_a, mask, gram, 1e-3, 8)
    np.testing.assert_array_equal(plain, gram_brain_surgeon(weight, lora_a, mask, gram, 1e-3, 8, weight))
    satisfied = gram_brain_surgeon(weight, lora_a, mask, gram, 1e-3, 8, jnp.where(mask, weight, 0.0))
    assert np.any(plain) and not np.any(satisfied)


def test_merging_at_an_event_keeps_the_dtype_and_draws_new_adapters(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(score="wanda", merge_each_event=True, targets=TWO)
    layers = {name: leaf.astype(jnp.bfloat16) for name, leaf in llama.params["layers"].items()}
    half = {**llama.params, "layers": layers}
    state = init_prune_state(half, llama.adapters, config, jax.random.key(7))
    params, adapters, masks, state = prune_event(half, llama.adapters, None, stats, state, llama.spec, config)
    for name in LINEARS:
        merged = effective(half, llama.adapters, name) * (np.asarray(masks[name]) if name in TWO else 1)
        assert params["layers"][name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params["layers"][name], jnp.asarray(merged, jnp.bfloat16))
        assert not np.any(adapters.lora_b[name])
        draws = np.asarray(adapters.lora_a[name])
        assert np.all(draws != llama.adapters.lora_a[name]) and np.all(draws[0] != draws[1])
        assert np.abs(draws).max() <= 1 / np.sqrt(draws.shape[-1])
    _, again, _, _ = prune_event(half, llama.adapters, None, stats, state, llama.spec, config)
    assert np.all(again.lora_a["q_proj"] != adapters.lora_a["q_proj"])


@pytest.mark.parametrize("group", ["row", "2:4"])
def test_refinement_prunes_nothing_where_nothing_is_asked_for(llama: Any, stats: Statistics, group: str) -> None:
    config = PruneConfig(sparsity=0.0, group=group, recovery="admm", admm_steps=6, admm_refine=5)
    _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    assert all(np.asarray(mask).all() for mask in masks.values())
