"""How much the masks of two scores overlap, as appendix C of the paper asks for ForeSight with and without SwiGLU."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.analysis.blocks import Model, walk
from efx_jax.analysis.criteria import CRITERIA, criteria_scores
from efx_jax.analysis.where import weighted_mean
from efx_jax.model.spec import LINEARS
from efx_jax.pruning.selection import select_mask

Array = jax.Array
GROUPS = ("row", "matrix", "bounded")
PAIRS = tuple(itertools.combinations(CRITERIA, 2))


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Two masks of one matrix with `entries` entries, which keep equally many of them.

    `kept` and `pruned`: the share of what one keeps (prunes) that the other keeps (prunes) too, None if that is
    nothing. `random_kept` and `random_pruned`: what two masks drawn at random would share on average.
    """

    layer: int
    matrix: str
    group: str
    first: str
    second: str
    entries: int
    kept: float | None
    pruned: float | None
    random_kept: float
    random_pruned: float


def mask_overlaps(model: Model, layers: Sequence[int], sparsity: float, bound: float) -> Iterator[Overlap]:
    """The overlap of the masks of each pair of scores, for each matrix of some layers and each of `GROUPS`.

    Args:
        model: a model on a batch (`blocks.look_at`).
        layers: numbers of the layers.
        sparsity: share of zeros in [0, 1).
        bound: the bound of the group "bounded".

    Raises:
        InputError: a sparsity that does not fit the matrices.
    """
    for layer, view in walk(model, layers):
        scores = criteria_scores(view, model.spec)
        for matrix, group in itertools.product(LINEARS, GROUPS):
            masks = _masks({name: scores[name][matrix] for name in CRITERIA}, sparsity, group, bound)
            for first, second in PAIRS:
                shares = overlap(masks[first], masks[second])
                yield Overlap(layer, matrix, group, first, second, masks[first].size, *shares)


def overlap(first: Array, second: Array) -> tuple[float | None, float | None, float, float]:
    """Shares in common of two masks `[O,I]`, True = kept: kept, pruned, and the same two for random masks.

    Shares are of the first mask's entries; a random mask of the second's size keeps a fraction of them equal to its own
    density. (Exact groups keep equally many entries, so the shares are then the same for either mask.)
    """
    both, neither, kept_first, kept_second = (int(count) for count in np.asarray(_counts(first, second)))
    size = first.size
    pruned_first = size - kept_first
    return (
        both / kept_first if kept_first else None,
        neither / pruned_first if pruned_first else None,
        kept_second / size,
        1 - kept_second / size,
    )


def summarise(overlaps: Sequence[Overlap]) -> list[dict[str, Any]]:
    """A JSON-serialisable row per group, pair and matrix kind: means over layers; "all": over all entries."""
    rows = []
    for group, (first, second), matrix in itertools.product(GROUPS, PAIRS, (*LINEARS, "all")):
        found = [
            each
            for each in overlaps
            if (each.group, each.first, each.second) == (group, first, second) and matrix in (each.matrix, "all")
        ]
        if found:
            sizes = [each.entries for each in found]
            shares = {
                "kept": weighted_mean([each.kept for each in found], sizes),
                "pruned": weighted_mean([each.pruned for each in found], sizes),
                "random_kept": weighted_mean([each.random_kept for each in found], sizes),
                "random_pruned": weighted_mean([each.random_pruned for each in found], sizes),
            }
            rows.append({"group": group, "first": first, "second": second, "matrix": matrix, **shares})
    return rows


@functools.partial(jax.jit, static_argnames=("sparsity", "group", "bound"))
def _masks(scores: Mapping[str, Array], sparsity: float, group: str, bound: float) -> dict[str, Array]:
    return {name: select_mask(score, sparsity, group, bound) for name, score in scores.items()}


@jax.jit
def _counts(first: Array, second: Array) -> Array:
    """Counts of entries that both keep, that both prune, that the first keeps, that the second keeps; int32 `[4]`."""
    return jnp.stack([jnp.sum(each, dtype=jnp.int32) for each in (first & second, ~(first | second), first, second)])
