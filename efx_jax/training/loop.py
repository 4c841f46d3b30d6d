"""The training loop: update, event, checkpoint."""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.config import Config
from efx_jax.errors import InputError
from efx_jax.masks import mask_shapes
from efx_jax.model.attention import Implementation, choose_attention
from efx_jax.parallel.hosts import meet
from efx_jax.parallel.partition import placed_shapes, tree_shardings
from efx_jax.pruning.average import moves_base
from efx_jax.training import checkpoint, log
from efx_jax.training.events import forget_blocks, mask_sparsity, prune_run
from efx_jax.training.feed import epoch_rows, mesh_batch, packed_shape, rows_per_pass
from efx_jax.training.interrupt import asked, interruptible, say_interrupted
from efx_jax.training.journal import Journal
from efx_jax.training.measure import measure, measure_start
from efx_jax.training.prepare import Prepared
from efx_jax.training.progress import Progress, progress
from efx_jax.training.schedule import Event, learning_rate, optimizer, prune_events
from efx_jax.training.search import Search, end_search, fresh_units, masked_base, plan_search, search_step
from efx_jax.training.start import take_over, tidy
from efx_jax.training.state import RunState, fresh_state
from efx_jax.training.step import Batch, StepOptions, jit_step, step_options, train_step
from efx_jax.training.trace import tracing
from efx_jax.training.validation import metric_values, update_best, validation_steps

Array = jax.Array
_Batch = dict[str, Array]
# Metric of a step, what it is, and the setting to lower where it is not finite.
_FINITE = (
    ("loss", "loss", "train.learning_rate"),
    ("grad_norm", "norm of the gradient", "train.learning_rate"),
    ("adapter_norm", "norm of the adapters", "train.learning_rate"),
    ("generator_loss", "loss of the generator", "atp.learning_rate"),
    ("generator_grad_norm", "norm of the generator's gradient", "atp.learning_rate"),
    ("generator_norm", "norm of the generator's weights", "atp.learning_rate"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """What every step of a run reads and none changes; from step `shippable` on the model has its final sparsity.

    `search` is None unless the run prunes whole units.
    """

    config: Config
    prepared: Prepared
    mesh: Mesh
    steps: int
    output: Path
    journal: Journal
    sinks: list[log.Sink]
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    step: Callable[..., tuple[Any, dict[str, Array]]]
    options_of: Callable[[Batch], StepOptions]
    search: Search | None
    validations: frozenset[int]
    shippable: int
    attention_path: Implementation
    dropout_key: Array
    progress: Progress
    trace: Callable[[int], None]


def train(
    config: Config,
    prepared: Prepared,
    mesh: Mesh,
    steps: int,
    events: tuple[Event, ...],
    output: Path,
    journal: Journal,
    sinks: list[log.Sink],
    trunk: Path | None,
) -> RunState | None:
    """Trains from the last checkpoint, or from the start, to the last step; None if the user interrupted it.

    The start may be what `trunk` has learned, see `efx_jax.training.start`.
    """
    *keys, dropout_key = jax.random.split(jax.random.key(config.seed), 3)
    tx, rate = optimizer(config.train, steps), learning_rate(config.train, steps)
    attention_path = _agreed(choose_attention(prepared.spec, config.model.compute_dtype, packed=packed_shape(config)))

    def options_of(batch: Batch) -> StepOptions:
        return step_options(config, rows_per_pass(config, batch["tokens"].shape[1]), attention_path)

    search = plan_search(config, prepared, mesh, steps, events, tx, rate, dropout_key, options_of)

    def at_step_0(config: Config) -> RunState:
        count = max(1, len(prune_events(config.prune, config.train, steps)))
        return fresh_state(config, prepared.params, prepared.spec, mesh, tx, keys, count, prepared.adapters)

    fresh = dataclasses.replace(at_step_0(config), units=fresh_units(search, mesh) if search else None)
    by_step = {event.step: event for event in events}
    origin = checkpoint.fingerprint(prepared.params, prepared.train, prepared.adapters)
    masks = placed_shapes(mesh, mask_shapes(prepared.params["layers"], config.prune.targets))
    with (
        checkpoint.open_checkpoints(output / "checkpoints", config.train.keep) as manager,
        checkpoint.open_best(config.eval, output / "best") as best_manager,
        interruptible() as stop,
    ):
        found = checkpoint.restore(manager, fresh, masks, origin)
        is_new = found is None
        if is_new:
            found = take_over(trunk, config, fresh, at_step_0, min(by_step, default=steps), origin, output)
        if found is not None:
            state, _, waiting, notes = found
            journal.take_up(notes)
        else:
            state, waiting = fresh, False
            with journal.announced("evaluate base"):
                journal.results.update(measure_start(config, prepared))
        start = int(state.train.step)
        if jax.process_index() == 0:
            tidy(output, start, steps, waiting)
        save = checkpoint.saver(manager, origin, journal, moves_base(config.prune))
        save_best = checkpoint.saver(best_manager, origin, journal, moves_base(config.prune)) if best_manager else None
        if save_best and journal.best and journal.best.step == start:
            # A run may have been killed between the two.
            save_best(state)
        with progress(start, steps) as shown, tracing(config.profile, output / "profile") as trace:
            pinned = (tree_shardings(mesh, state.train), NamedSharding(mesh, PartitionSpec()))
            loop = _Loop(
                config=config,
                prepared=prepared,
                mesh=mesh,
                steps=steps,
                output=output,
                journal=journal,
                sinks=sinks,
                tx=tx,
                learning_rate=rate,
                step=train_step if mesh.size == 1 else jit_step(pinned),
                options_of=options_of,
                search=search,
                validations=validation_steps(config.eval, config.train, epoch_rows(config, prepared.train), steps),
                shippable=max(by_step, default=0),
                attention_path=attention_path,
                dropout_key=dropout_key,
                progress=shown,
                trace=trace,
            )
            batch = mesh_batch(config, prepared.train, start, mesh)
            sparsity = mask_sparsity(state.masks, state.params)
            is_due = waiting or (is_new and start in by_step)
            is_over = _is_over(loop, state, stop)
            while is_due or not is_over:
                if not is_due:
                    with journal.phase("train"):
                        state, batch = _update(loop, state, batch, sparsity)
                    is_due = int(state.train.step) in by_step
                had_event, is_due = is_due, False
                if had_event:
                    # An event may take longer than all training before it.
                    save(state, waiting=True)
                    state = _event(loop, state, by_step[int(state.train.step)])
                    sparsity = mask_sparsity(state.masks, state.params)
                number, every = int(state.train.step), config.train.checkpoint_every
                is_best = number in loop.validations and _validate(loop, state)
                is_over = _is_over(loop, state, stop)
                if had_event or is_best or is_over or (every and number % every == 0):
                    save(state)
                if save_best and is_best:
                    # Each is whole before the next begins: no checkpoint names a best one that never came to be.
                    manager.wait_until_finished()
                    save_best(state)
                    best_manager.wait_until_finished()
                if had_event:
                    forget_blocks(output / "event", manager)
        if int(state.train.step) < steps and not _enough(loop):
            say_interrupted(int(state.train.step), steps, manager.latest_step() is not None, output)
            return None
        if best_manager and journal.best and journal.best.step != int(state.train.step):
            best_manager.wait_until_finished()
            state = checkpoint.restore_best(best_manager, fresh, masks, origin, journal.best.step)
    return state


def _is_over(loop: _Loop, state: RunState, stop: threading.Event) -> bool:
    """Whether no update follows: all are done, no better model is to be expected, or the user has asked to stop."""
    # Asked first: hosts meet there.
    return asked(stop) or int(state.train.step) >= loop.steps or _enough(loop)


def _update(loop: _Loop, state: RunState, batch: _Batch, sparsity: float) -> tuple[RunState, _Batch]:
    """One training step, its line in metrics.jsonl and its place on the progress bar; and the next batch."""
    config, train = loop.config, loop.config.train
    number = int(state.train.step)
    loop.trace(number)
    began = time.perf_counter()
    if loop.search:
        new, metrics = search_step(loop.search, state, batch)
    else:
        new, metrics = _step(loop, state, batch)
    # Laid out while the devices compute.
    following = mesh_batch(config, loop.prepared.train, number + 1, loop.mesh)
    values = {"sparsity": sparsity} | {name: float(value) for name, value in metrics.items()}
    seconds = time.perf_counter() - began
    _refuse_diverged(number + 1, values)
    loop.journal.tokens += int(values["tokens"])
    row = {
        "step": number + 1,
        "tokens": loop.journal.tokens,
        # A batch of nothing but text has no label, and a loss of 0 that says nothing.
        **({name: values[name] for name in ("loss", "entropy")} if values["labels"] else {}),
        "learning_rate": float(loop.learning_rate(number)),
        "grad_norm": values["grad_norm"],
        "sparsity": values["sparsity"],
        "tokens_per_second": values["tokens"] / seconds,
    }
    others = ("divergence", "generator_loss", "generator_kept")
    row |= {name: values[name] for name in others if name in values}
    is_logged = (number + 1) % train.log_every == 0
    if is_logged and jax.process_index() == 0:
        log.append_row(loop.output / "metrics.jsonl", row)
        for sink in loop.sinks:
            sink(row)
    loop.progress.step(row, is_logged)
    return new, following


def _refuse_diverged(number: int, values: Mapping[str, float]) -> None:
    """Refuses what update `number` has made before any of it is saved: the last good checkpoint stays.

    Raises:
        InputError: a loss before the update, its gradient or what it has led to is not finite.
    """
    for name, found, setting in _FINITE:
        if not math.isfinite(values.get(name, 0.0)):
            raise InputError(
                f"step {number}: the {found} is not finite; lower {setting} or set model.compute_dtype float32, and "
                "choose another --output"
            )


def _step(loop: _Loop, state: RunState, batch: _Batch) -> tuple[RunState, dict[str, Array]]:
    """One update of the adapters under masks of entries."""
    train, metrics = loop.step(
        state.train,
        state.params,
        state.masks or None,
        batch,
        loop.dropout_key,
        loop.prepared.spec,
        loop.tx,
        loop.options_of(batch),
        loop.prepared.teacher if state.masks else None,
    )
    return dataclasses.replace(state, train=train), metrics


def _event(loop: _Loop, state: RunState, event: Event) -> RunState:
    """The dense adapter, once it has learned, measured where this is the only event, then the event.

    (Adapters that have learned beside ATP's search are not dense ones: they have met other masks in every step.)
    """
    if loop.search:
        with loop.journal.phase("prune", loop.progress.phase):
            return end_search(loop.search, state, loop.mesh)
    if event.last and event.step and not state.masks:
        with loop.journal.phase("evaluate dense", loop.progress.phase):
            found = measure(loop.config, loop.prepared, state.params, state.train.adapters)
            loop.journal.results[f"dense LoRA, step {event.step}"] = found
    with loop.journal.phase("prune", loop.progress.phase):
        folder = loop.output / "event" / f"step-{event.step}"
        return prune_run(loop.config, loop.prepared, state, event, folder, loop.attention_path)


def _validate(loop: _Loop, state: RunState) -> bool:
    """Measures the model as it stands, writes the line of evaluations.jsonl; whether it is the best to ship so far."""
    evaluation, step = loop.config.eval, int(state.train.step)
    params, masks = masked_base(loop.search, state) if loop.search else (state.params, state.masks)
    # Answers are kept of the models that the table shows.
    config = dataclasses.replace(loop.config, eval=dataclasses.replace(evaluation, samples=0))
    with loop.journal.phase("evaluate", loop.progress.phase):
        found = measure(config, loop.prepared, params, state.train.adapters, masks or None, evaluation.tasks)
    values = metric_values(found)
    if jax.process_index() == 0:
        log.append_row(loop.output / "evaluations.jsonl", {"step": step, **values})
        for sink in loop.sinks:
            sink({"step": step, **values})
    if not evaluation.best or step < loop.shippable:
        return False
    loop.journal.best = update_best(loop.journal.best, evaluation.best, step, values[evaluation.best])
    return loop.journal.best.step == step


def _enough(loop: _Loop) -> bool:
    """Whether `eval.patience` evaluations have passed without a better model."""
    patience, best = loop.config.eval.patience, loop.journal.best
    return bool(patience) and best is not None and best.stale >= patience


def _agreed(path: Implementation) -> Implementation:
    """cuDNN's attention only where all hosts have found it to be right: they run one program."""
    return path if all(meet(path == "cudnn")) else "xla"
