"""Evaluation during training: after which steps, which model is the best so far, and for how many evaluations."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from efx_jax.config import Config, EvalConfig, TrainConfig
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.tasks import Data
from efx_jax.errors import InputError
from efx_jax.evaluation.results import TITLES
from efx_jax.evaluation.rouge import ROUGE
from efx_jax.training.rows import calibration_texts, taught_texts

_CHOICES = ("accuracy", "macro_f1")


@dataclasses.dataclass(frozen=True)
class Best:
    """The step with the best `value` of `metric` (lower is better for perplexity), after `tokens` real tokens; `stale`
    evaluations have followed it."""

    metric: str
    step: int
    value: float
    stale: int
    tokens: int = 0  # 0 in journals saved before this was recorded


def validation_steps(evaluation: EvalConfig, train: TrainConfig, rows: int, steps: int) -> frozenset[int]:
    """Numbers of updates after which a run is evaluated.

    Args:
        evaluation: `every` steps or `every_epochs` passes; with `best` the last step counts as well.
        train: gives the rows of an update.
        rows: rows of an epoch.
        steps: updates of the run.
    """
    every = evaluation.every or evaluation.every_epochs * rows / train.batch_size
    if not every:
        return frozenset()
    count = math.floor(steps / every + 1e-9)
    chosen = {min(steps, max(1, round(every * (index + 1)))) for index in range(count)}
    return frozenset(chosen | ({steps} if evaluation.best else set()))


def check_validation(config: Config, data: Data) -> None:
    """Refuses names that do not exist in the data, before anything is computed.

    Raises:
        InputError: an unknown task in `eval.tasks`, or a metric in `eval.best` that will not be measured.
    """
    known = [task.name for task in data.tasks]
    for name in config.eval.tasks:
        if name not in known:
            raise InputError(f"eval.tasks: {name} is no task of this run; it has {', '.join(known) or 'none'}")
    names = ["perplexity"] if data.text else []
    for task in data.tasks:
        if not config.eval.tasks or task.name in config.eval.tasks:
            names += [f"{task.name}.{metric}" for metric in (_CHOICES if task.labels else ROUGE)]
    if config.eval.best and config.eval.best not in names:
        raise InputError(f"eval.best: {config.eval.best} is not measured; expected one of {', '.join(names) or 'none'}")
    _say_flattered(config, data)


def _say_flattered(config: Config, data: Data) -> None:
    """One line for every measure that says too much of what a run exports."""
    chosen_on = config.eval.best.rpartition(".")[0]
    if chosen_on and not chosen_on.endswith(":validation"):
        has_split = chosen_on in OFFICIAL and "validation" in OFFICIAL[chosen_on].splits
        other = f"{chosen_on}:validation" if has_split else "a task of other rows"
        warnings.warn(
            f"eval.best: the test rows of {chosen_on} choose the best model, whose score on them is then too good; "
            f"give {other} in data.test as well and choose by that",
            stacklevel=3,
        )
    uses = {"prune.calibration": calibration_texts(config), "distill.text": taught_texts(config)}
    # A task or a mix may bring the text, so that the setting is empty.
    measured = data.report["text"]
    for setting, texts in uses.items():
        if data.text and measured in texts:
            warnings.warn(
                f"data.text {measured}: is {setting} too, so that the perplexity measured on it is too good; "
                "measure on another text",
                stacklevel=3,
            )


def metric_values(results: Mapping[str, Any]) -> dict[str, float]:
    """One number per metric: "perplexity", "TASK.accuracy", "TASK.rougeL", ..."""
    values = {"perplexity": results["perplexity"]["value"]} if "perplexity" in results else {}
    for name, task in results.get("tasks", {}).items():
        values |= {f"{name}.{metric}": task[metric] for metric in TITLES if metric in task}
    return values


def update_best(best: Best | None, metric: str, step: int, value: float, tokens: int) -> Best:
    """The best after one more evaluation; of equal values the earlier one is kept."""
    sign = -1 if metric == "perplexity" else 1
    if best is None or math.isnan(best.value) or sign * value > sign * best.value:
        return Best(metric, step, value, 0, tokens)
    return dataclasses.replace(best, stale=best.stale + 1)
