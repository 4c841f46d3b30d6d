"""When things happen: the learning rate at every step, and the steps of the prune events."""

import dataclasses

import optax

from efx_jax.config import PruneConfig, TrainConfig
from efx_jax.config_prune import epochs_begun
from efx_jax.errors import InputError
from efx_jax.rounding import round_up


@dataclasses.dataclass(frozen=True)
class Event:
    """A prune event after update number `step` (0: before the first); `last` is the one whose mask is exported."""

    step: int
    sparsity: float
    last: bool


def total_steps(config: TrainConfig, rows: int) -> int:
    """Number of updates: `steps`, or `epochs` passes over the rows; 0 if both are 0."""
    if config.steps or not config.epochs:
        return config.steps
    return max(1, round_up(config.epochs * rows / config.batch_size))


def prune_events(prune: PruneConfig, train: TrainConfig, steps: int) -> tuple[Event, ...]:
    """The events of a run, in order; none at sparsity 0.

    "epochs": one after every epoch, the last at the end, even mid-epoch; with `train.steps` at the same shares of the
    steps.
    "fractions": at these shares of the steps, 0 being before the first update. "cubic": `events` of them across the
    ramp, the sparsity following s (1 - (1 - t)^3) (Zhu & Gupta, arXiv 1710.01878).

    Raises:
        InputError: all events fall on one step, which would be a plain event.
    """
    if prune.sparsity == 0:
        return ()
    if prune.schedule == "epochs":
        ends = [(index + 1) / train.epochs for index in range(epochs_begun(train) - 1)]
        planned = [(fraction, prune.sparsity) for fraction in (*ends, 1.0)]
    elif prune.schedule == "fractions":
        planned = [(fraction, prune.sparsity) for fraction in prune.fractions]
    else:
        start, end = prune.ramp
        progress = [(index + 1) / prune.events for index in range(prune.events)]
        planned = [(start + (end - start) * t, prune.sparsity * (1 - (1 - t) ** 3)) for t in progress]
    # Two events on the same step would prune twice with no training in between: the later one stands for both.
    by_step = {_event_step(fraction, steps): sparsity for fraction, sparsity in planned}
    last = max(by_step)
    if len(by_step) == 1 and prune.plain_last_event and prune.recovery != "none":
        raise InputError(
            f"prune.plain_last_event must be false, as all events fall on step {last} of {steps}: prune.recovery "
            f"{prune.recovery} would never run"
        )
    return tuple(Event(step, by_step[step], step == last) for step in sorted(by_step))


def _event_step(fraction: float, steps: int) -> int:
    """The update after which an event falls; only a fraction of exactly 0 comes before the first."""
    return min(steps, max(1, round(fraction * steps))) if fraction else 0


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Update number -> learning rate: a linear warm-up, then linear, cosine or no decay to 0 at the last step."""
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    decay = {
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    if not warmup:
        return decay
    # The warm-up starts one step above zero, so that the first update already learns.
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999) after global-norm clipping."""
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, optax.adamw(learning_rate(config, steps), weight_decay=config.weight_decay))
