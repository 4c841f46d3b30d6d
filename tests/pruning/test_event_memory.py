"""The average of scores over events: exact, in a tensor or rebuilt from snapshots."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.lora import effective_weight
from efx_jax.model.spec import LINEARS
from efx_jax.model.stack import stack_layers
from efx_jax.pruning.average import init_prune_state, moving_average
from efx_jax.pruning.block import block_scores
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.statistics import Statistics
from tests.pruning.event_parts import PLAIN, TWO, Tree, assert_sparsity, effective, with_b


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
