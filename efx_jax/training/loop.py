"""The training loop: update, event, checkpoint."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.config import Config
from efx_jax.model.attention import Implementation, choose_attention
from efx_jax.parallel.hosts import meet
from efx_jax.parallel.partition import placed_shapes, tree_shardings
from efx_jax.training import log
from efx_jax.training.events import forget_blocks, mask_sparsity, prune_run
from efx_jax.training.feed import epoch_rows, mesh_batch, packed_pass, rows_per_pass
from efx_jax.training.interrupt import asked, interruptible, say_interrupted
from efx_jax.training.journal import Journal
from efx_jax.training.measure import measure, measure_start
from efx_jax.training.metrics import metrics_row, refuse_diverged
from efx_jax.training.prepare import Prepared
from efx_jax.training.progress import Progress, progress
from efx_jax.training.schedule import Event, learning_rate, optimizer, prune_events
from efx_jax.training.search import Search, end_search, fresh_units, masked_base, plan_search, search_step
from efx_jax.training.start import take_over, tidy
from efx_jax.training.state import RunState, fresh_state
from efx_jax.training.step import Batch, StepOptions, jit_step, step_options, train_step, without_silent_tail
from efx_jax.training.stores import Stores, best_state, forget_later_best, open_stores, restore_latest, save, save_best
from efx_jax.training.trace import tracing
from efx_jax.training.validation import metric_values, update_best, validation_steps

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """What every step of a run reads and none changes.

    `search` is None unless the run prunes whole units. `template` is the state at step 0 with shapes, dtypes and
    shardings in place of its arrays, except for the base and the key.
    """

    config: Config
    prepared: Prepared
    mesh: Mesh
    steps: int
    events: dict[int, Event]
    validations: frozenset[int]
    output: Path
    journal: Journal
    sinks: list[log.Sink]
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    step: Callable[..., tuple[Any, dict[str, Array]]]
    options_of: Callable[[Batch], StepOptions]
    search: Search | None
    attention_path: Implementation
    dropout_key: Array
    template: RunState


def init_loop(
    config: Config,
    prepared: Prepared,
    mesh: Mesh,
    steps: int,
    events: tuple[Event, ...],
    output: Path,
    journal: Journal,
    sinks: list[log.Sink],
) -> Loop:
    """Builds what the steps of a run read.

    Args:
        config: the settings.
        prepared: model and data.
        mesh: the devices that hold the arrays.
        steps: number of updates of the run.
        events: the run's prune events, in order.
        output: the run's folder, for checkpoints, logs and the finished blocks of a long event.
        journal: the run's results so far; updated in place.
        sinks: where the metrics of a step go besides `metrics.jsonl`.
    """
    *_, dropout_key = _keys(config)
    tx, rate = optimizer(config.train, steps), learning_rate(config.train, steps)
    attention_path = _attention_path(config, prepared)

    def options_of(batch: Batch) -> StepOptions:
        return step_options(config, rows_per_pass(config, batch["tokens"].shape[1]), attention_path)

    search = plan_search(config, prepared, mesh, steps, events, tx, rate, dropout_key, options_of)
    template = _template(config, prepared, mesh, steps, tx, search)
    pinned = (tree_shardings(mesh, template.train), NamedSharding(mesh, PartitionSpec()))
    return Loop(
        config=config,
        prepared=prepared,
        mesh=mesh,
        steps=steps,
        events={event.step: event for event in events},
        validations=validation_steps(config.eval, config.train, epoch_rows(config, prepared.train), steps),
        output=output,
        journal=journal,
        sinks=sinks,
        tx=tx,
        learning_rate=rate,
        step=train_step if mesh.size == 1 else jit_step(pinned),
        options_of=options_of,
        search=search,
        attention_path=attention_path,
        dropout_key=dropout_key,
        template=template,
    )


def train(loop: Loop, trunk: Path | None) -> RunState | None:
    """Trains from the last checkpoint, or from the start, to the last step (paper, Algorithm 1, its epoch loop).

    Args:
        loop: from `init_loop`.
        trunk: folder of a run whose training may be reused, see `efx_jax.training.start`, or None.

    Returns:
        The last state, or the best one if `eval.best` has chosen another; None if the user interrupted the run.

    Raises:
        InputError: an update that diverges, calibration that is not finite, a checkpoint of another run.
    """
    config, prepared, mesh, steps = loop.config, loop.prepared, loop.mesh, loop.steps
    output, journal = loop.output, loop.journal
    with open_stores(config, prepared, loop.template, journal, mesh, output) as stores, interruptible() as stop:
        state, is_due = _begin(loop, stores, trunk)
        start = int(state.train.step)
        with progress(start, steps) as shown, tracing(config.profile, output / "profile") as trace:
            batch: Batch = mesh_batch(config, prepared.train, start, mesh)
            journal.sparsity = mask_sparsity(state.masks, state.params)
            if is_due:
                state = _event(loop, stores, shown, state)
                is_over = _settle(loop, stores, shown, stop, state, had_event=True)
            else:
                is_over = _is_over(loop, state, stop)
            while not is_over:
                trace(int(state.train.step))
                state, batch = _update(loop, shown, state, batch)
                is_due = int(state.train.step) in loop.events
                if is_due:
                    state = _event(loop, stores, shown, state)
                is_over = _settle(loop, stores, shown, stop, state, is_due)
        if int(state.train.step) < steps and not _enough(loop):
            say_interrupted(int(state.train.step), steps, stores.latest.latest_step() is not None, output)
            return None
        return best_state(stores, state)


def _keys(config: Config) -> list[Array]:
    """The PRNG keys for the adapters, for pruning and for dropout."""
    return list(jax.random.split(jax.random.key(config.seed), 3))


def _at_step_0(
    config: Config, prepared: Prepared, mesh: Mesh, steps: int, tx: optax.GradientTransformation, search: Search | None
) -> RunState:
    *keys, _ = _keys(config)
    count = max(1, len(prune_events(config.prune, config.train, steps)))
    fresh = fresh_state(config, prepared.params, prepared.spec, mesh, tx, keys, count, prepared.adapters)
    return dataclasses.replace(fresh, units=fresh_units(search, mesh) if search else None)


def _template(
    config: Config, prepared: Prepared, mesh: Mesh, steps: int, tx: optax.GradientTransformation, search: Search | None
) -> RunState:
    """`_at_step_0` without its arrays, which a run that resumes from a checkpoint never creates."""
    shapes = jax.eval_shape(lambda: _at_step_0(config, prepared, mesh, steps, tx, search))
    placed = placed_shapes(mesh, {"train": shapes.train, "prune": shapes.prune})
    prune = dataclasses.replace(placed["prune"], key=_keys(config)[1])
    return RunState(placed["train"], prepared.params, {}, prune, placed_shapes(mesh, shapes.units))


def _begin(loop: Loop, stores: Stores, trunk: Path | None) -> tuple[RunState, bool]:
    """The state to start or resume from, and whether an event is due before any update."""
    config, prepared, mesh, steps, journal = loop.config, loop.prepared, loop.mesh, loop.steps, loop.journal
    found = restore_latest(stores)
    is_new = found is None
    if is_new:
        state, waiting = _at_step_0(config, prepared, mesh, steps, loop.tx, loop.search), False

        def template_of(other: Config) -> RunState:
            return _template(other, prepared, mesh, steps, loop.tx, None)

        first = min(loop.events, default=steps)
        found = take_over(trunk, config, state, template_of, first, stores.origin, loop.output)
    if found is not None:
        state, _, waiting, notes = found
        journal.take_up(notes)
    # The trunk's base may have been measured on data files that have changed since.
    if found is None or notes.get("measured") != stores.measured:
        with journal.announced("evaluate base"):
            journal.results.update(measure_start(config, prepared))
    start = int(state.train.step)
    if jax.process_index() == 0:
        tidy(loop.output, start, steps, waiting)
    forget_later_best(stores, start)
    if stores.best and journal.best and journal.best.step == start:
        # The run may have been killed between the two saves.
        save_best(stores, state)
    return state, waiting or (is_new and start in loop.events)


def _settle(
    loop: Loop, stores: Stores, shown: Progress, stop: threading.Event, state: RunState, had_event: bool
) -> bool:
    """Evaluates and saves checkpoints after an update and its event; returns whether that update was the last."""
    step, every = int(state.train.step), loop.config.train.checkpoint_every
    is_best = step in loop.validations and _validate(loop, shown, state)
    is_over = _is_over(loop, state, stop)
    if had_event or is_best or is_over or (every and step % every == 0):
        save(stores, state)
    if is_best:
        save_best(stores, state)
    if had_event:
        forget_blocks(loop.output / "event", stores.latest)
    return is_over


def _is_over(loop: Loop, state: RunState, stop: threading.Event) -> bool:
    """Whether no update follows: all are done, `eval.patience` has run out, or the user has asked to stop."""
    # `asked` comes first, on every host: it synchronizes them.
    return asked(stop) or int(state.train.step) >= loop.steps or _enough(loop)


def _update(loop: Loop, shown: Progress, state: RunState, batch: Batch) -> tuple[RunState, Batch]:
    """One training step, its line in metrics.jsonl and on the progress bar; returns the new state and next batch."""
    number, began = int(state.train.step), time.perf_counter()
    with loop.journal.phase("train"):
        new, metrics = search_step(loop.search, state, batch) if loop.search else _step(loop, state, batch)
        # The next batch is placed while the devices compute.
        following = mesh_batch(loop.config, loop.prepared.train, number + 1, loop.mesh)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    seconds = time.perf_counter() - began
    refuse_diverged(number + 1, values)
    loop.journal.tokens += int(values["tokens"])
    # ATP's search draws new masks in every step and reports their sparsity.
    values = {"sparsity": loop.journal.sparsity} | values
    row = metrics_row(number + 1, values, loop.journal.tokens, float(loop.learning_rate(number)), seconds)
    is_logged = (number + 1) % loop.config.train.log_every == 0
    if is_logged and jax.process_index() == 0:
        log.append_row(loop.output / "metrics.jsonl", row)
        for sink in loop.sinks:
            sink(row)
    shown.step(row, is_logged)
    return new, following


def _step(loop: Loop, state: RunState, batch: Batch) -> tuple[RunState, dict[str, Array]]:
    """One update of the adapters under elementwise masks, if there are any yet."""
    batch, options = without_silent_tail(batch, loop.options_of(batch))
    train, metrics = loop.step(
        state.train,
        state.params,
        state.masks or None,
        batch,
        loop.dropout_key,
        loop.prepared.spec,
        loop.tx,
        options,
        loop.prepared.teacher if state.masks else None,
    )
    return dataclasses.replace(state, train=train), metrics


def _event(loop: Loop, stores: Stores, shown: Progress, state: RunState) -> RunState:
    """Runs the event of this step; if it is the only one and follows training, measures the dense adapter first.

    (Adapters trained during ATP's search are not dense ones: they have seen different masks in every step.)
    """
    # Saved first: an event may take longer than all the training before it.
    save(stores, state, waiting=True)
    event, journal = loop.events[int(state.train.step)], loop.journal
    if event.last and event.step and not state.masks and not loop.search:
        with journal.phase("evaluate dense", shown.phase):
            found = measure(loop.config, loop.prepared, state.params, state.train.adapters)
            journal.results[f"dense LoRA, step {event.step}"] = found
    with journal.phase("prune", shown.phase):
        if loop.search:
            state = end_search(loop.search, state, loop.mesh)
        else:
            folder = loop.output / "event" / f"step-{event.step}"
            state = prune_run(loop.config, loop.prepared, state, event, folder, loop.attention_path)
    journal.sparsity = mask_sparsity(state.masks, state.params)
    return state


def _validate(loop: Loop, shown: Progress, state: RunState) -> bool:
    """Measures the current model and logs it in evaluations.jsonl; returns whether it is the best to export so far."""
    evaluation, step = loop.config.eval, int(state.train.step)
    params, masks = masked_base(loop.search, state) if loop.search else (state.params, state.masks)
    # Sample answers are kept only for the models that the summary table shows.
    config = dataclasses.replace(loop.config, eval=dataclasses.replace(evaluation, samples=0))
    with loop.journal.phase("evaluate", shown.phase):
        found = measure(config, loop.prepared, params, state.train.adapters, masks or None, evaluation.tasks)
    values = metric_values(found)
    if jax.process_index() == 0:
        log.append_row(loop.output / "evaluations.jsonl", {"step": step, **values})
        for sink in loop.sinks:
            sink({"step": step, **values})
    # Before its last event the model is not yet one that the run could export.
    if not evaluation.best or step < max(loop.events, default=0):
        return False
    journal = loop.journal
    journal.best = update_best(journal.best, evaluation.best, step, values[evaluation.best], journal.tokens)
    return journal.best.step == step


def _enough(loop: Loop) -> bool:
    """Whether `eval.patience` evaluations have passed without a better model."""
    patience, best = loop.config.eval.patience, loop.journal.best
    return bool(patience) and best is not None and best.stale >= patience


def _attention_path(config: Config, prepared: Prepared) -> Implementation:
    """cuDNN's attention only where all hosts have found it to be right, for the teacher too: they run one program."""
    # In one order on every host: a set's follows string hashes, which differ between processes.
    specs = dict.fromkeys([prepared.spec, *([prepared.teacher.spec] if prepared.teacher else [])])
    paths = [choose_attention(spec, config.model.compute_dtype, packed=packed_pass(config)) for spec in specs]
    return "cudnn" if all(meet(all(path == "cudnn" for path in paths))) else "xla"
