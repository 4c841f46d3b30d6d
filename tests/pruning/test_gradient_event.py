"""Events whose score is an importance that the caller brings along."""

import dataclasses
from math import floor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.config_event import reads_importance
from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.pruning.average import init_prune_state
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.selection import select_mask
from efx_jax.pruning.statistics import Statistics, collect_statistics

Tree = dict[str, Any]
TWO = ("k_proj", "down_proj")
MATRIX = PruneConfig(score="dpruner", group="matrix", sparsity=0.4, targets=TWO)


@pytest.fixture(scope="module")
def stats(llama: Any) -> Statistics:
    return collect_statistics(llama.params, llama.batches, llama.spec, llama.adapters)


def draw(llama: Any, seed: int) -> Tree:
    """Any importance, of more matrices than are pruned."""
    rng = np.random.default_rng(seed)
    layers = llama.params["layers"]
    return {name: jnp.asarray(rng.random(layers[name].shape), jnp.float32) for name in (*TWO, "q_proj")}


def test_the_masks_are_those_of_the_importance_and_the_sparsity_is_exact(llama: Any, stats: Statistics) -> None:
    importance = draw(llama, 0)
    params, adapters, masks, _ = prune_event(
        llama.params, llama.adapters, None, stats, None, llama.spec, MATRIX, importance=importance
    )
    merged = merge(params, adapters, masks)
    assert set(masks) == set(TWO)
    for name in TWO:
        for layer, mask in enumerate(np.asarray(masks[name])):
            np.testing.assert_array_equal(mask, select_mask(importance[name][layer], 0.4, "matrix"))
            assert (~mask).sum() == floor(0.4 * mask.size)
            np.testing.assert_array_equal(np.asarray(merged["layers"][name][layer]) == 0, ~mask)


def test_block_by_block_takes_the_same_importance(llama: Any) -> None:
    importance = draw(llama, 0)
    config = dataclasses.replace(MATRIX, score="lora_gradient", recovery="admm")
    _, _, masks, _ = prune_event_blockwise(
        llama.params, llama.adapters, None, llama.batches, None, llama.spec, config, importance=importance
    )
    for name in TWO:
        for layer, mask in enumerate(np.asarray(masks[name])):
            np.testing.assert_array_equal(mask, select_mask(importance[name][layer], 0.4, "matrix"))


def test_the_average_of_an_importance_is_kept_as_a_tensor_though_the_base_is_frozen(
    llama: Any, stats: Statistics
) -> None:
    config = dataclasses.replace(MATRIX, ema=0.25)
    state = init_prune_state(llama.params, llama.adapters, config, jax.random.key(0))
    assert state.snapshots == {}
    seen = [draw(llama, seed) for seed in (1, 2)]
    for importance in seen:
        _, _, masks, state = prune_event(
            llama.params, llama.adapters, None, stats, state, llama.spec, config, importance=importance
        )
    for name in TWO:
        expected = 0.25 * np.asarray(seen[1][name]) + 0.75 * np.asarray(seen[0][name])
        np.testing.assert_allclose(np.stack(state.score[name]), expected, rtol=1e-6)
        assert int(np.sum(~np.asarray(masks[name][0]))) == floor(0.4 * expected[0].size)


@pytest.mark.parametrize("importance", [None, {}, {"k_proj": jnp.ones((2, 8, 16))}])
def test_an_event_without_its_importance_is_refused_with_one_line(
    llama: Any, stats: Statistics, importance: Tree | None
) -> None:
    with pytest.raises(InputError, match="prune.score dpruner reads gradients: .* none for .*down_proj") as caught:
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, MATRIX, importance=importance)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("group", "budget"), [("row", "uniform"), ("2:4", "uniform"), ("row", "owl")])
def test_within_rows_the_score_of_the_loss_needs_no_gradient(
    llama: Any, stats: Statistics, group: str, budget: Any
) -> None:
    """The gradient is one factor for a whole row, so that the masks are those of Wanda; OWL shares by its scores."""
    config = PruneConfig(score="foresight_loss", group=group, budget=budget, owl_multiple=1.5, sparsity=0.5)
    assert not reads_importance(config)
    loss, wanda = (
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, each)[2]
        for each in (config, dataclasses.replace(config, score="wanda"))
    )
    jax.tree.map(np.testing.assert_array_equal, loss, wanda)


def test_beyond_rows_and_events_it_needs_one() -> None:
    config = PruneConfig(score="foresight_loss", group="row")
    for more in ({"group": "bounded"}, {"group": "slab"}, {"budget": "global"}, {"ema": 0.5}):
        assert reads_importance(dataclasses.replace(config, **more))
    # Matrices that compare within rows though the others do not.
    mixed = dataclasses.replace(config, group="matrix", row_targets=("v_proj",), targets=("v_proj",))
    assert not reads_importance(mixed)
    assert reads_importance(dataclasses.replace(mixed, targets=("v_proj", "k_proj")))
