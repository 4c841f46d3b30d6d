"""The studies that the command can run: each reads what it needs and returns records, their summary and a drawing."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis import curves, pictures, replay, shifts, space_figures, subspaces, where, where_figures
from efx_jax.analysis.blocks import look_at
from efx_jax.analysis.held import (
    Checkpoint,
    before_event,
    read_checkpoint,
    refuse_cut_units,
    refuse_permuted,
    run_adapters,
    run_linears,
    run_masks,
)
from efx_jax.analysis.runs import (
    Run,
    choose_step,
    held_steps,
    load_base,
    load_export,
    open_shipped,
    split_rows,
    training_rows,
)
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.spec import linear_shapes, spec_from_config
from efx_jax.weights.hf import open_checkpoint

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a study found: `asked` (what was looked at), `records` (frozen dataclasses), `summary` (rows of them), and
    `draw`, which draws them into a folder."""

    asked: dict[str, Any]
    records: Sequence[Any]
    summary: Rows
    draw: Callable[[Path], None]


def adapter_base(run: Run, arguments: argparse.Namespace) -> Found:
    """The adapter subspaces of a run against the weights that it began with (the paper's figures 5 to 8)."""
    refuse_permuted(run)
    step = choose_step(run, tuple(arguments.steps))
    adapters = _adapters(run, step)
    params, spec = load_base(run)
    layers = spaced(spec.num_layers, arguments.layers)
    records = list(subspaces.base_relations(params["layers"], adapters, layers))
    if not records:
        raise InputError(
            f"{run.folder}: the adapters of step {step} are 0; expected a later step than that of an event"
        )
    fields = ("share", "distance", "random", "adapter_energy", "base_energy", "leading_energy", "random_energy")
    summary = by_kind(records, fields, ends=("share",))
    return Found(
        {"step": step, "layers": layers},
        records,
        summary,
        lambda folder: space_figures.draw_relations(folder, run.name, records),
    )


def sparsity(run: Run, _: argparse.Namespace) -> Found:
    """The zeros of the export, by layer and kind of matrix."""
    refuse_cut_units(run)
    records = list(where.matrix_sparsities(load_export(run)))
    summary = by_kind(records, ("sparsity", "row_least", "row_most"), sizes="entries", ends=("sparsity",))
    for row, found in zip(summary, _kinds(records), strict=True):
        row["row_least"], row["row_most"] = min(e.row_least for e in found), max(e.row_most for e in found)
        row["empty_rows"], row["empty_columns"] = sum(e.empty_rows for e in found), sum(e.empty_columns for e in found)
    return Found({}, records, summary, lambda folder: where_figures.draw_sparsity(folder, run.name, records))


def mask_events(run: Run, _: argparse.Namespace) -> Found:
    """What the masks of one event share with those of the next, as far as the checkpoints show."""
    refuse_cut_units(run)
    found: dict[int, Checkpoint] = {}
    for step in held_steps(run):
        checkpoint = read_checkpoint(run, step)
        if checkpoint.masked:
            found.setdefault(checkpoint.events, checkpoint)
    if len(found) < 2:
        raise InputError(
            f"{run.folder}: expected checkpoints with the masks of two prune events or more, found those of "
            f"{len(found)}; train with several events and a large train.keep"
        )
    widths = _widths(run)
    records = [
        change
        for one, other in itertools.pairwise(found.values())
        for change in where.mask_changes(
            run_masks(run, one), run_masks(run, other), widths, (f"step {one.step}", f"step {other.step}")
        )
    ]
    asked = {"steps": [checkpoint.step for checkpoint in found.values()]}
    summary = _by_pair(records, lambda pair: by_kind(pair, _CHANGES, sizes="entries"))
    return Found(asked, records, summary, lambda folder: where_figures.draw_mask_events(folder, run.name, records))


def moved(run: Run, _: argparse.Namespace) -> Found:
    """How far the kept weights of the export are from the base's."""
    refuse_cut_units(run)
    refuse_permuted(run)
    final = load_export(run)
    params, _spec = load_base(run)
    rewritten = {}
    if run.steps:
        shipped = open_shipped(run.folder)
        rewritten = run_linears(shipped, read_checkpoint(shipped, shipped.steps[-1]))
    records = list(where.weight_moves(params["layers"], final, rewritten))
    summary = by_kind(records, ("moved", "norm", "event_norm", "training_norm"), sizes="kept", ends=("norm",))
    return Found({}, records, summary, lambda folder: where_figures.draw_moves(folder, run.name, records))


def scores(run: Run, arguments: argparse.Namespace) -> Found:
    """The scores of the run's own criterion around its threshold, before its first event."""
    refuse_permuted(run)
    replay.event_settings(run.config.prune)
    params, spec = load_base(run)
    batch = training_rows(run, spec, arguments.rows, arguments.length)
    step, adapters = before_event(run, params, spec)
    layers = spaced(spec.num_layers, arguments.layers)
    model = look_at(params, adapters, batch, spec)
    records = list(replay.score_spreads(params, adapters, model, layers, run.config.prune))
    asked = {"step": step, "layers": layers, "tokens": int(batch["lengths"].sum())}
    summary = by_kind(records, ("across",), ends=("across",))
    title = f"{run.name}: {run.config.prune.score}, group {run.config.prune.group}, step {step}"
    return Found(asked, records, summary, lambda folder: where_figures.draw_scores(folder, title, records))


def recovery(run: Run, arguments: argparse.Namespace) -> Found:
    """What the run's event does to the output of every matrix, without and with its recovery, on held-out rows."""
    refuse_permuted(run)
    prune = replay.event_settings(run.config.prune)
    if prune.recovery == "none":
        raise InputError(f"{run.folder}: prune.recovery none repairs nothing; choose a run with a recovery")
    params, spec = load_base(run)
    seen, unseen = split_rows(training_rows(run, spec, 2 * arguments.rows, arguments.length))
    step, adapters = before_event(run, params, spec)
    layers = spaced(spec.num_layers, arguments.layers)
    calibration, held_out = (look_at(params, adapters, batch, spec) for batch in (seen, unseen))
    records = list(replay.replay_recovery(params, adapters, calibration, held_out, layers, prune))
    tokens = {name: int(batch["lengths"].sum()) for name, batch in (("seen", seen), ("held_out", unseen))}
    fields = ("error_masked", "error_recovered", "moved", "move_norm")
    summary = by_kind(records, fields, ends=("error_masked", "error_recovered"))
    title = f"{run.name}: {prune.score} and {prune.recovery} at {100 * prune.sparsity:g} %, step {step}"
    return Found(
        {"step": step, "layers": layers, "tokens": tokens},
        records,
        summary,
        lambda folder: where_figures.draw_repairs(folder, title, records),
    )


def subspace_shifts(runs: Sequence[Run], arguments: argparse.Namespace) -> Found:
    """The distances between the adapter subspaces of each pair of runs, by what changes between them (figure 3d)."""
    refuse_permuted(*runs)
    pairs, kinds = shifts.pairs_of(runs), _shifts(runs, arguments)
    adapters = [_adapters(run, choose_step(run, tuple(arguments.steps))) for run in runs]
    records = [
        distance
        for one, other in pairs
        for distance in subspaces.adapter_distances(adapters[one], adapters[other], (runs[one].name, runs[other].name))
    ]
    summary = _by_pair(records, lambda pair: by_kind(pair, ("share", "distance", "random"), ends=("share",)), kinds)
    asked = {"steps": {run.name: choose_step(run, tuple(arguments.steps)) for run in runs}}
    return Found(asked, records, summary, lambda folder: space_figures.draw_shifts(folder, records, kinds))


def mask_runs(runs: Sequence[Run], arguments: argparse.Namespace) -> Found:
    """What the last masks of each pair of runs share."""
    refuse_permuted(*runs)
    pairs, kinds = shifts.pairs_of(runs), _shifts(runs, arguments)
    checkpoints = [read_checkpoint(run, choose_step(run, tuple(arguments.steps))) for run in runs]
    bare = next((run for run, found in zip(runs, checkpoints, strict=True) if not found.masked), None)
    if bare is not None:
        raise InputError(f"{bare.folder}: its checkpoint holds no masks; expected pruned runs; leave it out")
    masks = [run_masks(run, found) for run, found in zip(runs, checkpoints, strict=True)]
    records = [
        change
        for one, other in pairs
        for change in where.mask_changes(
            masks[one], masks[other], _widths(runs[one]), (runs[one].name, runs[other].name)
        )
    ]
    summary = _by_pair(records, lambda pair: by_kind(pair, _CHANGES, sizes="entries"), kinds)
    asked = {"steps": {run.name: found.step for run, found in zip(runs, checkpoints, strict=True)}}
    return Found(asked, records, summary, lambda folder: where_figures.draw_mask_runs(folder, records, kinds))


def training_curves(runs: Sequence[Run], _: argparse.Namespace) -> Found:
    """Loss, entropy and sparsity over training (the paper's figures 4a and 4b)."""
    records = [curves.read_curve(run.folder, run.name) for run in runs]
    window = curves.window_of(records)
    summary: Rows = [
        {"run": curve.name, "steps": curve.steps[-1]}
        | {
            f"{name}_{end}": at(curves.told(curve, name)[1])
            for name in ("loss", "entropy")
            for end, at in _ENDS.items()
        }
        for curve in records
    ]
    return Found(
        {"window": window}, records, summary, lambda folder: space_figures.draw_curves(folder, records, window)
    )


OF_ONE: Mapping[str, Callable[[Run, argparse.Namespace], Found]] = {
    "adapter_base": adapter_base,
    "sparsity": sparsity,
    "mask_events": mask_events,
    "scores": scores,
    "recovery": recovery,
    "moved": moved,
}
OF_SEVERAL: Mapping[str, Callable[[Sequence[Run], argparse.Namespace], Found]] = {
    "subspaces": subspace_shifts,
    "mask_runs": mask_runs,
    "curves": training_curves,
}

_CHANGES = ("kept", "pruned", "random_kept", "random_pruned", "beyond_chance")
_TAIL = 10  # logged steps averaged at each end of a curve
_ENDS: Mapping[str, Callable[[Sequence[float]], float | None]] = {
    "first": lambda values: _mean(values[:_TAIL]),
    "last": lambda values: _mean(values[-_TAIL:]),
}


def by_kind(records: Sequence[Any], fields: Iterable[str], sizes: str = "", ends: Iterable[str] = ()) -> Rows:
    """A row per kind of matrix and one for "all": means over layers, weighted by the field `sizes` if given; for the
    fields in `ends` also the minimum and maximum."""
    rows = []
    for kind, found in zip((*pictures.kinds(records), "all"), _kinds(records), strict=True):
        weights = [getattr(each, sizes) if sizes else 1 for each in found]
        row: dict[str, Any] = {"matrix": kind, "matrices": len(found)}
        for field in fields:
            values = [getattr(each, field) for each in found]
            row[field] = where.weighted_mean(values, weights)
            if field in ends:
                row |= {f"{field}_least": min(values), f"{field}_most": max(values)}
        rows.append(row)
    return rows


def spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` layers, evenly spaced, including the first and last (for 1, the middle one); 0: all."""
    if wanted in (0, 1) or wanted >= count:
        return list(range(count)) if wanted != 1 else [count // 2]
    return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)]


def _kinds(records: Sequence[Any]) -> list[list[Any]]:
    """The records of each kind of matrix present, in the model's order, then all records."""
    return [*([each for each in records if each.matrix == name] for name in pictures.kinds(records)), list(records)]


def _by_pair(
    records: Sequence[Any], summarise: Callable[[list[Any]], Rows], kinds: Mapping[tuple[str, str], str] | None = None
) -> Rows:
    """The summary of every pair of names; with `kinds`, also each pair's shift, and at the end a summary per shift."""
    rows: Rows = []
    for first, second in dict.fromkeys((each.first, each.second) for each in records):
        pair = [each for each in records if (each.first, each.second) == (first, second)]
        head = {"first": first, "second": second} | ({"shift": kinds[first, second]} if kinds else {})
        rows += [head | row for row in summarise(pair)]
    for shift in (name for name in shifts.SHIFTS if kinds and name in kinds.values()):
        found = [each for each in records if kinds and kinds[each.first, each.second] == shift]
        rows += [{"first": "all", "second": "all", "shift": shift} | row for row in summarise(found)]
    return rows


def _shifts(runs: Sequence[Run], arguments: argparse.Namespace) -> dict[tuple[str, str], str]:
    """What changes between each pair of runs, by their names."""
    known = [
        (domain, run.config.data.train, run.config.seed)
        for run, domain in zip(runs, shifts.run_domains(runs, arguments.domains), strict=True)
    ]
    return {
        (runs[one].name, runs[other].name): shifts.shift_of(known[one], known[other])
        for one, other in itertools.combinations(range(len(runs)), 2)
    }


def _adapters(run: Run, step: int) -> Adapters:
    adapters = run_adapters(run, step)
    if adapters is None:
        raise InputError(f"{run.folder}: step 0 has no adapters yet; choose a later one")
    return adapters


def _widths(run: Run) -> dict[str, int]:
    """I of every linear, without reading any weights."""
    shapes = linear_shapes(spec_from_config(open_checkpoint(run.config.model.path).config))
    return {name: shape[1] for name, shape in shapes.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
