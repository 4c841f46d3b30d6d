"""How good a model is: perplexity and task scores, the table of a run, and where the zeros are."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.config import Config
from efx_jax.evaluation.perplexity import perplexity
from efx_jax.evaluation.protocols import evaluate_task
from efx_jax.evaluation.results import TITLES, interval_cell, markdown_table, metric_cell
from efx_jax.lora import Adapters
from efx_jax.parallel.partition import constrain
from efx_jax.training.prepare import Prepared
from efx_jax.training.samples import kept_answers, rows_shown, written_answers

Array = jax.Array


def measure(
    config: Config,
    prepared: Prepared,
    params: Mapping[str, Any],
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Perplexity of the held-out text and the scores of the tasks, with 95 % intervals, and some of the answers.

    {} if there is neither text nor task.

    Args:
        config: the settings.
        prepared: text and tasks.
        params: parameter tree.
        adapters: LoRA adapters, or None.
        masks: what is kept, or None; either way the function measured is the one that would be exported.
        names: the tasks to measure; none means all.
    """
    results: dict[str, Any] = {}
    dtype = config.model.compute_dtype
    if prepared.windows:
        # Windows are longer than task rows; a quarter as many make a batch of about the same size.
        batch = max(1, config.eval.batch_size // 4)
        found = perplexity(
            params, prepared.windows, prepared.spec, adapters, masks, batch_size=batch, compute_dtype=dtype
        )
        ends = list(found.interval) if found.interval else None
        results["perplexity"] = {"value": found.value, "interval": ends, "tokens": found.tokens}
    shown = rows_shown(prepared.data.tasks, config.eval.samples)
    for task in (task for task in prepared.data.tasks if not names or task.name in names):
        results.setdefault("tasks", {})[task.name], records = evaluate_task(
            params,
            prepared.spec,
            prepared.tokenizer,
            task,
            config.eval.protocol,
            adapters,
            masks,
            batch_size=config.eval.batch_size,
            compute_dtype=dtype,
            runs=config.eval.runs,
            seed=config.seed,
        )
        if shown[task.name]:
            results.setdefault("samples", {})[task.name] = kept_answers(records, shown[task.name])
    written = written_answers(config, prepared, params, adapters, masks)
    return results | ({"samples": written} if written else {})


def measure_start(config: Config, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Measures what a run starts with, by name: the base and, if there is one, the base with its starting adapter."""
    results = {"base": measure(config, prepared, prepared.params)}
    if prepared.adapters is not None:
        results["base with adapter"] = measure(config, prepared, prepared.params, prepared.adapters)
    return results


def matrix_sparsity(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[float]]:
    """Share of the entries of every linear of every layer that are exactly zero or were cut out: name -> L numbers.

    Args:
        params: the parameter tree.
        shapes: (O, I) of the linears of the base model.
    """
    found = {}
    for name, (out_dim, in_dim) in shapes.items():
        leaf = params["layers"][name]
        gone = out_dim * in_dim - leaf.shape[1] * leaf.shape[2]
        found[name] = [(gone + int(zeros)) / (out_dim * in_dim) for zeros in np.asarray(_zeros(leaf))]
    return found


@jax.jit
def _zeros(stacked: Array) -> Array:
    """Number of zeros of each layer, int32 `[L]`, of a stacked matrix `[L,O,I]`."""
    return constrain(jnp.sum(stacked == 0, axis=(1, 2), dtype=jnp.int32))


def result_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with a row per measured model: numbers as value [95 % interval], task scores in percent."""
    tasks = {name: task for found in results.values() for name, task in found.get("tasks", {}).items()}
    columns = [(name, metric) for name, task in tasks.items() for metric in TITLES if metric in task]
    titles = [TITLES[metric] if len(tasks) == 1 else f"{name} {TITLES[metric]}" for name, metric in columns]
    rows = []
    for name, found in results.items():
        text = found.get("perplexity")
        cells = [_perplexity_cell(text) if text else "-"]
        for task, metric in columns:
            scores = found.get("tasks", {}).get(task)
            cells.append(metric_cell(scores, metric) if scores else "-")
        rows.append([name, *cells])
    return markdown_table(["model", "perplexity", *titles], rows)


def rows_table(report: Mapping[str, Any]) -> str:
    """A Markdown table of the rows that each task trains on and is scored on, from `Data.report`.

    `shared` training rows are also test rows, and are left out; `repeated` ones are reused because a label has too few.
    `scored` counts the test rows that are used, `shortened` those of them that were too long. A line below counts the
    training rows that were shortened.
    """
    columns, counted = ("asked", "found", "shared", "drawn", "repeated"), ("rows", "scored", "shortened")
    header = ["task", *columns, "learned by label", "test rows", *counted[1:]]
    rows = []
    learned, tested = report["train"].get("tasks", {}), report["test"]
    for name in learned | tested:
        counts, test = learned.get(name, {}), tested.get(name, {})
        labels = ", ".join(f"{label} {found['drawn']}" for label, found in counts.get("labels", {}).items())
        cells = [str(counts.get(column, "")) for column in columns]
        rows.append([name, *cells, labels, *(str(test.get(column, "")) for column in counted)])
    train = report["train"]
    note = f"{train['shortened']:,} of {train['rows']:,} training rows are shortened to fit."
    return f"{markdown_table(header, rows)}\n\n{note}"


def sparsity_table(sparsity: Mapping[str, list[float]], title: str = "zeros %") -> str:
    """A Markdown table: the overall share of zeros in every kind of matrix, and its range over the layers."""
    rows = []
    for name, layers in sparsity.items():
        shares = (sum(layers) / len(layers), min(layers), max(layers))
        rows.append([name, *(f"{100 * share:.2f}" for share in shares)])
    return markdown_table(["matrix", title, "least layer", "most layer"], rows)


def _perplexity_cell(text: Mapping[str, Any]) -> str:
    if text["value"] is None:  # as JSON holds what is not finite
        return "not finite"
    return f"{text['value']:.2f}{interval_cell(text['interval'], 2)}"
