"""One prune event as a whole: what it draws, what it mends, what it remembers and how often it compiles."""

import dataclasses
from math import ceil, floor
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.linear import linear
from efx_jax.lora import Adapters, effective_weight, merge
from efx_jax.model.decoder import forward, stack_layers
from efx_jax.model.spec import LINEARS
from efx_jax.pruning import block as block_module
from efx_jax.pruning import blockwise as blockwise_module
from efx_jax.pruning.average import init_prune_state, moving_average
from efx_jax.pruning.block import block_scores, weight_before
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.recovery import admm_update, gram_brain_surgeon
from efx_jax.pruning.scores import foresight_score, weight_reach
from efx_jax.pruning.selection import select_mask
from efx_jax.pruning.statistics import INPUT_OF, Statistics, collect_statistics

Tree = dict[str, Any]
SCORES = ("magnitude", "wanda", "foresight", "foresight_gated", "ria")
GROUPS = ("row", "matrix", "bounded", "2:4")
RECOVERIES = ("none", "pbs", "gram_pbs", "admm")
SOME = ("q_proj", "k_proj", "down_proj")
TWO = ("k_proj", "down_proj")
PLAIN = PruneConfig(score="wanda", group="row", targets=TWO)

forward_jit = jax.jit(forward, static_argnums=2)


@pytest.fixture(scope="module")
def stats(llama: Any) -> Statistics:
    return collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters, gram=True)


def effective(params: Tree, adapters: Adapters, name: str) -> np.ndarray:
    """U `[L,O,I]`."""
    return np.asarray(
        effective_weight(params["layers"][name], adapters.lora_a[name], adapters.lora_b[name], adapters.scale)
    )


def with_b(adapters: Adapters, seed: int) -> Adapters:
    """The same A with another B, as if training had gone on."""
    rng = np.random.default_rng(seed)
    fresh = {n: jnp.asarray(0.2 * rng.standard_normal(b.shape), jnp.float32) for n, b in adapters.lora_b.items()}
    return dataclasses.replace(adapters, lora_b=fresh)


def random_masks(tiny: Any, names: tuple[str, ...]) -> Tree:
    rng = np.random.default_rng(8)
    return {name: jnp.asarray(rng.random(tiny.params["layers"][name].shape) < 0.5) for name in names}


def assert_sparsity(dropped: np.ndarray, group: str, sparsity: float, bound: float) -> None:
    """Exactly the target in every comparison group of one matrix `[O,I]`."""
    out_dim, in_dim = dropped.shape
    if group == "row":
        assert (dropped.sum(1) == floor(sparsity * in_dim)).all()
    elif group == "2:4":
        assert (dropped.reshape(out_dim, -1, 4).sum(-1) == 2).all()
    else:
        assert dropped.sum() == floor(sparsity * out_dim * in_dim)
    if group == "bounded":
        per_row = dropped.sum(1)
        assert per_row.min() >= floor((sparsity - bound) * in_dim)
        assert per_row.max() <= ceil((sparsity + bound) * in_dim)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("score", SCORES)
def test_the_merged_model_has_the_target_sparsity_and_computes_what_the_masked_one_did(
    llama: Any, stats: Statistics, score: Any, group: str
) -> None:
    recovery: Any = RECOVERIES[(SCORES.index(score) + GROUPS.index(group)) % 4]
    config = PruneConfig(score=score, group=group, recovery=recovery, targets=TWO)
    params, adapters, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    merged = merge(params, adapters, masks)
    assert set(masks) == set(TWO)
    for name in TWO:
        for mask, weight in zip(np.asarray(masks[name]), np.asarray(merged["layers"][name]), strict=True):
            np.testing.assert_array_equal(weight == 0, ~mask)
            assert_sparsity(~mask, group, 0.5, config.bound)
    tokens = llama.batches[0]["tokens"]
    np.testing.assert_allclose(
        forward_jit(merged, tokens, llama.spec),
        forward_jit(params, tokens, llama.spec, adapters, masks),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_masks_are_those_of_the_scores(llama: Any, stats: Statistics) -> None:
    @jax.jit
    @jax.vmap
    def draw(weight: Tree, seen: Statistics) -> Tree:
        reach = weight_reach(weight, llama.spec)
        scores = {name: foresight_score(weight[name], seen.input_norm(name), reach[name]) for name in LINEARS}
        return {name: select_mask(score, 0.3, "matrix") for name, score in scores.items()}

    config = PruneConfig(score="foresight", group="matrix", sparsity=0.3)
    _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    wanted = draw({name: effective(llama.params, llama.adapters, name) for name in LINEARS}, stats)
    for name in LINEARS:
        np.testing.assert_array_equal(masks[name], wanted[name])


def test_twice_alpha_is_twice_b(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(score="foresight", group="matrix", recovery="pbs", targets=TWO)
    doubled = {name: 2 * b for name, b in llama.adapters.lora_b.items()}
    outcomes = {}
    for label, adapters in {
        "alpha 2r": llama.adapters,
        "alpha r, 2B": dataclasses.replace(llama.adapters, lora_b=doubled, scale=1.0),
        "alpha r": dataclasses.replace(llama.adapters, scale=1.0),
    }.items():
        params, new, masks, _ = prune_event(llama.params, adapters, None, stats, None, llama.spec, config)
        outcomes[label] = new, masks, merge(params, new, masks)["layers"]
    (first, masks, merged), (second, same_masks, same_merged) = outcomes["alpha 2r"], outcomes["alpha r, 2B"]
    for name in TWO:
        np.testing.assert_array_equal(masks[name], same_masks[name])
        np.testing.assert_allclose(2 * first.lora_b[name], second.lora_b[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged[name], same_merged[name], rtol=1e-5, atol=1e-6)
    assert any(np.any(masks[name] != outcomes["alpha r"][1][name]) for name in TWO)


def test_a_frozen_base_is_shared_and_not_copied(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(score="foresight", group="matrix", recovery="pbs", targets=TWO)
    params, adapters, _, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    for name, before in llama.params["layers"].items():
        assert params["layers"][name] is before
    for name in TWO:
        np.testing.assert_array_equal(adapters.lora_a[name], llama.adapters.lora_a[name])
        assert np.any(adapters.lora_b[name] != llama.adapters.lora_b[name])


def test_row_targets_compare_within_rows_and_other_matrices_are_left_alone(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(group="matrix", row_targets=("q_proj",), targets=("q_proj", "up_proj"))
    _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    assert set(masks) == {"q_proj", "up_proj"}
    for layer in range(llama.spec.num_layers):
        assert_sparsity(~np.asarray(masks["q_proj"][layer]), "row", 0.5, 0)
        assert_sparsity(~np.asarray(masks["up_proj"][layer]), "matrix", 0.5, 0)
        assert np.unique(np.sum(masks["up_proj"][layer], axis=1)).size > 1


def test_without_adapters_the_weight_itself_is_judged(llama: Any, stats: Statistics) -> None:
    still = dataclasses.replace(llama.adapters, lora_b={n: 0 * b for n, b in llama.adapters.lora_b.items()})
    _, nothing, bare, _ = prune_event(llama.params, None, None, stats, None, llama.spec, PLAIN)
    _, _, adapted, _ = prune_event(llama.params, still, None, stats, None, llama.spec, PLAIN)
    assert nothing is None
    for name in TWO:
        np.testing.assert_array_equal(bare[name], adapted[name])


# The moving average.


def repeated(llama: Any, stats: Statistics, config: PruneConfig, events: int) -> tuple[list[Tree], Any]:
    """The masks of several events, B being drawn anew before each but the first, and the state after all."""
    state = init_prune_state(llama.params, llama.adapters, config, jax.random.key(0), events=2)
    masks, adapters = [], llama.adapters
    for number in range(events):
        _, _, drawn, state = prune_event(llama.params, adapters, None, stats, state, llama.spec, config)
        masks.append(drawn)
        adapters = with_b(llama.adapters, number)
    return masks, state


def test_eta_one_has_no_memory(llama: Any, stats: Statistics) -> None:
    masks, state = repeated(llama, stats, PLAIN, 2)
    _, _, fresh, _ = prune_event(llama.params, with_b(llama.adapters, 0), None, stats, None, llama.spec, PLAIN)
    for name in TWO:
        np.testing.assert_array_equal(masks[1][name], fresh[name])
    assert state.snapshots == {} and state.score == {} and int(state.event) == 2


def test_events_with_memory_keep_exact_counts_and_the_first_is_raw(llama: Any, stats: Statistics) -> None:
    # The second event once dropped 765 of 768 entries where 384 should go: the compiler had computed the average
    # twice, with two roundings.
    config = PruneConfig(score="wanda", group="bounded", recovery="pbs", ema=0.5, targets=TWO)
    masks, _ = repeated(llama, stats, config, 6)
    for name in TWO:
        for mask in np.concatenate([drawn[name] for drawn in masks]):
            assert_sparsity(~mask, "bounded", 0.5, config.bound)
    raw, _ = repeated(llama, stats, dataclasses.replace(config, ema=1.0), 2)
    for name in TWO:
        np.testing.assert_array_equal(masks[0][name], raw[0][name])
    assert any(np.any(masks[1][name] != raw[1][name]) for name in TWO)


@pytest.mark.parametrize("score", ["magnitude", "ria", "foresight_gated"])
def test_snapshots_rebuild_the_average_that_a_tensor_would_carry(llama: Any, stats: Statistics, score: Any) -> None:
    """To float32 rounding; with two slots the third event on forgets what lies before the last two."""
    eta, slots, events = 0.3, 2, 5
    config = PruneConfig(score=score, ema=eta, targets=TWO)
    moving = dataclasses.replace(config, merge_each_event=True)

    def first_block(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], tree)

    @jax.jit
    def step(layer: Any, seen: Statistics, memories: tuple[Any, Any], number: jax.Array) -> tuple[Any, ...]:
        weight = {
            name: effective_weight(layer.weights[name], layer.lora_a[name], layer.lora_b[name], 2.0) for name in LINEARS
        }
        scores, reach = block_scores(layer, weight, seen, {}, llama.spec, config)
        rebuilt, snapshots = moving_average(scores, reach, layer, seen, memories[0], number, config, 2.0)
        carried, tensor = moving_average(scores, reach, layer, seen, memories[1], number, moving, 2.0)
        return scores, rebuilt, carried, (snapshots, tensor)

    state = init_prune_state(llama.params, llama.adapters, config, jax.random.key(0), events=slots)
    zeros = {name: jnp.zeros(llama.params["layers"][name].shape[1:]) for name in TWO}
    memories = ({"snapshots": first_block(state.snapshots), "score": {}}, {"snapshots": {}, "score": zeros})
    rng, raw = np.random.default_rng(4), []
    for number in range(events):
        layer = first_block(stack_layers(llama.params, with_b(llama.adapters, number), None))
        seen = first_block(stats)
        energy = {n: e * jnp.asarray(rng.uniform(0.5, 2.0, e.shape), jnp.float32) for n, e in seen.energy.items()}
        seen = dataclasses.replace(seen, energy=energy)
        scores, rebuilt, carried, memories = step(layer, seen, memories, jnp.int32(number))
        raw.append({name: np.asarray(values) for name, values in scores.items()})
        for name in TWO:
            for found, known in ((carried[name], raw), (rebuilt[name], raw[-slots - 1 :])):
                average = known[0][name]
                for later in known[1:]:
                    average = np.float32(eta) * later[name] + np.float32(1 - eta) * average
                np.testing.assert_allclose(found, average, rtol=2e-6)
            if number == 0:
                np.testing.assert_array_equal(rebuilt[name], raw[0][name])


def test_where_events_move_the_base_the_average_is_kept_as_a_tensor(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(score="wanda", recovery="admm", ema=0.25, targets=TWO)
    state = init_prune_state(llama.params, llama.adapters, config, jax.random.key(0))
    params, adapters = llama.params, llama.adapters
    average: Tree = {}
    for number in range(2):
        for name in TWO:
            raw = np.abs(effective(params, adapters, name)) * np.asarray(stats.input_norm(name))[:, None]
            average[name] = raw if number == 0 else 0.25 * raw + 0.75 * average[name]
        params, adapters, masks, state = prune_event(params, adapters, None, stats, state, llama.spec, config)
        assert state.snapshots == {}
        for name in TWO:
            np.testing.assert_allclose(state.score[name], average[name], rtol=1e-5)
            assert not np.any(adapters.lora_b[name])
            np.testing.assert_array_equal(np.asarray(params["layers"][name]) == 0, ~np.asarray(masks[name]))
            assert_sparsity(~np.asarray(masks[name][0]), "row", 0.5, 0)
        adapters = with_b(adapters, 30)


# Recovery under a mask that is already there.


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


# Block by block.

SEQUENTIAL = PruneConfig(score="wanda", group="matrix", recovery="pbs", targets=TWO, sequential=True)


@pytest.fixture(scope="module")
def sequential(llama: Any) -> tuple[Tree, Adapters, Tree, Any]:
    return prune_event_blockwise(llama.params, llama.adapters, None, llama.batches, None, llama.spec, SEQUENTIAL)


def test_block_by_block_equals_one_pass_on_the_first_block_and_differs_later(
    llama: Any, stats: Statistics, sequential: Any
) -> None:
    _, adapters, masks, state = sequential
    _, once, masks_once, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, SEQUENTIAL)
    assert int(state.event) == 1
    for name in TWO:
        np.testing.assert_array_equal(masks[name][0], masks_once[name][0])
        np.testing.assert_allclose(adapters.lora_b[name][0], once.lora_b[name][0], rtol=1e-4, atol=1e-5)
    assert any(np.any(masks[name][1] != masks_once[name][1]) for name in TWO)


def test_block_by_block_calibrates_the_second_block_behind_the_pruned_first(llama: Any, sequential: Any) -> None:
    _, adapters, masks, _ = sequential
    first_pruned = {name: mask.at[1].set(True) for name, mask in masks.items()}
    first_mended = {name: b.at[1].set(llama.adapters.lora_b[name][1]) for name, b in adapters.lora_b.items()}
    adapters = dataclasses.replace(adapters, lora_b=first_mended)
    seen = collect_statistics(llama.params, llama.batches, llama.spec, adapters, first_pruned, gram=True)
    _, _, wanted, _ = prune_event(llama.params, llama.adapters, None, seen, None, llama.spec, SEQUENTIAL)
    for name in TWO:
        np.testing.assert_array_equal(masks[name][1], wanted[name][1])


@pytest.mark.parametrize("recovery", ["gram_pbs", "admm"])
def test_block_by_block_on_the_model_as_it_was_equals_one_pass(llama: Any, recovery: Any) -> None:
    config = PruneConfig(score="foresight_gated", group="matrix", recovery=recovery, targets=SOME)
    old = random_masks(llama, SOME)
    seen = collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters, old, gram=True)
    whole = prune_event(llama.params, llama.adapters, old, seen, None, llama.spec, config)
    blocks = prune_event_blockwise(llama.params, llama.adapters, old, llama.batches, None, llama.spec, config)
    chex.assert_trees_all_equal(whole[2], blocks[2])
    chex.assert_trees_all_close(whole[:2], blocks[:2], rtol=1e-4, atol=1e-5)


def test_block_by_block_without_lengths_every_token_is_real(llama: Any, sequential: Any) -> None:
    tokens = llama.batches[0]["tokens"]
    runs = [
        prune_event_blockwise(llama.params, llama.adapters, None, [batch], None, llama.spec, SEQUENTIAL)
        for batch in ({"tokens": tokens}, {"tokens": tokens, "lengths": np.full(8, 16)})
    ]
    for name in TWO:
        np.testing.assert_array_equal(runs[0][2][name], runs[1][2][name])


# Compilation and bad input.


def test_a_new_sparsity_needs_no_new_program(
    llama: Any, stats: Statistics, sequential: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced_again(*_: Any) -> None:
        raise AssertionError("a new trace")

    prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, PLAIN)
    monkeypatch.setattr(block_module, "block_scores", traced_again)
    monkeypatch.setattr(blockwise_module, "block_statistics", traced_again)
    for sparsity in (0.0, 0.1, 0.9):
        config = dataclasses.replace(PLAIN, sparsity=sparsity)
        _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
        assert int(np.sum(~np.asarray(masks["down_proj"]))) == 2 * 16 * floor(sparsity * 24)
        config = dataclasses.replace(SEQUENTIAL, sparsity=sparsity)
        prune_event_blockwise(llama.params, llama.adapters, None, llama.batches, None, llama.spec, config)
    other = dataclasses.replace(PLAIN, group="1:2")
    with pytest.raises(AssertionError, match="a new trace"):
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, other)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"recovery": "admm"}, "expected Gram matrices, found none; collect with gram=True"),
        ({"recovery": "gram_pbs"}, "expected Gram matrices, found none; collect with gram=True"),
        ({"sparsity": 1.0}, "sparsity: expected a value in \\[0, 1\\)"),
        ({"group": "2:4", "sparsity": 0.4}, "group 2:4: expected sparsity 0.5, found 0.4"),
        ({"group": "3:5", "sparsity": 0.4}, "divisible by 5, found 16"),
        ({"group": "column"}, "expected row, matrix, slab, bounded or N:M"),
    ],
)
def test_an_event_that_cannot_be_is_refused_with_one_line(
    llama: Any, stats: Statistics, change: Tree, complaint: str
) -> None:
    config = dataclasses.replace(PLAIN, **change)
    without_grams = dataclasses.replace(stats, gram={})
    with pytest.raises(InputError, match=complaint) as caught:
        prune_event(llama.params, llama.adapters, None, without_grams, None, llama.spec, config)
    assert "\n" not in str(caught.value)


def test_block_by_block_without_a_real_token_is_refused_with_one_line(llama: Any) -> None:
    empty = {"tokens": llama.batches[0]["tokens"], "lengths": np.zeros(8, np.int32)}
    for batches in ([], [empty]):
        with pytest.raises(InputError, match="expected at least one real token, found none") as caught:
            prune_event_blockwise(llama.params, llama.adapters, None, batches, None, llama.spec, PLAIN)
        assert "\n" not in str(caught.value)


def test_every_input_has_a_name() -> None:
    assert set(INPUT_OF) == set(LINEARS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "sparsegbt"}, "prune.score must be one of magnitude"),
        ({"recovery": "grampbs"}, "prune.recovery must be one of none"),
        ({"mask_forward": "Exact"}, "prune.mask_forward must be one of exact"),
        ({"targets": ("qproj",)}, "prune.targets"),
        ({"targets": ()}, "prune.targets"),
        ({"ema": 0.5}, "the state has no memory"),
        ({"score": "sparsegpt", "ema": 0.5}, "prune.ema must be 1 with prune.score sparsegpt"),
        (
            {"score": "sparsegpt", "group": "bounded"},
            "prune.group must be row, matrix or N:M with prune.score sparsegpt",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(
    llama: Any, stats: Statistics, change: dict[str, Any], message: str
) -> None:
    config = dataclasses.replace(PruneConfig(targets=TWO), **change)
    state = init_prune_state(llama.params, llama.adapters, PruneConfig(targets=TWO), jax.random.key(0))
    with pytest.raises(InputError, match=message):
        prune_event(llama.params, llama.adapters, None, stats, state, llama.spec, config)


def test_a_recovery_that_moves_adapters_needs_them(llama: Any, stats: Statistics) -> None:
    with pytest.raises(InputError, match="moves adapters, found none"):
        prune_event(llama.params, None, None, stats, None, llama.spec, PruneConfig(recovery="gram_pbs"))
