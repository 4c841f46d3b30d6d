"""What two masks share, against NumPy counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.analysis.blocks import look_at, walk
from efx_jax.analysis.criteria import CRITERIA, criteria_scores
from efx_jax.analysis.mask_overlap import GROUPS, PAIRS, mask_overlaps, overlap, summarise
from efx_jax.lora import merge
from efx_jax.model.spec import LINEARS
from efx_jax.pruning.selection import select_mask


@pytest.fixture(scope="module")
def overlaps(llama):
    return list(mask_overlaps(llama.model, [0, 1], 0.5, 0.2))


def test_shares_are_those_that_numpy_counts() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((13, 20)) < 0.7, rng.random((13, 20)) < 0.4
    kept, pruned, random_kept, random_pruned = overlap(jnp.asarray(first), jnp.asarray(second))
    assert kept == np.count_nonzero(second[first]) / np.count_nonzero(first)
    assert pruned == np.count_nonzero(~second[~first]) / np.count_nonzero(~first)
    assert (random_kept, random_pruned) == pytest.approx((second.mean(), 1 - second.mean()))


def test_random_masks_of_half_the_entries_share_half() -> None:
    scores = jnp.asarray(np.random.default_rng(1).random((2, 64, 96)), jnp.float32)
    for group in GROUPS:
        first, second = (select_mask(score, 0.5, group, 0.2) for score in scores)
        kept, pruned, random_kept, random_pruned = overlap(first, second)
        assert kept == pytest.approx(0.5, abs=0.03) and pruned == pytest.approx(0.5, abs=0.03)
        assert (random_kept, random_pruned) == (0.5, 0.5)


def test_a_mask_shares_all_with_itself_and_nothing_with_its_opposite() -> None:
    mask = jnp.asarray(np.random.default_rng(2).random((8, 8)) < 0.25)
    assert overlap(mask, mask)[:2] == (1.0, 1.0)
    assert overlap(mask, ~mask)[:2] == (0.0, 0.0)
    assert overlap(jnp.ones((4, 4), bool), jnp.ones((4, 4), bool))[:2] == (1.0, None)


@pytest.mark.slow
def test_every_matrix_group_and_pair_is_measured(overlaps) -> None:
    found = [(each.layer, each.matrix, each.group, (each.first, each.second)) for each in overlaps]
    assert found == [(n, name, group, pair) for n in (0, 1) for name in LINEARS for group in GROUPS for pair in PAIRS]


def test_an_overlap_is_that_of_masks_from_sorted_scores(llama, overlaps) -> None:
    scores = criteria_scores(llama.view, llama.spec)

    def kept(name: str) -> set[int]:
        return set(np.argsort(np.asarray(scores[name]["gate_proj"]).ravel(), kind="stable")[192:].tolist())

    expected = len(kept("foresight") & kept("foresight_gated")) / 192
    asked = (1, "gate_proj", "matrix", "foresight", "foresight_gated")
    (found,) = (o for o in overlaps if (o.layer, o.matrix, o.group, o.first, o.second) == asked)
    assert found.kept == found.pruned == expected
    assert expected < 1


def test_within_rows_only_the_joint_score_knows_more_than_wanda(overlaps) -> None:
    rows = [each for each in overlaps if each.group == "row"]
    factored = [each for each in rows if "joint" not in each.second]
    assert min(each.kept for each in factored) > 0.99
    joint = {each.matrix for each in rows if each.second == "foresight_joint" and each.kept < 0.99}
    assert joint == {"gate_proj", "up_proj"}


def test_where_every_unit_has_the_same_activation_both_scores_draw_one_mask(llama) -> None:
    # Equal rows of gate and up: what the nonlinearity lets through is one constant, which no mask notices.
    params = merge(llama.params, llama.adapters, None)
    layers = dict(params["layers"])
    for name in ("gate_proj", "up_proj"):
        layers[name] = jnp.broadcast_to(layers[name][:, :1], layers[name].shape)
    model = look_at(params | {"layers": layers}, None, llama.batch, llama.spec)
    found = [
        each
        for each in mask_overlaps(model, [1], 0.5, 0.2)
        if (each.first, each.second) == ("foresight", "foresight_gated") and each.matrix in ("gate_proj", "up_proj")
    ]
    assert len(found) == 6
    assert min(each.kept for each in found) > 0.99
    ((_, view),) = walk(model, [1])
    scores = criteria_scores(view, llama.spec)
    ratio = np.asarray(scores["foresight_gated"]["up_proj"] / scores["foresight"]["up_proj"])
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)


def test_a_summary_is_the_mean_over_layers_and_over_all_entries(llama, overlaps) -> None:
    rows = summarise(overlaps)
    assert len(rows) == len(GROUPS) * len(PAIRS) * 8
    some = {"group": "matrix", "first": "wanda", "second": "foresight"}
    mine = [each for each in overlaps if {**dataclasses.asdict(each), **some} == dataclasses.asdict(each)]
    by_matrix = {row["matrix"]: row for row in rows if {**row, **some} == row}
    sizes = [llama.view.weights[each.matrix].size for each in mine]
    assert by_matrix["all"]["kept"] == pytest.approx(np.average([each.kept for each in mine], weights=sizes))
    k_proj = [each.kept for each in mine if each.matrix == "k_proj"]
    assert by_matrix["k_proj"]["kept"] == pytest.approx(np.mean(k_proj))
    assert by_matrix["all"]["random_kept"] == pytest.approx(0.5)
    assert set(CRITERIA) == {name for pair in PAIRS for name in pair}
