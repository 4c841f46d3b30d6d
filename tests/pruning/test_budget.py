"""Budgets by outliers (OWL) and by one threshold against plain loops, and events that keep to them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.budget import _count_outliers, global_budgets, outlier_shares, owl_sparsities
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.event_plan import plan_event
from efx_jax.pruning.selection import drop_count, drop_share
from efx_jax.pruning.statistics import Statistics, collect_statistics

TWO = ("k_proj", "down_proj")
# Few entries of a tiny model are five times the mean.
OWL = PruneConfig(budget="owl", group="matrix", owl_multiple=1.5, targets=TWO)


@pytest.fixture(scope="module")
def stats(llama: Any) -> Statistics:
    return collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters)


def test_a_block_of_more_entries_than_an_int32_holds_has_outliers() -> None:
    """As LLaMA 3.1 405B has."""
    weights = {"gate_proj": jax.ShapeDtypeStruct((1, 2**16, 2**15 + 1), jnp.bfloat16)}
    norms = {"gate_proj": jax.ShapeDtypeStruct((1, 2**15 + 1), jnp.float32)}
    (found,) = jax.eval_shape(functools.partial(_count_outliers, scale=1.0), weights, {}, {}, norms, 5.0)
    assert (found.shape, found.dtype) == ((1,), jnp.int32)


def outliers_by_hand(llama: Any, stats: Statistics, multiple: float) -> list[float]:
    shares = []
    for layer in range(llama.spec.num_layers):
        scores: list[float] = []
        for name in TWO:
            adapters = llama.adapters
            low_rank = np.asarray(adapters.lora_b[name][layer], np.float64) @ np.asarray(adapters.lora_a[name][layer])
            weight = np.asarray(llama.params["layers"][name][layer], np.float64) + adapters.scale * low_rank
            norm = np.asarray(stats.input_norm(name)[layer])
            scores += [abs(weight[o, i]) * norm[i] for o, i in np.ndindex(weight.shape)]
        limit = multiple * sum(scores) / len(scores)
        shares.append(sum(score > limit for score in scores) / len(scores))
    return shares


def sparsities_by_hand(shares: list[float], sparsity: float, owl_lambda: float) -> list[float]:
    low, high = min(shares), max(shares)
    kept = [(share - low) / (high - low) * 2 * owl_lambda for share in shares]
    kept = [share - sum(kept) / len(kept) + (1 - sparsity) for share in kept]
    return [1 - share for share in kept]


@pytest.mark.parametrize("multiple", [1.5, 3.0])
def test_outliers_are_the_share_above_a_multiple_of_the_layers_mean(
    llama: Any, stats: Statistics, multiple: float
) -> None:
    config = dataclasses.replace(OWL, owl_multiple=multiple)
    found = outlier_shares(llama.params, llama.adapters, stats, config)
    assert found == pytest.approx(outliers_by_hand(llama, stats, multiple), abs=1e-12)
    assert found[0] != found[1]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_sparsities_are_those_of_the_formula(sparsity: float) -> None:
    shares = [0.031, 0.007, 0.012, 0.05, 0.02]
    found = owl_sparsities(shares, sparsity, 0.08)
    assert found == pytest.approx(sparsities_by_hand(shares, sparsity, 0.08), abs=1e-12)
    assert sum(found) / 5 == pytest.approx(sparsity, abs=1e-12)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert np.argmin(found) == 3 and np.argmax(found) == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.95, 0.999])
def test_no_layer_loses_all_or_gains_and_the_average_stays(sparsity: float) -> None:
    found = owl_sparsities([0.0, 0.3, 0.1], sparsity, 0.2)
    assert sum(found) / 3 == pytest.approx(sparsity, abs=1e-12)
    assert min(found) >= 0 and max(found) < 1
    assert sparsity == 0 or found[1] < found[2] < found[0]


def test_equal_layers_and_a_lambda_of_zero_are_uniform() -> None:
    assert owl_sparsities([0.1, 0.1, 0.1], 0.5, 0.08) == (0.5, 0.5, 0.5)
    assert owl_sparsities([0.1, 0.2, 0.3], 0.5, 0.0) == (0.5, 0.5, 0.5)


def drops(llama: Any, config: PruneConfig, sparsities: list[float]) -> dict[str, list[int]]:
    shapes = {name: llama.params["layers"][name].shape[1:] for name in TWO}
    if config.group == "matrix":
        return {name: [int(s * o * i + 1e-9) for s in sparsities] for name, (o, i) in shapes.items()}
    return {name: [o * int(s * i + 1e-9) for s in sparsities] for name, (o, i) in shapes.items()}


@pytest.mark.parametrize(
    "change", [{}, {"group": "row", "owl_lambda": 0.2}, {"score": "sparsegpt", "recovery": "obs", "sequential": True}]
)
def test_an_event_gives_every_layer_its_exact_count(llama: Any, stats: Statistics, change: dict[str, Any]) -> None:
    """The last one block by block, where the budgets come from the model as it was."""
    config = dataclasses.replace(OWL, **change)
    if config.sequential:
        outcome = prune_event_blockwise(
            llama.params, llama.adapters, None, iter(llama.batches), None, llama.spec, config
        )
    else:
        outcome = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config)
    merged = merge(*outcome[:3])["layers"]
    sparsities = sparsities_by_hand(outliers_by_hand(llama, stats, 1.5), 0.5, config.owl_lambda)
    assert sparsities[0] != sparsities[1]
    for name, counts in drops(llama, config, sparsities).items():
        assert [int(np.sum(np.asarray(weight) == 0)) for weight in merged[name]] == counts
        assert counts[0] != counts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "2:4"}, "prune.budget must be uniform with prune.group 2:4"),
        ({"budget": "owll"}, "prune.budget must be one of uniform, owl, global"),
        ({"budget": "global", "score": "sparsegpt"}, "prune.budget must be uniform or owl with prune.score sparsegpt"),
        ({}, "prune.budget owl: expected statistics of the whole model, found none"),
    ],
)
def test_budgets_that_cannot_be_are_refused_with_one_line(llama: Any, change: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(OWL, **change)
    with pytest.raises(InputError, match=message) as caught:
        plan_event(llama.params, llama.adapters, None, None, llama.spec, config)
    assert "\n" not in str(caught.value)


GLOBAL = PruneConfig(budget="global", budget_spread=0.2, score="foresight_loss", group="matrix", targets=TWO)


@pytest.fixture(scope="module")
def energy(llama: Any) -> dict[str, np.ndarray]:
    """Output gradients that differ by layer and matrix."""
    rng = np.random.default_rng(6)
    shapes = {name: llama.params["layers"][name].shape[:2] for name in TWO}
    return {name: (rng.random(shape) * [[1], [3]]).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("entries", [6, 4096 * 4096, 11008 * 4096, 28672 * 8192])
def test_shares_of_large_matrices_give_back_their_counts(entries: int) -> None:
    counts = np.unique(np.random.default_rng(0).integers(0, entries, 5000))
    assert [drop_count(share, entries) for share in drop_share(counts, entries)] == counts.tolist()


def scores_by_hand(llama: Any, stats: Statistics, energy: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name in TWO:
        adapters = llama.adapters
        low_rank = np.asarray(adapters.lora_b[name], np.float64) @ np.asarray(adapters.lora_a[name], np.float64)
        weight = np.asarray(llama.params["layers"][name], np.float64) + adapters.scale * low_rank
        norm = np.asarray(stats.input_norm(name), np.float64)
        found[name] = np.abs(weight) * norm[:, None, :] * np.sqrt(energy[name].astype(np.float64))[:, :, None]
    return found


@pytest.mark.parametrize(("sparsity", "spread"), [(0.5, 0.2), (0.5, 1.0), (0.7, 0.1), (0.5, 0.0)])
def test_one_threshold_shares_out_the_zeros(
    llama: Any, stats: Statistics, energy: dict[str, np.ndarray], sparsity: float, spread: float
) -> None:
    config = dataclasses.replace(GLOBAL, sparsity=sparsity, budget_spread=spread)
    found = global_budgets(llama.params, llama.adapters, stats, energy, llama.spec, config)
    scores = scores_by_hand(llama, stats, energy)
    shares = np.asarray([[budget[name] for name in TWO] for budget in found])
    sizes = np.asarray([scores[name][0].size for name in TWO])
    counts = [[drop_count(share, size) for share, size in zip(layer, sizes, strict=True)] for layer in shares]
    assert np.sum(counts) == int(2 * sizes.sum() * sparsity + 1e-9)
    np.testing.assert_allclose(shares * sizes, counts, atol=1e-6)
    high = min(sparsity + spread, 1 - 0.1 * (1 - sparsity))
    every = np.sort(np.concatenate([scores[name].ravel() for name in TWO]))
    # Held within their bounds, the shares below some threshold are these, to an entry.
    held = [
        np.asarray(
            [[np.clip((scores[name][layer] < t).mean(), sparsity - spread, high) for name in TWO] for layer in (0, 1)]
        )
        for t in every
    ]
    nearest = min(held, key=lambda candidate: abs((candidate @ sizes).sum() - (shares @ sizes).sum()))
    np.testing.assert_allclose(shares, nearest, atol=1.5 / sizes.min())
    assert (np.ptp(shares) > 0.01) == (spread > 0)


def test_an_event_prunes_what_costs_the_loss_least_wherever_it_is(
    llama: Any, stats: Statistics, energy: dict[str, np.ndarray]
) -> None:
    config = dataclasses.replace(GLOBAL, budget_spread=1.0)
    _, _, masks, _ = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config, importance=energy)
    scores = scores_by_hand(llama, stats, energy)
    kept = np.concatenate([scores[name][np.asarray(masks[name])] for name in TWO])
    dropped = np.concatenate([scores[name][~np.asarray(masks[name])] for name in TWO])
    # Counts of the four matrices are whole numbers: each may miss the threshold by one entry.
    assert np.sum(dropped > kept.min()) <= 4
    assert dropped.size == (kept.size + dropped.size) // 2


def test_gradients_of_outputs_are_asked_for_by_name(llama: Any, stats: Statistics) -> None:
    with pytest.raises(InputError, match=r"expected an importance \[L,O\] for each of prune.targets") as caught:
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, dataclasses.replace(GLOBAL))
    assert "\n" not in str(caught.value)
