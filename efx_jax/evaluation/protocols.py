"""One task under one protocol: how answers are obtained from the model and scored."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from efx_jax.data.overlap import group_numbers
from efx_jax.data.tasks import Task
from efx_jax.data.tokenizer import Tokenizer, encode_continuations, encode_prompts
from efx_jax.errors import InputError
from efx_jax.evaluation.answers import check_readable, parse_answers
from efx_jax.evaluation.generation import check_room, generate_texts
from efx_jax.evaluation.results import reference_numbers, summarise, summarise_texts
from efx_jax.evaluation.rouge import ROUGE, check_rouge, rouge_scores
from efx_jax.evaluation.tasks import Normalize, check_task, label_scores
from efx_jax.lora import Adapters
from efx_jax.model.decoder import Params
from efx_jax.model.sampling import Sampling
from efx_jax.model.spec import ModelSpec

Array = jax.Array
ProtocolName = Literal["likelihood", "greedy", "sampled"]
AnswerRecord = dict[str, Any]

# The paper's settings; unlike the paper's code, this does not sample again (up to twice) if an answer is unreadable.
_SAMPLING = Sampling(temperature=0.9, top_k=50, top_p=0.9)


def evaluate_task(
    params: Params,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    task: Task,
    protocol: ProtocolName,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    batch_size: int = 16,
    compute_dtype: Any = None,
    runs: int = 4,
    seed: int = 0,
    normalize: Normalize = "sum",
) -> tuple[dict[str, Any], list[AnswerRecord]]:
    """Answers every row of a task and scores the answers.

    Args:
        params: parameter tree.
        spec: the model.
        tokenizer: the model's tokenizer.
        task: its rows, and its labels; without labels it is free text, scored by ROUGE.
        protocol: "likelihood": the label whose continuation is most likely (free text is generated greedily);
            "greedy": the label in the greedily decoded text; "sampled": the same in `runs` sampled texts (temperature
            0.9, top-k 50, top-p 0.9).
        adapters: LoRA adapters, or None.
        masks: name -> bool `[L,O,I]`, True = kept, or None; the exported function is evaluated.
        batch_size: rows per forward pass.
        compute_dtype: dtype of the matmul operands; sums are float32.
        runs: number of runs under "sampled"; the other protocols have one.
        seed: sampling seed, from which each run's own seed is derived.
        normalize: for "likelihood", see `label_scores`.

    Returns:
        The result (`describe_task` and `summarise` or `summarise_texts`), and a record for every run and row: task,
        run, row and group of rows that share a text (all from 0), origin, prompt, gold, answer, and depending on the
        task prediction (None: unreadable), scores (nats by label) or rouge1, rouge2, rougeL.

    Raises:
        InputError: any error of `check_protocol`, or scores that are not finite.
    """
    if task.labels and protocol == "likelihood":
        scores = label_scores(
            params,
            spec,
            tokenizer,
            task.test,
            task.labels,
            adapters,
            masks,
            batch_size=batch_size,
            compute_dtype=compute_dtype,
            normalize=normalize,
        )
        found, records = _likeliest(task, scores)
    else:
        texts = generate_texts(
            params,
            spec,
            tokenizer,
            task.test,
            _new_tokens(task, tokenizer),
            adapters,
            masks,
            batch_size=batch_size,
            compute_dtype=compute_dtype,
            sampling=_SAMPLING if protocol == "sampled" else None,
            seeds=_run_seeds(seed, runs),
        )
        found, records = _read(task, texts) if task.labels else _compared(task, texts)
    groups = group_numbers(task.test)
    records = [record | {"group": groups[record["row"]]} for record in records]
    return describe_task(task, protocol, runs, normalize) | found, records


def describe_task(task: Task, protocol: ProtocolName, runs: int, normalize: Normalize) -> dict[str, Any]:
    """What is known of a result before the model has answered, as a JSON-serialisable dictionary.

    The protocol actually used, the number of runs, `normalize` for likelihoods and `new_tokens` for generated answers
    (else None), the number of rows, how many were shortened and the share of their contexts that is left, a hash of
    their prompts and responses, and the task's note.
    """
    acting = "greedy" if protocol == "likelihood" and not task.labels else protocol
    rows = json.dumps([[example.prompt, example.response] for example in task.test])
    return {
        "protocol": acting,
        "runs": runs if protocol == "sampled" else 1,
        "normalize": normalize if acting == "likelihood" else None,
        "new_tokens": None if acting == "likelihood" else task.new_tokens,
        "rows": len(task.test),
        "shortened": task.shortened,
        "context_kept": task.context_kept,
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "note": task.note,
    }


def check_protocol(spec: ModelSpec, tokenizer: Tokenizer, task: Task, protocol: ProtocolName) -> None:
    """Refuses what `evaluate_task` would refuse, before anything is computed.

    Raises:
        InputError: no rows, a response that is not a label, a prompt that is empty or leaves no room for an answer in
            the model's context, labels that cannot be told apart, or free text that rouge-score cannot score.
    """
    if task.labels:
        reference_numbers(task.test, task.labels)
    elif not task.test:
        raise InputError(f"task {task.name}: expected at least one test row, found none")
    if task.labels and protocol == "likelihood":
        check_task(spec, tokenizer, task.test, task.labels)
        return
    if task.labels:
        check_readable(task.labels)
    else:
        check_rouge([example.response for example in task.test])
    prompts = encode_prompts([example.prompt for example in task.test], tokenizer)
    check_room(prompts, task.test, spec, _new_tokens(task, tokenizer))


def _new_tokens(task: Task, tokenizer: Tokenizer) -> int:
    """Maximum tokens of a generated answer: at least those of the longest label, so that every label can be given."""
    return max([task.new_tokens, *map(len, encode_continuations(task.labels, tokenizer))])


def _run_seeds(seed: int, runs: int) -> list[int]:
    return [int(state) for state in np.random.SeedSequence(seed).generate_state(runs)]


def _likeliest(task: Task, scores: np.ndarray) -> tuple[dict[str, Any], list[AnswerRecord]]:
    chosen = scores.argmax(axis=1)
    labels = [label.strip() for label in task.labels]
    records = [
        _record(task, 0, row, labels[choice])
        | {"prediction": labels[choice], "scores": dict(zip(labels, map(float, line), strict=True))}
        for row, (choice, line) in enumerate(zip(chosen, scores, strict=True))
    ]
    return summarise(chosen, task.test, task.labels), records


def _read(task: Task, texts: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[AnswerRecord]]:
    predicted = np.stack([parse_answers(run, task.labels) for run in texts])
    records = [
        _record(task, run, row, text)
        | {"prediction": None if predicted[run, row] == -1 else task.labels[predicted[run, row]].strip()}
        for run, answers in enumerate(texts)
        for row, text in enumerate(answers)
    ]
    return summarise(predicted, task.test, task.labels), records


def _compared(task: Task, texts: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[AnswerRecord]]:
    wanted = [example.response.strip() for example in task.test]
    scores = np.stack([rouge_scores(run, wanted) for run in texts])
    records = [
        _record(task, run, row, text) | dict(zip(ROUGE, scores[run, row].tolist(), strict=True))
        for run, answers in enumerate(texts)
        for row, text in enumerate(answers)
    ]
    return summarise_texts(scores, task.test), records


def _record(task: Task, run: int, row: int, answer: str) -> AnswerRecord:
    example = task.test[row]
    return {
        "task": task.name,
        "run": run,
        "row": row,
        "origin": example.origin,
        "prompt": example.prompt,
        "gold": example.response.strip(),
        "answer": answer,
    }
