"""The figures of masks, zeros, scores, recovery and moved weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from efx_jax.analysis.histograms import Histogram, Mark, Panel, Shares, draw_histograms
from efx_jax.analysis.pictures import Value, kind_series, kinds, layer_map, layer_series, mean, percent
from efx_jax.analysis.plots import Figure, HeatMap, Level, draw_bars, draw_heat_map, draw_lines
from efx_jax.analysis.replay import EDGES, Repair, ScoreSpread
from efx_jax.analysis.shifts import SHIFTS
from efx_jax.analysis.where import MaskChange, MatrixSparsity, Move

_AGREEMENT = "agreement beyond chance, %"


def sparsity_map(name: str, records: Sequence[MatrixSparsity]) -> HeatMap:
    """Zeros in percent by layer and kind of matrix."""
    return layer_map(records, lambda each: 100 * each.sparsity, f"{name}: where the zeros are", "zeros, %")


def draw_sparsity(folder: Path, name: str, records: Sequence[MatrixSparsity]) -> None:
    """Zeros by layer and kind of matrix, and how unequal the rows are.

    Args:
        folder: where sparsity, sparsity_rows and sparsity_kinds go, as .png and .csv.
        name: the run's name.
        records: the records of its matrices.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    draw_heat_map(folder / "sparsity", sparsity_map(name, records))
    draw_heat_map(
        folder / "sparsity_rows",
        layer_map(
            records,
            lambda each: 100 * (each.row_most - each.row_least),
            f"{name}: zeros of a matrix's emptiest output row less those of its fullest",
            "percentage points",
        ),
    )
    draw_bars(
        folder / "sparsity_kinds",
        Figure(
            title=f"{name}: zeros by kind of matrix (mean over layers; bars: least and most)",
            x_label="matrix",
            y_label="zeros, %",
            series=(
                kind_series(records, lambda each: 100 * each.row_least, "fullest output row"),
                kind_series(records, lambda each: 100 * each.sparsity, "the matrix", ends=True),
                kind_series(records, lambda each: 100 * each.row_most, "emptiest output row"),
            ),
        ),
    )


def draw_mask_events(folder: Path, name: str, changes: Sequence[MaskChange]) -> None:
    """What each event's masks keep and prune in common with those of the previous event.

    Args:
        folder: where mask_events_kept, mask_events_pruned and mask_events_layers go, as .png and .csv.
        name: the run's name.
        changes: the changes between consecutive events.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    pairs = dict.fromkeys((each.first, each.second) for each in changes)
    groups = {
        f"{first} to {second}": [e for e in changes if (e.first, e.second) == (first, second)]
        for first, second in pairs
    }
    for side, verb in (("kept", "kept"), ("pruned", "pruned")):
        series = tuple(kind_series(found, _percent_of(side), label) for label, found in groups.items())
        draw_bars(
            folder / f"mask_events_{side}",
            Figure(
                title=f"{name}: of what one event {verb}, what the next {verb} too (mean over layers)",
                x_label="matrix",
                y_label=f"{verb} again, %",
                series=series,
                levels=_random_levels(groups, side),
            ),
        )
    draw_heat_map(
        folder / "mask_events_layers",
        layer_map(
            changes,
            lambda each: percent(each.beyond_chance),
            f"{name}: masks of two events in turn (mean of the events; 0: random, 100: one within the other)",
            _AGREEMENT,
        ),
    )


def draw_mask_runs(folder: Path, changes: Sequence[MaskChange], shift: Mapping[tuple[str, str], str]) -> None:
    """What the masks of each pair of runs share, by what changes between the runs.

    Args:
        folder: where mask_runs, mask_runs_layers and mask_runs_pairs go, as .png and .csv.
        changes: the mask changes of every pair of runs.
        shift: names of two runs -> what changes between them, one of `shifts.SHIFTS`.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    groups = {
        name: [each for each in changes if shift[each.first, each.second] == name]
        for name in SHIFTS
        if name in shift.values()
    }
    draw_bars(
        folder / "mask_runs",
        Figure(
            title="Masks of two runs (mean over pairs and layers; bars: least and most)",
            x_label="matrix",
            y_label=_AGREEMENT,
            series=tuple(
                kind_series(found, _percent_of("beyond_chance"), name, ends=True) for name, found in groups.items()
            ),
        ),
    )
    draw_lines(
        folder / "mask_runs_layers",
        Figure(
            title="Masks of two runs (mean over pairs and matrices)",
            x_label="layer",
            y_label=_AGREEMENT,
            series=tuple(layer_series(found, _percent_of("beyond_chance"), name) for name, found in groups.items()),
        ),
    )
    draw_heat_map(folder / "mask_runs_pairs", _pair_map(changes))


def draw_scores(folder: Path, title: str, spreads: Sequence[ScoreSpread]) -> None:
    """The scores of each kind of matrix around the threshold, with kept and pruned entries separate.

    Args:
        folder: where scores and scores_across go, as .png and .csv.
        title: what the scores are.
        spreads: the score distributions of the matrices.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    panels = []
    for kind in kinds(spreads):
        found = [each for each in spreads if each.matrix == kind]
        size = sum(sum(each.kept) + sum(each.pruned) for each in found)
        series = tuple(
            Shares(
                label,
                tuple(100 * sum(counts) / size for counts in zip(*(getattr(e, label) for e in found), strict=True)),
            )
            for label in ("kept", "pruned")
        )
        panels.append(Panel(kind, series, (Mark("threshold of the whole matrix", 0.0),)))
    draw_histograms(
        folder / "scores",
        Histogram(
            title, "score / threshold, powers of ten", "entries, % in each tenth of a power", EDGES, tuple(panels)
        ),
    )
    draw_heat_map(
        folder / "scores_across",
        layer_map(
            spreads,
            lambda each: 100 * each.across,
            f"{title}\nentries that a comparison over the whole matrix would decide otherwise",
            "entries, %",
        ),
    )


def draw_repairs(folder: Path, title: str, repairs: Sequence[Repair]) -> None:
    """The error of every matrix's output under the mask, without and with the recovery, and what the recovery moves.

    Args:
        folder: where recovery, recovery_layers and recovery_moved go, as .png and .csv.
        title: which event.
        repairs: the repairs of the matrices.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    states = (("mask alone", "error_masked"), ("mask and recovery", "error_recovered"))
    draw_bars(
        folder / "recovery",
        Figure(
            title=f"{title}\nerror of the output on held-out rows (mean over layers; bars: least and most)",
            x_label="matrix",
            y_label="norm of the change / norm of the output, %",
            series=tuple(kind_series(repairs, _percent_of(field), label, ends=True) for label, field in states),
        ),
    )
    draw_heat_map(
        folder / "recovery_layers",
        layer_map(
            repairs,
            lambda each: 100 * each.error_recovered / each.error_masked if each.error_masked else None,
            f"{title}\nerror with the recovery, over that without",
            "%, below 100 it helps",
        ),
    )
    draw_heat_map(
        folder / "recovery_moved",
        layer_map(
            repairs,
            lambda each: 100 * each.moved,
            f"{title}\nkept entries that the recovery moves by more than a tenth",
            "kept entries, %",
        ),
    )


def draw_moves(folder: Path, name: str, moves: Sequence[Move]) -> None:
    """How far the kept weights are from the base's, and whether events or the adapters moved them.

    Args:
        folder: where moved and moved_norm go, as .png and .csv.
        name: the run's name.
        moves: the moves of its matrices.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    draw_heat_map(
        folder / "moved",
        layer_map(
            moves,
            lambda each: 100 * each.moved,
            f"{name}: kept entries that are off their base value by more than a tenth",
            "kept entries, %",
        ),
    )
    parts = [
        kind_series(moves, lambda each: 100 * each.norm, "all of the run"),
        kind_series(moves, lambda each: percent(each.event_norm), "what events wrote"),
        kind_series(moves, lambda each: 100 * each.training_norm, "what the adapters add"),
    ]
    draw_bars(
        folder / "moved_norm",
        Figure(
            title=f"{name}: move of the kept weights (mean over layers)",
            x_label="matrix",
            y_label="norm of the move / norm in the base, %",
            series=tuple(part for part in parts if part.y),
        ),
    )


def _percent_of(field: str) -> Value:
    return lambda each: percent(getattr(each, field))


def _random_levels(groups: Mapping[str, Sequence[MaskChange]], side: str) -> tuple[Level, ...]:
    """What random masks would share: one level if that is the same for all groups, otherwise one per group."""
    shares = {
        label: 100 * sum(getattr(each, f"random_{side}") for each in found) / len(found)
        for label, found in groups.items()
    }
    if max(shares.values()) - min(shares.values()) < 0.5:
        return (Level("random masks", sum(shares.values()) / len(shares)),)
    return tuple(Level(f"random masks, {label}", share) for label, share in shares.items())


def _pair_map(changes: Sequence[MaskChange]) -> HeatMap:
    pairs = list(dict.fromkeys((each.first, each.second) for each in changes))
    columns = kinds(changes)

    def share(pair: tuple[str, str], kind: str) -> float | None:
        found = [each for each in changes if (each.first, each.second) == pair and each.matrix == kind]
        return percent(mean(each.beyond_chance for each in found))

    return HeatMap(
        title="Masks of two runs (mean over layers)",
        x_label="matrix",
        y_label="",
        value_label=_AGREEMENT,
        rows=tuple(f"{first}, {second}" for first, second in pairs),
        columns=tuple(columns),
        values=tuple(tuple(share(pair, kind) for kind in columns) for pair in pairs),
    )
