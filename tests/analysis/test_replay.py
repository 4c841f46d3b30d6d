"""An event done again on a tiny model: its errors, its moves and its scores, against NumPy on the same arrays."""

import dataclasses

import jax
import numpy as np
import pytest

from efx_jax.analysis.blocks import walk
from efx_jax.analysis.replay import EDGES, _spread, event_settings, replay_recovery, score_spreads
from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.model.spec import LINEARS
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.statistics import INPUT_OF
from tests.tiers import few_of

CONFIG = PruneConfig(sparsity=0.5, score="wanda", group="row", recovery="gram_pbs", schedule="cubic", ema=0.5)


@pytest.fixture(scope="module")
def repairs(llama):
    """Recovery -> what it repairs, on the rows that it has seen."""
    return {
        name: list(
            replay_recovery(
                llama.params, llama.adapters, llama.model, llama.model, [1], dataclasses.replace(CONFIG, recovery=name)
            )
        )
        for name in ("none", "gram_pbs", "admm")
    }


def test_a_mask_alone_changes_outputs_as_numpy_says(llama, repairs) -> None:
    ((_, view),) = walk(llama.model, [1])
    real = np.asarray(view.real, bool)
    assert [each.matrix for each in repairs["none"]] == list(LINEARS)
    for each in repairs["none"]:
        weight = np.asarray(view.weights[each.matrix], np.float64)
        x = np.asarray(view.taps[INPUT_OF[each.matrix]], np.float64)[real]
        score = np.abs(weight) * np.linalg.norm(x, axis=0)
        kept = score >= np.sort(score, axis=1)[:, [weight.shape[1] // 2]]
        expected = np.linalg.norm(x @ (kept * weight - weight).T) / np.linalg.norm(x @ weight.T)
        assert each.error_masked == pytest.approx(expected, rel=1e-4)
        assert each.error_recovered == each.error_masked and each.moved == each.move_norm == 0


@pytest.mark.parametrize("recovery", ["gram_pbs", "admm"])
def test_recovery_repairs_every_output_on_the_rows_that_it_has_seen(repairs, recovery) -> None:
    for alone, repaired in zip(repairs["none"], repairs[recovery], strict=True):
        assert repaired.error_masked == pytest.approx(alone.error_masked, rel=1e-6)
        assert repaired.error_recovered < repaired.error_masked
        assert 0 < repaired.moved <= 1 and repaired.move_norm > 0


@pytest.mark.parametrize("group", ["matrix", "row"])
def test_every_entry_is_counted_once_and_a_row_blurs_the_threshold(llama, group) -> None:
    spreads = list(
        score_spreads(llama.params, llama.adapters, llama.model, [0, 1], dataclasses.replace(CONFIG, group=group))
    )
    assert [(each.layer, each.matrix) for each in spreads] == [(layer, name) for layer in (0, 1) for name in LINEARS]
    for each in spreads:
        size = llama.params["layers"][each.matrix][0].size
        assert sum(each.kept) + sum(each.pruned) == size and sum(each.pruned) == size // 2
        above = np.asarray(EDGES[:-1]) >= -1e-9
        if group == "matrix":
            assert each.across == 0
            assert not np.any(np.asarray(each.pruned)[above]) and not np.any(np.asarray(each.kept)[~above])
        else:
            assert 0 < each.across < 0.5
            # As many kept ones lie below the threshold as pruned ones above it.
            assert sum(np.asarray(each.pruned)[above]) == sum(np.asarray(each.kept)[~above]) == each.across * size / 2


@pytest.mark.parametrize("labels", few_of(["text", "model"], "model"))
def test_the_score_of_the_loss_is_that_of_the_run_itself(llama, labels) -> None:
    """Its gradients are taken again, of other draws; here by the numbers of one matrix."""
    config = dataclasses.replace(
        CONFIG, score="foresight_loss", group="matrix", targets=("down_proj",), gradient_labels=labels
    )
    (found,) = score_spreads(llama.params, llama.adapters, llama.model, [1], config)
    ((_, view),) = walk(llama.model, [1])
    lengths = np.asarray(llama.model.real).sum(axis=1).astype(np.int32)
    batch = {"tokens": llama.model.tokens, "lengths": lengths}
    key = jax.random.key(0) if labels == "model" else None
    energy, _ = output_gradient_energy(llama.params, [batch], llama.spec, llama.adapters, key=key)
    scores = np.abs(np.asarray(view.weights["down_proj"], np.float64))
    scores *= np.asarray(view.stats.input_norm("down_proj")) * np.sqrt(np.asarray(energy["down_proj"][1]))[:, None]
    ranked = np.sort(scores, axis=None)
    assert found.threshold == pytest.approx(ranked[len(ranked) // 2], rel=1e-4)


@pytest.mark.slow
def test_one_threshold_for_all_matrices_can_be_replayed(llama) -> None:
    """Shares are within their spread to an entry, of 256 at least."""
    config = dataclasses.replace(CONFIG, score="foresight_loss", budget="global", group="bounded", recovery="admm")
    spreads = list(score_spreads(llama.params, llama.adapters, llama.model, [0, 1], config))
    pruned = {sum(each.pruned) / (sum(each.pruned) + sum(each.kept)) for each in spreads}
    assert len(pruned) > 2 and max(pruned) <= 0.5 + config.budget_spread + 1 / 256
    for each in replay_recovery(llama.params, llama.adapters, llama.model, llama.model, [1], config):
        assert each.error_recovered < each.error_masked


def test_the_threshold_is_the_lowest_score_that_a_whole_matrix_keeps(llama) -> None:
    ((_, view),) = walk(llama.model, [1])
    config = dataclasses.replace(CONFIG, score="magnitude")
    for each in score_spreads(llama.params, llama.adapters, llama.model, [1], config):
        ranked = np.sort(np.abs(np.asarray(view.weights[each.matrix])), axis=None)
        assert each.threshold == pytest.approx(ranked[len(ranked) // 2], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity": 0.0}, "a dense run"),
        ({"score": "dpruner"}, "dpruner: cannot be replayed"),
        ({"score": "atp"}, "atp"),
    ],
)
def test_what_cannot_be_replayed_is_refused(change, said) -> None:
    with pytest.raises(InputError, match=said):
        event_settings(dataclasses.replace(CONFIG, **change))


def test_sparsegpt_has_no_scores_to_show(llama) -> None:
    config = dataclasses.replace(CONFIG, score="sparsegpt", recovery="none")
    with pytest.raises(InputError, match="sparsegpt: has no scores"):
        list(score_spreads(llama.params, llama.adapters, llama.model, [0], config))


def test_where_more_than_is_dropped_scores_nothing_no_entry_is_across() -> None:
    score = np.asarray([[0.0, 0.0, 0.0, 5.0], [0.0, 1e-3, 2.0, 1e6]], np.float32)
    found = _spread(0, "q_proj", score, np.asarray([[True, True, False, False], [True, False, False, False]]))
    assert (found.threshold, found.across) == (0.0, 0.0)
    assert (found.pruned[0], found.kept[0], found.kept[-1]) == (3, 1, 4)
    assert sum(found.kept) + sum(found.pruned) == score.size


@pytest.mark.parametrize("tied", [4.0, 3.0], ids=["the entry at the threshold alone", "two of the same score"])
def test_an_entry_pruned_at_the_threshold_is_across_as_the_one_kept_for_it(tied) -> None:
    score = np.asarray([[1.0, 2.0], [3.0, tied]], np.float32)
    found = _spread(0, "q_proj", score, np.asarray([[True, False], [True, False]]))
    assert (found.threshold, found.across) == (3.0, 0.5)
    assert _spread(0, "q_proj", score, np.asarray([[True, True], [False, False]])).across == 0
