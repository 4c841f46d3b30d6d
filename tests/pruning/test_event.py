"""One prune event as a whole: what it draws, what it leaves alone and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.model.decoder import forward
from efx_jax.model.spec import LINEARS
from efx_jax.pruning.average import init_prune_state
from efx_jax.pruning.event import prune_event
from efx_jax.pruning.scores import foresight_score, weight_reach
from efx_jax.pruning.selection import select_mask
from efx_jax.pruning.statistics import INPUT_OF, Statistics
from tests.pruning.event_parts import PLAIN, TWO, Tree, assert_sparsity, effective

SCORES = ("magnitude", "wanda", "foresight", "foresight_gated", "ria")
GROUPS = ("row", "matrix", "bounded", "2:4")
RECOVERIES = ("none", "pbs", "gram_pbs", "admm")

forward_jit = jax.jit(forward, static_argnums=2)


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


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
def test_the_reach_to_the_loss_is_shrunk_as_asked(llama: Any, stats: Statistics, shrink: float) -> None:
    """Whole, it is one number for every matrix: Wanda's mask."""
    rng = np.random.default_rng(3)
    energy = {name: rng.lognormal(0.0, 3.0, llama.params["layers"][name].shape[:2]).astype(np.float32) for name in TWO}
    config = PruneConfig(score="foresight_loss", group="matrix", targets=TWO, reach_shrink=shrink)
    masks = prune_event(
        llama.params,
        llama.adapters,
        None,
        stats,
        None,
        llama.spec,
        config,
        importance=jax.tree.map(jnp.asarray, energy),
    )[2]
    wanda = dataclasses.replace(config, score="wanda")
    plain = prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, wanda)[2]
    for name in TWO:
        weights, norms = effective(llama.params, llama.adapters, name), stats.input_norm(name)
        for layer in range(llama.spec.num_layers):
            own = energy[name][layer]
            reach = np.sqrt((1 - shrink) * own + shrink * own.mean())
            score = np.abs(np.asarray(weights[layer])) * np.asarray(norms[layer]) * reach[:, None]
            np.testing.assert_array_equal(masks[name][layer], select_mask(jnp.asarray(score), 0.5, "matrix"))
        assert np.array_equal(masks[name], plain[name]) == (shrink == 1)


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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"recovery": "admm"}, "expected Gram matrices, found none; collect with gram=True"),
        ({"recovery": "gram_pbs"}, "expected Gram matrices, found none; collect with gram=True"),
        (
            {"recovery": "admm", "sequential": True, "dense_path": 1},
            "prune.sequential: expected an event block by block",
        ),
        ({"group": "slab", "swaps": 5}, "prune.group must be another than slab"),
        ({"group": "slab", "recovery": "admm", "admm_refine": 5}, "prune.group must be another than slab"),
        ({"swaps": 5}, "expected Gram matrices, found none; collect with gram=True"),
        ({"sparsity": 1.0}, "prune.sparsity must be in \\[0, 1\\), found 1.0"),
        (
            {"group": "2:4", "sparsity": 0.4},
            "prune.sparsity must be 1 - 2/4 = 0.5 with prune.group 2:4, or 0, found 0.4",
        ),
        ({"group": "3:5", "sparsity": 0.4}, "divisible by 5, found 16"),
        ({"group": "column"}, "prune.group must be row, matrix, slab, bounded, or N:M"),
        (
            {"recovery": "admm", "admm_steps": 2, "admm_refine": 10},
            "prune.admm_refine must be from 0 to admm_steps - 1",
        ),
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


@pytest.mark.parametrize("recovery", ["none", "admm"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_calibration_that_overflows_is_refused_and_makes_no_mask(
    llama: Any, stats: Statistics, broken: float, recovery: Any
) -> None:
    energy = {name: np.array(values) for name, values in stats.energy.items()}
    energy["down_in"][-1, 3] = broken
    overflown = dataclasses.replace(stats, energy=energy)
    last = llama.spec.num_layers - 1
    with pytest.raises(InputError, match=f"prune.calibration: the activations of block {last} are not finite"):
        prune_event(llama.params, llama.adapters, None, overflown, None, llama.spec, PruneConfig(recovery=recovery))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_gradients_that_overflow_are_refused_and_make_no_mask(llama: Any, stats: Statistics, broken: float) -> None:
    """Activations may be finite where their gradients are not, as in float16."""
    importance = {name: np.ones(llama.params["layers"][name].shape[:2], np.float32) for name in LINEARS}
    importance["o_proj"][-1, 3] = broken
    config, last = PruneConfig(score="foresight_loss", group="matrix"), llama.spec.num_layers - 1
    with pytest.raises(InputError, match=f"prune.score: the gradients of block {last} are not finite"):
        prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config, importance=importance)


def test_every_input_has_a_name() -> None:
    assert set(INPUT_OF) == set(LINEARS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "sparsegbt"}, "prune.score must be one of magnitude"),
        ({"recovery": "grampbs"}, "prune.recovery must be one of none"),
        ({"mask_forward": "Exact"}, "prune.mask_forward must be one of exact"),
        ({"gradient_labels": "Model"}, "prune.gradient_labels must be one of text, model"),
        ({"targets": ("qproj",)}, "prune.targets"),
        ({"targets": ()}, "prune.targets"),
        ({"ema": 0.5}, "the state has no memory of these matrices"),
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


@pytest.mark.parametrize("change", [{"recovery": "admm"}, {"targets": (*TWO, "q_proj")}])
def test_a_memory_of_another_kind_or_of_other_matrices_is_refused(
    llama: Any, stats: Statistics, change: dict[str, Any]
) -> None:
    config = PruneConfig(targets=TWO, ema=0.5)
    state = init_prune_state(llama.params, llama.adapters, config, jax.random.key(0))
    with pytest.raises(InputError, match="no memory of these matrices"):
        prune_event(llama.params, llama.adapters, None, stats, state, llama.spec, dataclasses.replace(config, **change))


def test_a_recovery_that_moves_adapters_needs_them(llama: Any, stats: Statistics) -> None:
    with pytest.raises(InputError, match="moves adapters, found none"):
        prune_event(llama.params, None, None, stats, None, llama.spec, PruneConfig(recovery="gram_pbs"))


@pytest.mark.parametrize("remembers", [False, True])
def test_a_memory_of_other_adapters_is_refused(llama: Any, stats: Statistics, remembers: bool) -> None:
    config = PruneConfig(score="wanda", targets=TWO, ema=0.5)
    then, now = (llama.adapters, None) if remembers else (None, llama.adapters)
    state = init_prune_state(llama.params, then, config, jax.random.key(0))
    with pytest.raises(InputError, match="adapters: the state remembers those of .*, found .*; make it by init_prune"):
        prune_event(llama.params, now, None, stats, state, llama.spec, config)


def test_statistics_of_another_model_are_refused(llama: Any, stats: Statistics) -> None:
    """A block that is not there would be read as the last one."""
    fewer = jax.tree.map(lambda leaf: leaf[:1], stats)
    narrow = dataclasses.replace(stats, gram=stats.gram | {"down_in": stats.gram["attn_in"]})
    for found, complaint in (
        (fewer, r"statistics: energy of attn_in: expected shape \[2, 16\], found \[1, 16\]"),
        (narrow, r"statistics: gram of down_in: expected shape \[2, 24, 24\], found \[2, 16, 16\]"),
    ):
        with pytest.raises(InputError, match=complaint):
            prune_event(llama.params, llama.adapters, None, found, None, llama.spec, PruneConfig())


def test_an_importance_that_is_missing_or_does_not_fit_is_refused(llama: Any, stats: Statistics) -> None:
    config = PruneConfig(score="foresight_loss", group="matrix", targets=TWO)
    layers = llama.params["layers"]
    fits = {name: jnp.ones(layers[name].shape[:2]) for name in TWO}
    by_entry = {**fits, TWO[0]: jnp.ones(layers[TWO[0]].shape)}
    for importance, complaint in (
        (None, f"found none for {', '.join(TWO)}; .*output_gradient_energy"),
        (by_entry, f"importance of {TWO[0]}: expected shape"),
    ):
        with pytest.raises(InputError, match=complaint):
            prune_event(llama.params, llama.adapters, None, stats, None, llama.spec, config, importance=importance)
