"""Predicted against actual: exact where eq. 2 is exact, and what is reported is what is measured."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from efx_jax.analysis import figures
from efx_jax.analysis.blocks import look_at, mean_nll, walk
from efx_jax.analysis.criteria import CRITERIA, criteria_scores, prediction_units
from efx_jax.analysis.plots import Figure
from efx_jax.analysis.score_error import Pruning, ScoreError, score_errors, spearman, summarise
from efx_jax.analysis.targets import entry_changes
from efx_jax.errors import InputError
from efx_jax.lora import merge
from efx_jax.model.spec import LINEARS
from efx_jax.pruning.statistics import collect_statistics


def predicted(view, spec, score: str, name: str) -> np.ndarray:
    """Of every entry `[O,I]`."""
    unit = float(prediction_units(view, spec)[score][name])
    return unit * np.square(np.asarray(criteria_scores(view, spec)[score][name], np.float64))


def actual(view, spec, name: str) -> np.ndarray:
    """The squared change of the target when each entry goes alone, `[O,I]`."""
    shape = view.weights[name].shape
    rows, columns = np.unravel_index(np.arange(shape[0] * shape[1]), shape)
    return np.asarray(entry_changes(view, name, rows, columns, spec), np.float64).reshape(shape)


def test_wanda_predicts_its_own_output_exactly_when_one_weight_goes(llama) -> None:
    errors = score_errors(llama.model, [1], Pruning(1 / 256, "matrix"), entries=0)
    ratios = {error.matrix: error.ratio for error in errors if error.score == "wanda"}
    assert (ratios.pop("k_proj"), ratios.pop("v_proj")) == (None, None)  # of 128 entries none goes
    assert list(ratios.values()) == pytest.approx([1.0] * 5, rel=1e-4)


def test_the_joint_score_predicts_an_entry_of_up_exactly(tiny) -> None:
    expected = actual(tiny.view, tiny.spec, "up_proj")
    np.testing.assert_allclose(predicted(tiny.view, tiny.spec, "foresight_joint", "up_proj"), expected, rtol=1e-3)


def test_the_joint_score_predicts_an_entry_of_gate_to_first_order(llama) -> None:
    small = llama.view.weights["gate_proj"] * 1e-3
    # The activations stay: only what is removed is small.
    view = dataclasses.replace(llama.view, weights=llama.view.weights | {"gate_proj": small})
    expected = actual(view, llama.spec, "gate_proj")
    found = predicted(view, llama.spec, "foresight_joint", "gate_proj")
    assert np.median(np.abs(found / expected - 1)) < 0.01


def test_one_token_has_a_prediction_in_the_unit_of_the_change(llama) -> None:
    # With a single token attention passes v on, and the G heads that share it add up to one column of o.
    batch = {"tokens": np.full((3, 1), 7, np.int32), "lengths": np.ones(3, np.int32)}
    params = merge(llama.params, llama.adapters, None)
    columns = np.asarray(params["layers"]["o_proj"]).reshape(2, 16, 2, 2, 4).copy()
    columns[:, :8, :, 1], columns[:, 8:, :, 0] = 0, 0  # the two heads of a group reach different units
    # Both dimensions of a RoPE pair have the same weights: that score's mean over the pair is then their own sum.
    queries = np.asarray(params["layers"]["q_proj"]).reshape(2, 4, 2, 2, 16).copy()
    queries[:, :, 1] = queries[:, :, 0]
    layers = params["layers"] | {
        "o_proj": jnp.asarray(columns.reshape(2, 16, 16)),
        "q_proj": jnp.asarray(queries.reshape(2, 16, 16)),
    }
    ((_, view),) = walk(look_at(params | {"layers": layers}, None, batch, llama.spec), [1])
    both = actual(view, llama.spec, "q_proj").reshape(4, 2, 2, 16).sum(axis=1)
    found = predicted(view, llama.spec, "foresight_gated", "q_proj").reshape(4, 2, 2, 16).sum(axis=1)
    np.testing.assert_allclose(found, both, rtol=1e-3)
    found, expected = predicted(view, llama.spec, "foresight", "v_proj"), actual(view, llama.spec, "v_proj")
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_scores_are_those_of_a_prune_event(llama) -> None:
    found = criteria_scores(llama.view, llama.spec)
    whole = collect_statistics(llama.params, [llama.batch], llama.spec, llama.adapters, compute_dtype="float32")
    for name in LINEARS:
        norm = np.asarray(whole.input_norm(name)[1])
        np.testing.assert_allclose(found["wanda"][name], np.abs(llama.view.weights[name]) * norm, rtol=1e-4)
    reach = np.linalg.norm(llama.view.weights["down_proj"], axis=0)[:, None]
    np.testing.assert_allclose(found["foresight"]["up_proj"], found["wanda"]["up_proj"] * reach, rtol=1e-4)
    through = np.sqrt(np.asarray(whole.energy["gate_value"][1] / whole.tokens[1]))[:, None]
    np.testing.assert_allclose(found["foresight_gated"]["up_proj"], found["foresight"]["up_proj"] * through, rtol=1e-4)


def test_the_growth_of_the_loss_is_that_of_the_pruned_model(llama) -> None:
    found = list(score_errors(llama.model, [0], Pruning(0.5, "row"), entries=0, loss_rows=2))
    error = next(each for each in found if (each.matrix, each.score) == ("up_proj", "wanda"))
    ((_, view),) = walk(llama.model, [0])
    score = np.asarray(criteria_scores(view, llama.spec)["wanda"]["up_proj"])
    mask = score >= np.sort(score, axis=1)[:, [8]]
    params = merge(llama.params, llama.adapters, None)
    stacked = params["layers"]["up_proj"]
    layers = params["layers"] | {"up_proj": stacked.at[0].set(jnp.where(mask, stacked[0], 0.0))}
    first_rows = {"tokens": llama.batch["tokens"][:2], "lengths": llama.batch["lengths"][:2]}

    def nll(tree) -> float:
        model = look_at(tree, None, first_rows, llama.spec)
        return mean_nll(model, model.params["embed_tokens"][model.tokens], 0)

    assert error.nll == pytest.approx(nll(params | {"layers": layers}) - nll(params), abs=1e-5)


def test_a_summary_has_a_row_of_every_matrix_and_score(llama) -> None:
    found = list(score_errors(llama.model, [0, 1], Pruning(0.5, "bounded", 0.2), entries=16))
    rows = summarise(found)
    assert [(row["matrix"], row["score"]) for row in rows] == [(m, s) for m in LINEARS for s in CRITERIA]
    first = [each.ratio for each in found if (each.matrix, each.score) == ("q_proj", "foresight")]
    row = next(row for row in rows if (row["matrix"], row["score"]) == ("q_proj", "foresight"))
    assert row["ratio"] == pytest.approx(np.sqrt(first[0] * first[1]))
    assert (row["ratio_least"], row["ratio_most"], row["nll"]) == (min(first), max(first), None)
    of_wanda = [row for row in rows if row["score"] == "wanda"]
    assert [row["entry_ratio"] for row in of_wanda] == pytest.approx([1.0] * 7, rel=1e-4)
    assert all(-1 <= row["entry_rank"] <= 1 for row in rows)


def test_the_same_seed_draws_the_same_entries(llama) -> None:
    first, again, other = (
        [error.entry_rank for error in score_errors(llama.model, [1], Pruning(0.5, "row"), 9, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_sparsity_of_one_is_refused(llama) -> None:
    with pytest.raises(InputError, match="sparsity"):
        next(score_errors(llama.model, [0], Pruning(1.0, "row")))


def test_rank_correlation_is_that_of_scipy_with_ties_too() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 6, 40), rng.integers(0, 6, 40) + 0.5
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert spearman([1, 2, 5], [2, 3, 9]) == pytest.approx(1.0)
    assert spearman([1, 1], [2, 3]) is None


def test_a_figure_of_the_ratio_names_the_mean_that_it_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers at 1 and 4 are at 2 together, not at 2.5."""
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "draw_lines", lambda path, figure: drawn.append(figure))
    monkeypatch.setattr(figures, "draw_points", lambda path, figure: None)
    errors = [
        ScoreError(layer, "q_proj", "wanda", ratio, 1.0, 1.0, None, None, None) for layer, ratio in ((0, 1.0), (1, 4.0))
    ]
    figures.draw_score_errors(tmp_path, {0: errors})
    (figure,) = drawn
    assert figure.y_label == "predicted / actual (geometric mean of the layers)"
    assert figure.series[0].y == (pytest.approx(2.0),)
