"""The course of training, from a run's metrics.jsonl."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from efx_jax.errors import InputError
from efx_jax.files import read_text

QUANTITIES = {
    "loss": "training loss, nats per token",
    "entropy": "entropy of the predictions, nats",
    "sparsity": "zeros in the pruned matrices, %",
}
_SMOOTH = 40
"""About how many windows of the moving mean fit into a run."""


Values = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The logged steps of a run, ascending, and the quantities logged at each; `loss` and `entropy` in nats (None if a
    batch had no labels), `sparsity` as a share."""

    name: str
    steps: tuple[int, ...]
    loss: Values
    entropy: Values
    sparsity: Values


def read_curve(folder: Path, name: str) -> Curve:
    """Reads FOLDER/metrics.jsonl; lines that are incomplete or have no step are left out.

    Raises:
        InputError: the file does not exist, or has none of `QUANTITIES`.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: is not there; expected the log of a run that train.py has written")
    found: dict[int, list[float | None]] = {}
    for line in read_text(path).splitlines():
        try:
            row = json.loads(line)
            step, values = int(row["step"]), [_number(row.get(quantity)) for quantity in QUANTITIES]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if any(value is not None for value in values):
            found[step] = values
    if not found:
        raise InputError(f"{path}: expected lines with step, {', '.join(QUANTITIES)}, found none; train the run first")
    steps = tuple(sorted(found))
    loss, entropy, sparsity = zip(*(found[step] for step in steps), strict=True)
    return Curve(name, steps, loss, entropy, sparsity)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def told(curve: Curve, quantity: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The steps at which a run has logged a quantity of `QUANTITIES`, and its values there."""
    pairs = zip(curve.steps, getattr(curve, quantity), strict=True)
    found = {step: value for step, value in pairs if value is not None}
    return tuple(found), tuple(found.values())


def window_of(curves: Sequence[Curve]) -> int:
    """Logged steps per window of the moving mean that makes several runs' curves readable: 1/40 of the longest run."""
    return max(1, max(len(curve.steps) for curve in curves) // _SMOOTH)


def moving_mean(values: Sequence[float], window: int) -> tuple[float, ...]:
    """The mean of each value and up to `window` - 1 before it."""
    return tuple(math.fsum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1))
