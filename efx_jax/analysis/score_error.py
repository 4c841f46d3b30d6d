"""The cost of pruning a matrix as a score predicts it (the paper's eq. 2), against the actual cost, matrix by matrix.

Predicted is the sum of squared scores over the removed entries, in the unit of `criteria.prediction_units`: eq. 2 for
each entry, without cross terms between them. Actual is the squared change of the same quantity, by the model's own
arithmetic (`targets`): for Wanda the matrix's own output, for the others what that output leads to.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from efx_jax.analysis.blocks import BlockView, Model, entering, mean_nll, run_block, walk
from efx_jax.analysis.criteria import CRITERIA, criteria_scores, prediction_units
from efx_jax.analysis.targets import entry_changes, output_change, own_change, target_change
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.pruning.selection import select_mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How one matrix at a time is pruned, as `select_mask` takes it."""

    sparsity: float
    group: str
    bound: float | None = None


@dataclasses.dataclass(frozen=True)
class ScoreError:
    """One matrix of one layer pruned by one score, with all others dense.

    `predicted` and `actual`: squared change of the score's own quantity. `target`: that of what the matrix leads to,
    under the same mask, also for Wanda. `entry_ratio`: median over single entries of predicted over actual.
    `entry_rank`: over the same entries, Spearman's correlation of the squared score with the squared change of the
    target. `nll`: the increase of the mean nll in nats per token, or None if it was not measured.
    """

    layer: int
    matrix: str
    score: str
    predicted: float
    actual: float
    target: float
    entry_ratio: float | None
    entry_rank: float | None
    nll: float | None

    @property
    def ratio(self) -> float | None:
        """Predicted over actual; None if nothing changed."""
        return self.predicted / self.actual if self.actual > 0 else None


def score_errors(
    model: Model,
    layers: Sequence[int],
    pruning: Pruning,
    entries: int = 64,
    loss_rows: int = 0,
    seed: int = 0,
) -> Iterator[ScoreError]:
    """Prunes each matrix of some layers alone, by every score of `criteria.CRITERIA`.

    Args:
        model: a model on a batch (`blocks.look_at`).
        layers: numbers of the layers.
        pruning: sparsity and group.
        entries: single entries of each matrix that are removed one by one, drawn uniformly; 0: none.
        loss_rows: rows of the batch over which the loss is measured; 0: it is not measured.
        seed: seed for the entries, which do not depend on the model's weights.

    Raises:
        InputError: a sparsity or group that does not fit.
    """
    base = mean_nll(model, entering(model)[:loss_rows], 0) if loss_rows else 0.0
    for layer, view in walk(model, layers):
        scores, units = criteria_scores(view, model.spec), prediction_units(view, model.spec)
        for place, matrix in enumerate(LINEARS):
            rng = np.random.default_rng([seed, layer, place])
            drawn = _draw_entries(rng, view.weights[matrix].shape, entries)
            costs = _entry_costs(view, *drawn, matrix, model.spec)
            losses: list[tuple[Array, float]] = []
            for criterion in CRITERIA:
                score, unit = scores[criterion][matrix], float(units[criterion][matrix])
                kept, gone, own, target = _prune_one(view, score, matrix, pruning, model.spec)
                if loss_rows:
                    losses.append((kept, _loss_without(model, view, layer, matrix, kept, loss_rows, losses)))
                squared = np.square(np.asarray(score[drawn], np.float64))
                yield ScoreError(
                    layer=layer,
                    matrix=matrix,
                    score=criterion,
                    predicted=unit * float(gone),
                    actual=float(own if criterion == "wanda" else target),
                    target=float(target),
                    entry_ratio=_median_ratio(unit * squared, costs["own" if criterion == "wanda" else "target"]),
                    entry_rank=spearman(squared, costs["target"]),
                    nll=losses[-1][1] - base if losses else None,
                )


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float | None:
    """Spearman's rank correlation, with tied values sharing their mean rank; None if one side does not vary."""
    one, other = (_ranks(np.asarray(values, np.float64)) for values in (first, second))
    if any(len(rank) < 2 or np.ptp(rank) == 0 for rank in (one, other)):
        return None
    return float(np.corrcoef(one, other)[0, 1])


def summarise(errors: Sequence[ScoreError]) -> list[dict[str, Any]]:
    """A JSON-serialisable row per matrix kind and score, over its layers.

    `ratio` is the geometric mean of predicted over actual, with its smallest and largest layer; `entry_ratio` the
    geometric mean of the layers' medians; `entry_rank` the layers' mean; `layer_rank` Spearman's correlation of
    predicted and actual over the layers; `nll` the mean increase of the mean nll.
    """
    rows = []
    for matrix in LINEARS:
        for score in CRITERIA:
            found = [error for error in errors if (error.matrix, error.score) == (matrix, score)]
            ratios = [error.ratio for error in found if error.ratio]
            rows.append(
                {
                    "matrix": matrix,
                    "score": score,
                    "layers": len(found),
                    "ratio": _geometric_mean(ratios),
                    "ratio_least": min(ratios, default=None),
                    "ratio_most": max(ratios, default=None),
                    "entry_ratio": _geometric_mean([e.entry_ratio for e in found if e.entry_ratio]),
                    "entry_rank": _mean([e.entry_rank for e in found if e.entry_rank is not None]),
                    "layer_rank": spearman([e.predicted for e in found], [e.actual for e in found]),
                    "nll": _mean([e.nll for e in found if e.nll is not None]),
                }
            )
    return rows


@functools.partial(jax.jit, static_argnames=("matrix", "pruning", "spec"))
def _prune_one(
    view: BlockView, score: Array, matrix: str, pruning: Pruning, spec: ModelSpec
) -> tuple[Array, Array, Array, Array]:
    """The pruned weight `[O,I]`, the removed squared scores, and the squared changes of own output and target."""
    mask = select_mask(score, pruning.sparsity, pruning.group, pruning.bound)
    weight = view.weights[matrix]
    with jax.default_matmul_precision("highest"):
        delta = output_change(view, matrix, jnp.where(mask, 0.0, weight))
        target = target_change(view, matrix, delta, spec)
    gone = jnp.sum(jnp.where(mask, 0.0, jnp.square(score)))
    return jnp.where(mask, weight, 0.0), gone, own_change(view, delta), target


def _loss_without(
    model: Model,
    view: BlockView,
    layer: int,
    matrix: str,
    kept: Array,
    rows: int,
    known: Sequence[tuple[Array, float]],
) -> float:
    """Mean nll of the first rows with one matrix of this block replaced; reused if the matrix is among the `known`."""
    for other, loss in known:
        if bool(jnp.array_equal(other, kept)):
            return loss
    rope = tuple(table[:rows] for table in view.rope)
    after = run_block({**view.weights, matrix: kept}, view.x[:rows], rope, model.spec)
    return mean_nll(model, after, layer + 1)


def _draw_entries(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of distinct entries."""
    size = shape[0] * shape[1]
    rows, columns = np.unravel_index(rng.choice(size, min(count, size), replace=False), shape)
    return rows, columns


@functools.partial(jax.jit, static_argnames=("matrix", "spec"))
def _entry_costs(view: BlockView, rows: Array, columns: Array, matrix: str, spec: ModelSpec) -> dict[str, Array]:
    """Squared change of the matrix's own output and of its target when one entry is removed, float32 `[n]` each."""
    with jax.default_matmul_precision("highest"):
        target = entry_changes(view, matrix, rows, columns, spec)
    own = jnp.square(view.weights[matrix][rows, columns]) * jnp.square(view.stats.input_norm(matrix))[columns]
    return {"own": own, "target": target}


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _median_ratio(predicted: np.ndarray, actual: Array) -> float | None:
    costs = np.asarray(actual, np.float64)
    changed = costs > 0
    return float(np.median(predicted[changed] / costs[changed])) if changed.any() else None


def _geometric_mean(values: Sequence[float]) -> float | None:
    return float(np.exp(np.mean(np.log(values)))) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
