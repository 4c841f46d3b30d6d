"""Units in another order: the same function, and less that N:M has to drop."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.model.decoder import forward
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.permutation import find_order, group_inputs, movable_inputs, permute
from efx_jax.pruning.statistics import Statistics, collect_statistics
from tests.tiny import random_model

CONFIG = PruneConfig(group="2:4", recovery="admm")
run = jax.jit(forward, static_argnames="spec")


def dropped(importance: np.ndarray, order: np.ndarray, kept: int, block: int) -> float:
    """What N:M drops of importance `[I,O]`, group by group and row by row."""
    total = 0.0
    for start in range(0, len(order), block):
        for row in importance[order[start : start + block]].T:
            total += float(np.sort(row)[: block - kept].sum())
    return total


@pytest.mark.parametrize(("kept", "block"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_the_order_is_a_permutation_that_drops_less(kept: int, block: int) -> None:
    importance = np.random.default_rng(0).lognormal(size=(48, 1)) * np.random.default_rng(1).random((48, 7)) ** 2
    order = group_inputs(jnp.float32(importance), kept, block)
    assert sorted(order) == list(range(48))
    as_it_is = dropped(importance, np.arange(48), kept, block)
    assert dropped(importance, order, kept, block) < 0.97 * as_it_is


def test_every_further_sweep_drops_no_more() -> None:
    importance = np.random.default_rng(2).lognormal(size=(32, 5))
    losses = [dropped(importance, group_inputs(jnp.float32(importance), 2, 4, n), 2, 4) for n in range(6)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_groups_that_meet_in_parts_lose_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = np.random.default_rng(4).lognormal(size=(96, 1)) * np.random.default_rng(5).random((96, 6)) ** 2
    together = dropped(importance, group_inputs(jnp.float32(importance), 2, 4), 2, 4)
    monkeypatch.setattr("efx_jax.pruning.permutation._TOGETHER", 7)
    order = group_inputs(jnp.float32(importance), 2, 4)
    assert sorted(order) == list(range(96))
    in_parts, as_it_is = dropped(importance, order, 2, 4), dropped(importance, np.arange(96), 2, 4)
    assert together < in_parts < as_it_is - 0.8 * (as_it_is - together)


def test_importance_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="not finite; check prune.calibration"):
        group_inputs(jnp.full((8, 3), jnp.nan), 2, 4)


def test_inputs_that_a_group_does_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="expected a number of inputs that 4 divides, found 6"):
        group_inputs(jnp.ones((6, 3)), 2, 4)


def test_an_order_for_no_pattern_is_refused(llama: Any, stats: Statistics) -> None:
    with pytest.raises(InputError, match="expected prune.group N:M such as 2:4, found row"):
        find_order(llama.params, None, stats, llama.spec, PruneConfig())


def test_hosts_that_find_different_orders_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efx_jax.parallel.hosts.meet", lambda value: [value, value ^ 1])
    with pytest.raises(InputError, match="hosts found different orders"):
        group_inputs(jnp.ones((8, 3)), 2, 4)


def test_an_event_itself_moves_no_unit(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(group="2:4", recovery="admm", permute=True)
    with pytest.raises(InputError, match="call find_order and permute .* and collect statistics after them"):
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)


def test_the_best_order_of_two_groups_is_found() -> None:
    """All four large columns stand in one group at first; 35 ways to split eight columns, by brute force."""
    importance = np.random.default_rng(3).random((8, 6))
    importance[:4] += 10
    ways = [
        (0, *rest, *(column for column in range(1, 8) if column not in rest))
        for rest in itertools.combinations(range(1, 8), 3)
    ]
    best = min(dropped(importance, np.asarray(way), 2, 4) for way in ways)
    found = dropped(importance, group_inputs(jnp.float32(importance), 2, 4, sweeps=20), 2, 4)
    assert found == pytest.approx(best, rel=1e-6)
    assert best < 0.5 * dropped(importance, np.arange(8), 2, 4)


@pytest.mark.parametrize(("model_type", "heads", "kv_heads"), [("llama", 4, 2), ("qwen2", 4, 2), ("qwen3", 4, 1)])
def test_the_model_computes_what_it_did(model_type: str, heads: int, kv_heads: int) -> None:
    rng = np.random.default_rng(5)
    spec, params, adapters = random_model(rng, model_type, heads, kv_heads)
    tokens = rng.integers(0, spec.vocab_size, (4, 12)).astype(np.int32)
    stats = collect_statistics(params, [{"tokens": tokens}], spec, adapters)
    order = find_order(params, adapters, stats, spec, CONFIG)
    other, moved = permute(params, adapters, order)
    # Qwen2's v has a bias, which no event moves.
    attention = set() if model_type == "qwen2" else {"v_proj", "o_proj"}
    assert order.rows.keys() | order.columns.keys() == {"gate_proj", "up_proj", "down_proj"} | attention
    for name, leaf in params["layers"].items():
        is_moved = name in order.rows or name in order.columns
        assert (leaf is other["layers"][name]) != is_moved
        assert leaf.dtype == other["layers"][name].dtype
    expected = np.asarray(run(params, tokens, spec, adapters))
    tolerance = 1e-5 * float(np.abs(expected).max())
    np.testing.assert_allclose(run(other, tokens, spec, moved), expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(run(merge(other, moved, None), tokens, spec), expected, atol=tolerance, rtol=0)
    assert np.abs(np.asarray(run(other, tokens, spec, adapters)) - expected).max() > 100 * tolerance


def test_less_of_the_weights_is_dropped(llama: Any) -> None:
    """Of U by the energy of its inputs, in down and in o, where two query heads share one order."""
    stats = collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters)
    order = find_order(llama.params, llama.adapters, stats, llama.spec, CONFIG)
    for name in ("down_proj", "o_proj"):
        merged = np.asarray(merge(llama.params, llama.adapters, None)["layers"][name], np.float64)
        energy = np.asarray(stats.input_norm(name), np.float64) ** 2
        for layer in range(llama.spec.num_layers):
            importance = (merged[layer] ** 2 * energy[layer]).T
            before = dropped(importance, np.arange(len(importance)), 2, 4)
            after = dropped(importance, order.columns[name][layer], 2, 4)
            assert after <= before if name == "o_proj" else after < before
    heads = order.columns["o_proj"].reshape(llama.spec.num_layers, 2, 2, -1) % llama.spec.head_dim
    np.testing.assert_array_equal(heads[:, :, 0], heads[:, :, 1])


def test_a_matrix_that_is_not_pruned_gives_no_order(llama: Any) -> None:
    stats = collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters)
    config = PruneConfig(group="2:4", recovery="admm", targets=("down_proj",))
    assert find_order(llama.params, None, stats, llama.spec, config).columns.keys() == {"down_proj"}


def test_what_can_move_nothing_is_refused(llama: Any) -> None:
    config = PruneConfig(group="4:8", recovery="admm", permute=True, targets=("q_proj", "o_proj"))
    # Eight inputs are more than the four dimensions of a head.
    with pytest.raises(InputError, match=r"nothing can move .* where o_proj is pruned \(.* heads of 4, M 8\); set it"):
        movable_inputs(llama.spec, config)
    biased = dataclasses.replace(llama.spec, biases=("q_proj", "k_proj", "v_proj"))
    both = dataclasses.replace(config, group="2:4", targets=("o_proj", "down_proj"))
    assert movable_inputs(llama.spec, both) == ("o_proj", "down_proj")
    assert movable_inputs(biased, both) == ("down_proj",)
    with pytest.raises(InputError, match="biases on q_proj, k_proj, v_proj"):
        movable_inputs(biased, dataclasses.replace(both, targets=("o_proj",)))
