"""Tasks with a fixed set of answers, scored by likelihood: the prediction is the most likely continuation.

Nothing is generated and nothing is parsed, so no answer is ever unreadable.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from efx_jax.data.batches import bucket_length, up_to_multiple
from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import Tokenizer, encode_prompts
from efx_jax.errors import InputError
from efx_jax.evaluation.branches import Tree, encode_labels, group_rows, grow_tree, tree_batch, tree_scores
from efx_jax.evaluation.generation import check_room
from efx_jax.lora import Adapters
from efx_jax.model.decoder import Params
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import divisible_rows

Array = jax.Array
Normalize = Literal["sum", "mean"]


def label_scores(
    params: Params,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: Sequence[str],
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    batch_size: int = 16,
    compute_dtype: Any = None,
    normalize: Normalize = "sum",
) -> np.ndarray:
    """Log-likelihood of every answer after every prompt; the prediction is its argmax.

    Args:
        params: parameter tree.
        spec: the model.
        tokenizer: the model's tokenizer; prompts and answers are tokenised as in training.
        examples: the rows; their prompts are used.
        labels: the C answers, each with the separator that the responses carry (" yes").
        adapters: LoRA adapters, or None.
        masks: name -> bool `[L,O,I]`, True = kept, or None; the exported function is evaluated.
        batch_size: rows per forward pass; they are sorted by length. Rows whose prompts share a prefix are computed
            together, and the prefix only once (see `efx_jax.evaluation.branches`).
        compute_dtype: dtype of the matmul operands; sums are float32.
        normalize: "sum" of the answer's token log-probabilities (a proper probability of the string), or their
            "mean", which favours long answers. The end of a response is scored only if one answer is a prefix of
            another.

    Returns:
        float32 `[rows,C]`, in the order of `examples`.

    Raises:
        InputError: an empty or over-long prompt (with its row), answers that tokenise to nothing or identically, or
            scores that are not finite (an argmax over NaN would pass for an answer).
    """
    prompts, answers = _checked(spec, tokenizer, examples, labels)
    trees = [grow_tree(rows, prompts, answers) for rows in group_rows(prompts, sum(len(ids) - 1 for ids in answers))]
    # The number of trees that hold `batch_size` rows on average.
    size = divisible_rows(max(1, round(batch_size * len(trees) / max(1, len(prompts)))))
    scores = np.zeros((len(prompts), len(labels)))
    for chosen, batch in _batches(trees, answers, size):
        found = np.asarray(tree_scores(params, batch, spec, adapters, masks, compute_dtype))
        for tree, line in zip(chosen, found, strict=False):
            np.add.at(scores, (tree.rows, tree.answers), line[: len(tree.targets)])
    if normalize == "mean":
        scores /= [len(ids) for ids in answers]
    if not np.isfinite(scores).all():
        raise InputError("task scores are not finite: the model overflows; check its weights or take another dtype")
    return scores.astype(np.float32)


def _batches(
    trees: Sequence[Tree], answers: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[Tree], dict[str, np.ndarray]]]:
    """Batches of trees sorted by size, and their arrays, which have few different shapes."""
    ordered = sorted(trees, key=lambda tree: len(tree.tokens))
    targets = sum(map(len, answers))
    places = targets - len(answers) + 1
    most = max((len(tree.targets) for tree in trees), default=0) // targets
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        length = _padded_length(len(chosen[-1].tokens), len(ordered[-1].tokens))
        rows = bucket_length([len(tree.targets) // targets for tree in chosen], most, multiple=1)
        yield chosen, tree_batch(chosen, batch_size, length, places * rows, targets * rows)


def _padded_length(tokens: int, longest: int) -> int:
    """A padded length for `tokens`, longer by less than a quarter or by at most 31: padding costs as much as text."""
    step = max(32, 1 << max(0, (tokens - 1).bit_length() - 3))
    return min(up_to_multiple(tokens, step), up_to_multiple(longest, 8))


def check_task(spec: ModelSpec, tokenizer: Tokenizer, examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Refuses what `label_scores` would refuse, before anything is computed.

    Raises:
        InputError: an empty or over-long prompt (with its row), or answers that tokenise to nothing or identically.
    """
    _checked(spec, tokenizer, examples, labels)


def _checked(
    spec: ModelSpec, tokenizer: Tokenizer, examples: Sequence[Example], labels: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    prompts = encode_prompts([example.prompt for example in examples], tokenizer)
    answers = encode_labels(labels, tokenizer, next((example.end for example in examples), ""))
    # The last token of an answer is never an input.
    check_room(prompts, examples, spec, max(len(ids) - 1 for ids in answers))
    return prompts, answers
