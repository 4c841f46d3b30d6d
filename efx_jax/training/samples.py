"""Answers for a person to read: a few rows of every task, as answered by every measured model of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from efx_jax.analysis.record import HELD_OUT
from efx_jax.config import Config
from efx_jax.data.tasks import UNSCORED_ANSWER, Task
from efx_jax.data.tokenizer import encode_prompts
from efx_jax.evaluation.generation import generate_texts
from efx_jax.evaluation.protocols import AnswerRecord
from efx_jax.evaluation.rouge import ROUGE
from efx_jax.files import atomic_write
from efx_jax.lora import Adapters
from efx_jax.training.prepare import Prepared

_LONGEST = ROUGE[-1]


def tasks_shown(config: Config, prepared: Prepared) -> tuple[Task, ...]:
    """The tasks whose answers are kept: those that are scored or, if there are none, the held-out rows as free text.

    Of the held-out rows, at most `eval.samples` whose prompts leave room for an answer; none of them are scored.
    """
    rows, limit = prepared.data.held_out, config.data.max_length
    if prepared.data.tasks or not config.eval.samples or not rows:
        return prepared.data.tasks
    limit = min(limit, prepared.spec.max_position_embeddings - UNSCORED_ANSWER)
    chosen = []
    for example in rows:
        if 0 < len(encode_prompts([example.prompt], prepared.tokenizer)[0]) <= limit:
            chosen.append(example)
        if len(chosen) == config.eval.samples:
            break
    return (Task(HELD_OUT, chosen, (), UNSCORED_ANSWER),) if chosen else ()


def written_answers(
    config: Config,
    prepared: Prepared,
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, jax.Array] | None,
) -> dict[str, list[dict[str, Any]]]:
    """What the model generates, greedily, after the held-out prompts of a run without tasks; {} for any other run.

    Args:
        config: the settings.
        prepared: the rows.
        params: parameter tree.
        adapters: LoRA adapters, or None.
        masks: what is kept, or None.
    """
    if prepared.data.tasks:
        return {}
    return {
        task.name: [
            {"answer": answer}
            for answer in generate_texts(
                params,
                prepared.spec,
                prepared.tokenizer,
                task.test,
                task.new_tokens,
                adapters,
                masks,
                batch_size=config.eval.batch_size,
                compute_dtype=config.model.compute_dtype,
            )[0]
        ]
        for task in tasks_shown(config, prepared)
    }


def rows_shown(tasks: Sequence[Task], count: int) -> dict[str, int]:
    """How many of the first rows of every task are kept, `count` in all: spread evenly as far as tasks have rows."""
    shown = {task.name: 0 for task in tasks}
    left = count
    while left:
        open_tasks = [task for task in tasks if shown[task.name] < len(task.test)]
        if not open_tasks:
            break
        for task in open_tasks[:left]:
            shown[task.name] += 1
        left -= min(left, len(open_tasks))
    return shown


def kept_answers(records: Sequence[AnswerRecord], rows: int) -> list[dict[str, Any]]:
    """The first run's answers to the first `rows` rows of a task, without what all models have in common.

    Args:
        records: what `evaluate_task` returns.
        rows: how many.

    Returns:
        A dictionary per row: `answer`; with labels `prediction` (None: unreadable), under the protocol "likelihood"
        also `margin`, the nats by which the likeliest label beats the next; for free text `rougeL`.
    """
    return [_kept(record) for record in records if record["run"] == 0 and record["row"] < rows]


def write_samples(path: Path, tasks: Sequence[Task], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes samples.jsonl: a line per row with task, row, origin, prompt, gold and `answers` of every model.

    Args:
        path: the file; not created if there are no answers.
        tasks: the rows.
        results: by model, what `measure` returns.

    Raises:
        InputError: the disk is full or the place is not writable.
    """
    answers = {model: found["samples"] for model, found in results.items() if "samples" in found}
    lines = []
    for task in tasks:
        of_task = {model: found[task.name] for model, found in answers.items() if task.name in found}
        for row, example in enumerate(task.test[: max(map(len, of_task.values()), default=0)]):
            line = {
                "task": task.name,
                "row": row,
                "origin": example.origin,
                "prompt": example.prompt,
                "gold": example.response.strip(),
                "answers": {model: found[row] for model, found in of_task.items() if row < len(found)},
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if lines:
        atomic_write(path, "".join(lines))


def _kept(record: AnswerRecord) -> dict[str, Any]:
    kept = {name: record[name] for name in ("answer", "prediction", _LONGEST) if name in record}
    if "scores" in record:
        first, *others = sorted(record["scores"].values(), reverse=True)
        kept["margin"] = first - others[0] if others else None
    return kept
