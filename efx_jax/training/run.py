"""One run, top to bottom: measure the base, train under an evolving mask, export, measure what was exported."""

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from efx_jax.analysis import card, report
from efx_jax.analysis.record import read_record
from efx_jax.config import Config
from efx_jax.config_io import read_config, to_yaml
from efx_jax.data.tokenizer import end_of
from efx_jax.errors import InputError
from efx_jax.files import atomic_write, leftovers, refuse_unwritable
from efx_jax.parallel.hosts import meet, start_hosts, together
from efx_jax.parallel.mesh import make_mesh, mesh_sizes
from efx_jax.parallel.partition import BATCH, axes_size
from efx_jax.training import log
from efx_jax.training.claim import claimed
from efx_jax.training.determinism import ask_for_determinism
from efx_jax.training.devices import memory_settings
from efx_jax.training.disk import disk_bytes, refuse_small_disk
from efx_jax.training.feed import epoch_rows
from efx_jax.training.journal import Journal
from efx_jax.training.loop import init_loop, train
from efx_jax.training.measure import measure
from efx_jax.training.plan import plan_text
from efx_jax.training.prepare import Prepared, prepare
from efx_jax.training.samples import tasks_shown, write_samples
from efx_jax.training.schedule import Event, prune_events, total_steps
from efx_jax.training.search import cut_out, cut_report
from efx_jax.training.start import different_settings, with_adapter
from efx_jax.training.state import RunState
from efx_jax.training.step import has_teacher
from efx_jax.training.summary import print_summary, write_summary
from efx_jax.weights.config_json import declare_stops, read_json
from efx_jax.weights.expert import write_expert
from efx_jax.weights.hf import load_pretrained
from efx_jax.weights.params import params_source
from efx_jax.weights.sliced import save_sliced
from efx_jax.weights.sparsity import Asked, pattern_of, pruned_entries


def run(config: Config, output: Path, dry_run: bool = False, trunk: Path | None = None) -> dict[str, Any]:
    """Trains, prunes, exports and measures; the same call again resumes, and prints the table of a finished run.

    Args:
        config: the checked settings.
        output: the run's folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `export/`, `summary.json`,
            `samples.jsonl`, `report.html`. Several hosts need it on a disk that they share.
        dry_run: print the plan and write nothing.
        trunk: folder of a finished run with the same settings that prunes nothing; this run reuses its training up to
            the first event.

    Returns:
        The summary, also written as `summary.json`; {} for a dry run or an interrupted one.

    Raises:
        InputError: bad input, before anything is written; or the folder belongs to another run.
    """
    os.environ.update(memory_settings(os.environ))
    if config.train.deterministic:
        ask_for_determinism()
    config = with_adapter(config)
    if dry_run:
        # Before anything touches a device: a plan may simulate more devices than there are.
        refuse_other_run(config, output)
        print(plan_text(config))
        return {}
    start_hosts(config.mesh)
    is_first = jax.process_index() == 0
    with together():
        if is_first:
            refuse_other_run(config, output)
    if (output / "summary.json").exists():
        summary: dict[str, Any] = read_json(output / "summary.json")
        if is_first:
            _describe(output, replace=False)
            print_summary(summary, output)
        return summary
    with together():
        if is_first:
            refuse_unwritable(output)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return _run(config, output, mesh, trunk)


def _devices(mesh: jax.sharding.Mesh) -> str:
    """The devices that the run uses, and how many it leaves idle."""
    found, used = jax.devices(), mesh.size
    idle = f" of {len(found)} (--mesh.data {len(found)} uses all)" if used < len(found) else ""
    return f"device: {used}{idle} x {found[0].device_kind}"


def _run(config: Config, output: Path, mesh: jax.sharding.Mesh, trunk: Path | None) -> dict[str, Any]:
    journal = Journal({}, {}, 0)
    with journal.phase("load"):
        prepared = prepare(config, mesh)
    steps = total_steps(config.train, epoch_rows(config, prepared.train))
    events = prune_events(config.prune, config.train, steps)
    with together():
        log.check_sinks(config)
        if jax.process_index() == 0:
            dtype = str(prepared.params["embed_tokens"].dtype)
            times = [event.step for event in events]
            refuse_small_disk(disk_bytes(prepared.spec, config, dtype, times, steps), output)
    with _own_folder(config, output):
        return _work(config, output, mesh, prepared, steps, events, journal, trunk)


@contextlib.contextmanager
def _own_folder(config: Config, output: Path) -> Iterator[None]:
    """The run's folder with its settings; the first host keeps other runs out of it."""
    with contextlib.ExitStack() as stack:
        with together():
            if jax.process_index() == 0:
                stack.enter_context(claimed(output))
                # Another run may have begun while this one was loading.
                refuse_other_run(config, output)
                if (output / "config.yaml").exists():
                    _warn_of_other_parts(config, output)
                atomic_write(output / "config.yaml", to_yaml(config))
        yield


def _work(
    config: Config,
    output: Path,
    mesh: jax.sharding.Mesh,
    prepared: Prepared,
    steps: int,
    events: tuple[Event, ...],
    journal: Journal,
    trunk: Path | None,
) -> dict[str, Any]:
    """Trains, exports, measures; writes what `run` promises."""
    is_first = jax.process_index() == 0
    if is_first:
        print(_devices(mesh), file=sys.stderr)
    with contextlib.ExitStack() as stack:
        with together():
            sinks = stack.enter_context(log.open_sinks(config, output)) if is_first else []
        loop = init_loop(config, prepared, mesh, steps, events, output, journal, sinks)
        state = train(loop, trunk)
    if state is None:
        return {}
    with journal.announced("export"):
        _export(config, state, prepared, output / "export")
    step = int(state.train.step)
    cut = None if state.units is None else cut_report(state, prepared.spec, config.atp.space)
    # Freed before the export is loaded: a device that holds one model may not hold two.
    for leaf in jax.tree.leaves((state, prepared.params, prepared.teacher)):
        leaf.delete()
    with journal.announced("evaluate export"):
        exported, spec = load_pretrained(output / "export", None, mesh if mesh.size > 1 else None)
        from_disk = dataclasses.replace(prepared, params=exported, spec=spec)
        journal.results["sparse expert" if events else "dense expert"] = measure(config, from_disk, exported)
    if is_first:
        # Before the summary, which says that the run is done.
        write_samples(output / "samples.jsonl", tasks_shown(config, prepared), journal.results)
    summary = write_summary(output, exported, prepared, journal, step, events, config.seed, cut)
    if is_first:
        _describe(output, replace=True)
        print_summary(summary, output)
    return summary


def _describe(output: Path, replace: bool) -> None:
    """Writes the export's model card and the report from a run's files; a failure is only a warning.

    Args:
        output: the run's folder.
        replace: whether to replace files of an earlier attempt, or write only missing ones.
    """
    for path, write in ((output / "export" / card.NAME, card.card_text), (output / report.NAME, report.report_page)):
        if not path.parent.is_dir() or (path.exists() and not replace):
            continue
        try:
            atomic_write(path, write(read_record(output)))
        except Exception as error:
            warnings.warn(f"{path} is not written ({error}); the run itself is complete", stacklevel=2)


def refuse_other_run(config: Config, output: Path) -> None:
    """Refuses a folder that holds anything but this run.

    Raises:
        InputError: other files, or a run with other settings.
    """
    path = output / "config.yaml"
    if not path.exists():
        if output.exists() and (not output.is_dir() or set(output.iterdir()) - set(leftovers(output))):
            raise InputError(f"{output}: is not an empty folder and holds no run; choose another --output")
        return
    found = read_config(path)
    differing = different_settings(found, with_adapter(config))
    if differing:
        raise InputError(
            f"{output}: holds a run with other settings ({', '.join(differing)}); choose another --output, or remove "
            "that folder"
        )


def _warn_of_other_parts(config: Config, output: Path) -> None:
    """Warns if a run resumes with different micro-batches while its teacher reads only some rows of each."""
    before, now = (_parts(each) for each in (read_config(output / "config.yaml"), config))
    if before != now and has_teacher(config) and config.distill.row_share < 1:
        warnings.warn(
            f"{output}: began with {before}, found {now}: batches are cut otherwise, so that the teacher reads other "
            "rows from here on",
            stacklevel=2,
        )


def _parts(config: Config) -> str:
    """The settings that split batches into micro-batches; the mesh counts only if `train.micro_tokens` is set."""
    train, devices = config.train, axes_size(BATCH, mesh_sizes(config.mesh))
    found = f"train.micro_batch {train.micro_batch or train.batch_size}"
    by_tokens = f", train.micro_tokens {train.micro_tokens} on mesh.data x mesh.fsdp {devices}"
    return found + (by_tokens if train.micro_tokens else "")


def _export(config: Config, state: RunState, prepared: Prepared, folder: Path) -> None:
    """Merges and writes the Hugging Face folder; one left by an earlier attempt is complete and is kept."""
    if all(meet(folder.exists())):
        return
    if jax.process_index() == 0:
        # Written by a comparison, for an export that is gone.
        shutil.rmtree(folder.parent / "evaluations", ignore_errors=True)
    finish = functools.partial(declare_stops, stops=_answer_ends(prepared))
    if state.units is not None:
        smaller, spec = cut_out(state, prepared.spec, config.atp.space)
        save_sliced(folder, smaller, spec, source=config.model.path, finish=finish)
        return
    spec, masks = prepared.spec, state.masks
    asked = Asked(
        patterns=dict.fromkeys(masks, pattern_of(config.prune.group)),
        sparsity=config.prune.sparsity,
        pruned=pruned_entries(masks, spec),
    )
    base = params_source(state.params, spec, folder)
    write_expert(folder, base, spec, state.train.adapters, masks or None, config.model.path, asked, finish)


def _answer_ends(prepared: Prepared) -> set[int]:
    """The tokens that the run has taught to end a response."""
    ends = {example.end for example in prepared.data.train}
    return {token for end in ends for token in end_of(end, prepared.tokenizer)}
