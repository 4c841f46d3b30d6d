"""The figures of subspaces and of training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from efx_jax.analysis.curves import QUANTITIES, Curve, moving_mean, told
from efx_jax.analysis.histograms import Histogram, Mark, Panel, Shares, draw_histograms
from efx_jax.analysis.pictures import kind_series, kinds, layer_map, layer_series
from efx_jax.analysis.plots import Figure, Level, Series, draw_bars, draw_heat_map, draw_lines, draw_points
from efx_jax.analysis.shifts import SHIFTS
from efx_jax.analysis.subspaces import BaseRelation, Distance

_BINS = 40
_CHANCE = Level("random subspaces", 1.0)
_SHARE = "Grassmann distance / that of random subspaces"


def draw_shifts(folder: Path, distances: Sequence[Distance], shift: Mapping[tuple[str, str], str]) -> None:
    """How far apart the adapters of two runs are, by what changes between the runs.

    Args:
        folder: where subspaces, subspaces_kinds and subspaces_layers go, as .png and .csv.
        distances: the distances of every pair of runs.
        shift: names of two runs -> what changes between them, one of `shifts.SHIFTS`.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    groups = {
        name: [each for each in distances if shift[each.first, each.second] == name]
        for name in SHIFTS
        if name in shift.values()
    }
    draw_histograms(folder / "subspaces", _shift_histogram(groups))
    draw_points(
        folder / "subspaces_kinds",
        Figure(
            title="Adapter subspaces of two runs (a mark per pair and layer, stroke: median)",
            x_label="matrix",
            y_label=_SHARE,
            series=tuple(
                Series(name, tuple(each.matrix for each in found), tuple(each.share for each in found))
                for name, found in groups.items()
            ),
            levels=(_CHANCE,),
        ),
    )
    draw_lines(
        folder / "subspaces_layers",
        Figure(
            title="Adapter subspaces of two runs (mean over pairs and matrices)",
            x_label="layer",
            y_label=_SHARE,
            series=tuple(layer_series(found, lambda each: each.share, name) for name, found in groups.items()),
            levels=(_CHANCE,),
        ),
    )


def _shift_histogram(groups: Mapping[str, Sequence[Distance]]) -> Histogram:
    shares = {name: [each.share for each in found] for name, found in groups.items()}
    low, high = min(map(min, shares.values())), max(map(max, shares.values()))
    edges = np.linspace(min(low, 1) - 0.01, max(high, 1) + 0.01, _BINS + 1)
    counted = tuple(
        Shares(
            f"{name} ({len(found)})",
            tuple(float(count) * 100 / len(found) for count in np.histogram(found, edges)[0]),
        )
        for name, found in shares.items()
    )
    return Histogram(
        title="How far are the adapter subspaces of two runs apart? (in brackets: matrices)",
        x_label=_SHARE,
        y_label="matrices, %",
        edges=tuple(map(float, edges)),
        panels=(Panel("", counted, (Mark("random subspaces", 1.0),)),),
    )


def draw_relations(folder: Path, name: str, relations: Sequence[BaseRelation]) -> None:
    """How far a run's adapters are from the base's leading subspaces, and how much energy of the other each contains.

    Args:
        folder: where adapter_base_distance, _distance_layers, _energy and _energy_layers go, as .png and .csv.
        name: the run's name.
        relations: the relations of its matrices.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    draw_bars(
        folder / "adapter_base_distance",
        Figure(
            title=f"{name}: adapter and leading subspace of the base (mean over layers; bars: least, most)",
            x_label="matrix",
            y_label="Grassmann distance, radians",
            series=(
                kind_series(relations, lambda each: each.distance, "adapter and base", ends=True),
                kind_series(relations, lambda each: each.random, "random subspaces"),
                kind_series(relations, lambda each: each.most, "orthogonal subspaces"),
            ),
        ),
    )
    draw_heat_map(
        folder / "adapter_base_distance_layers",
        layer_map(
            relations,
            lambda each: each.share,
            f"{name}: distance of adapter and base over that of random subspaces (1: as far as chance)",
            "distance / random",
        ),
    )
    draw_bars(
        folder / "adapter_base_energy",
        Figure(
            title=f"{name}: share of the squared norm within a subspace (mean over layers)",
            x_label="matrix",
            y_label="projection energy, %",
            series=(
                kind_series(relations, lambda each: 100 * each.adapter_energy, "adapter in base's leading subspace"),
                kind_series(relations, lambda each: 100 * each.base_energy, "base in the adapter's subspace"),
                kind_series(relations, lambda each: 100 * each.leading_energy, "base in its own leading subspace"),
                kind_series(relations, lambda each: 100 * each.random_energy, "any matrix in a random subspace"),
            ),
        ),
    )
    draw_lines(
        folder / "adapter_base_energy_layers",
        Figure(
            title=f"{name}: energy of the adapter in the base's leading subspace, over chance (rank / O)",
            x_label="layer",
            y_label="times a random subspace's",
            series=tuple(
                layer_series(
                    [each for each in relations if each.matrix == kind],
                    lambda each: each.adapter_energy / each.random_energy,
                    kind,
                )
                for kind in kinds(relations)
            ),
            levels=(Level("random subspace", 1.0),),
        ),
    )


def draw_curves(folder: Path, curves: Sequence[Curve], window: int) -> None:
    """Loss, entropy and, for pruned runs, sparsity against the step, a line per run.

    Args:
        folder: where curves_loss, curves_entropy and curves_sparsity go, as .png and .csv.
        curves: the runs' curves.
        window: logged steps of the moving mean; sparsity is drawn unsmoothed.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    smoothing = f" (mean of the last {window} logged steps)" if window > 1 else ""
    for quantity, label in QUANTITIES.items():
        is_share = quantity == "sparsity"
        found = {curve.name: told(curve, quantity) for curve in curves}
        if not any(values and (any(values) or not is_share) for _, values in found.values()):
            continue
        lines = tuple(
            Series(name, steps, tuple(100 * share for share in values) if is_share else moving_mean(values, window))
            for name, (steps, values) in found.items()
            if values
        )
        title = f"{quantity.capitalize()} along training{'' if is_share else smoothing}"
        draw_lines(folder / f"curves_{quantity}", Figure(title, "training step", label, lines, is_linear=True))
