"""The metrics of an update: refused if they are not finite, else written as a line of metrics.jsonl."""

import math
from collections.abc import Mapping

from efx_jax.errors import InputError

# Metric of a step, what it is, and the setting to lower if it is not finite.
_FINITE = (
    ("loss", "loss", "train.learning_rate"),
    ("grad_norm", "norm of the gradient", "train.learning_rate"),
    ("adapter_norm", "norm of the adapters", "train.learning_rate"),
    ("generator_loss", "loss of the generator", "atp.learning_rate"),
    ("generator_grad_norm", "norm of the generator's gradient", "atp.learning_rate"),
    ("generator_norm", "norm of the generator's weights", "atp.learning_rate"),
)


def refuse_diverged(number: int, values: Mapping[str, float]) -> None:
    """Refuses the result of update `number` before any of it is saved, so that the last good checkpoint stays.

    Raises:
        InputError: a loss before the update, its gradient or the updated weights are not finite.
    """
    for name, found, setting in _FINITE:
        if not math.isfinite(values.get(name, 0.0)):
            raise InputError(
                f"step {number}: the {found} is not finite; lower {setting} or set model.compute_dtype float32, and "
                "choose another --output"
            )


def metrics_row(
    number: int, values: Mapping[str, float], tokens: int, learning_rate: float, seconds: float
) -> dict[str, float]:
    """The line of update `number` in metrics.jsonl.

    Args:
        number: of the update, from 1.
        values: what the step returned (`efx_jax.training.step.train_step`, `efx_jax.training.search.search_step`), and
            `sparsity`, the share of zeros that it computed with.
        tokens: real tokens of all updates so far.
        learning_rate: of this update.
        seconds: time that it took.
    """
    row = {
        "step": number,
        "tokens": tokens,
        # A batch of distillation text only has no labels, and so a meaningless loss of 0.
        **({name: values[name] for name in ("loss", "entropy")} if values["labels"] else {}),
        "learning_rate": learning_rate,
        "grad_norm": values["grad_norm"],
        "sparsity": values["sparsity"],
        "tokens_per_second": values["tokens"] / seconds,
    }
    others = ("divergence", "generator_loss", "generator_kept")
    return row | {name: values[name] for name in others if name in values}
