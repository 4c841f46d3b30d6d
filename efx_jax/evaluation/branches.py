"""All answers to many prompts as token trees: a prefix that several sequences share is computed once.

A prompt with its answers is a tree, and so are prompts with a common prefix, such as a contract with 17 hypotheses. A
tree is laid out in pre-order: a token's descendants come right after it, and it is visible up to the last of them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.data.tokenizer import Tokenizer, encode_continuations, end_of
from efx_jax.errors import InputError
from efx_jax.evaluation.likelihood import score_rows, target_log_probabilities
from efx_jax.lora import Adapters
from efx_jax.model.decoder import Params, head_weight, hidden_states
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import from_bits, to_bits
from efx_jax.parallel.partition import constrain

Array = jax.Array

# Attention is computed over all earlier tokens, including masked ones of other branches. A tree is capped at twice the
# length of its first prompt, where savings from sharing and the cost of masked tokens balance, but never below this.
_SMALLEST_CAP = 512
_LEAST_SHARED = 16  # tokens; for shorter prefixes, trees of different sizes cost more than they save


@dataclasses.dataclass(frozen=True)
class Tree:
    """The N distinct prefixes of a group of sequences, each as its last token, and the Q tokens that are scored.

    `tokens`, `positions` (tokens before it in its sequence) and `ends` (place after its last descendant): int32 [N].
    Logits are needed for P tokens, at `places` int32 [P]; token `targets[q]` is predicted at `places[sources[q]]` and
    counts for answer `answers[q]` of row `rows[q]`: int32 [Q].
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    places: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    answers: np.ndarray


def encode_labels(labels: Sequence[str], tokenizer: Tokenizer, end: str = "") -> list[list[int]]:
    """Token ids of the answers; if one is a prefix of another, all get their end, or the shorter would always win.

    Args:
        labels: the answers, each with its separator.
        tokenizer: the model's.
        end: text of the token that ends a response, "" for the end of sequence (`efx_jax.data.prompts.Example.end`).

    Raises:
        InputError: answers that tokenise to nothing or identically, or that need an end when there is none.
    """
    encoded = encode_continuations(labels, tokenizer)
    for number, (label, ids) in enumerate(zip(labels, encoded, strict=True)):
        if not ids or ids in encoded[:number]:
            found = "no tokens" if not ids else "the tokens of another answer"
            raise InputError(f"answer {label!r}: expected tokens of its own, found {found}; change the answers")
    overlapping = any(a != b and b[: len(a)] == a for a in encoded for b in encoded)
    if not overlapping:
        return encoded
    closing = end_of(end, tokenizer)
    if not closing:
        raise InputError(
            f"answers {', '.join(map(repr, labels))}: one begins with another, and the tokenizer has no token that "
            "ends an answer; set its eos_token, or change the answers"
        )
    return [ids + closing for ids in encoded]


def group_rows(prompts: Sequence[list[int]], answer_tokens: int) -> list[list[int]]:
    """Groups rows by prompt prefix: in sorted order, a row joins the one before it if they share half of its tokens.

    Args:
        prompts: token ids of every row's prompt.
        answer_tokens: tokens that the answers add after a prompt.

    Returns:
        Row numbers; a group's tree has at most twice the tokens of its first prompt, or 512 if that is more, unless a
        single row is longer.
    """
    groups: list[list[int]] = []
    size = cap = 0
    for row in sorted(range(len(prompts)), key=lambda row: prompts[row]):
        shared = _shared(prompts[groups[-1][-1]], prompts[row]) if groups else 0
        added = len(prompts[row]) - shared + answer_tokens
        if shared >= max(_LEAST_SHARED, len(prompts[row]) / 2) and size + added <= cap:
            groups[-1].append(row)
            size += added
        else:
            groups.append([row])
            size = len(prompts[row]) + answer_tokens
            cap = max(_SMALLEST_CAP, 2 * len(prompts[row]))
    return groups


def grow_tree(rows: Sequence[int], prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Tree:
    """The tree of the given rows' prompts, each with every answer (whose last token is never an input)."""
    sequences = sorted(([*prompts[row], *ids[:-1]], row, answer) for row in rows for answer, ids in enumerate(labels))
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    path: list[int] = []  # places of the tokens of the last sequence
    scored: list[tuple[int, int, int, int]] = []
    previous: Sequence[int] = ()
    for sequence, row, answer in sequences:
        shared = _shared(previous, sequence)
        for place in path[shared:]:
            ends[place] = len(tokens)
        added = range(shared, len(sequence))
        path[shared:] = range(len(tokens), len(tokens) + len(added))
        tokens += sequence[shared:]
        positions += added
        ends += [0] * len(added)
        predicting = path[len(prompts[row]) - 1 :]
        scored += [(place, token, row, answer) for place, token in zip(predicting, labels[answer], strict=True)]
        previous = sequence
    for place in path:
        ends[place] = len(tokens)
    predictors, targets, owners, answers = np.asarray(scored, np.int32).T
    places, sources = np.unique(predictors, return_inverse=True)
    return Tree(
        tokens=np.asarray(tokens, np.int32),
        positions=np.asarray(positions, np.int32),
        ends=np.asarray(ends, np.int32),
        places=places,
        sources=sources.astype(np.int32),
        targets=targets,
        rows=owners,
        answers=answers,
    )


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix, in tokens."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def tree_batch(trees: Sequence[Tree], batch_size: int, length: int, places: int, targets: int) -> dict[str, np.ndarray]:
    """Trees as rows of int32 arrays, padded with tokens that nothing attends to and targets whose scores are ignored.

    Returns:
        `tokens`, `positions`, `ends` `[B,length]`; `places` `[B,places]`; `sources`, `targets` `[B,targets]`.
    """
    ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (batch_size, 1))
    return {
        "tokens": _rows([tree.tokens for tree in trees], np.zeros((batch_size, length), np.int32)),
        "positions": _rows([tree.positions for tree in trees], np.zeros((batch_size, length), np.int32)),
        "ends": _rows([tree.ends for tree in trees], ends),
        "places": _rows([tree.places for tree in trees], np.zeros((batch_size, places), np.int32)),
        "sources": _rows([tree.sources for tree in trees], np.zeros((batch_size, targets), np.int32)),
        "targets": _rows([tree.targets for tree in trees], np.zeros((batch_size, targets), np.int32)),
    }


def _rows(arrays: Sequence[np.ndarray], filling: np.ndarray) -> np.ndarray:
    for row, values in zip(filling, arrays, strict=False):
        row[: len(values)] = values
    return filling


@functools.partial(jax.jit, static_argnames=("spec", "compute_dtype"))
def tree_scores(
    params: Params,
    batch: dict[str, Array],
    spec: ModelSpec,
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    compute_dtype: Any,
) -> Array:
    """Log-probabilities of the targets, float32 `[B,Q]`; the output head runs only at places that predict a target."""

    def score(batch: dict[str, Array]) -> Array:
        hidden = hidden_states(
            params,
            batch["tokens"],
            spec,
            adapters,
            masks,
            positions=batch["positions"],
            ends=batch["ends"],
            compute_dtype=compute_dtype,
            frozen=True,
        )
        chosen = jnp.take_along_axis(to_bits(hidden), batch["places"][:, :, None], axis=1)
        states = from_bits(chosen, hidden.dtype)
        return target_log_probabilities(states, head_weight(params), batch["sources"], batch["targets"], compute_dtype)

    return constrain(score_rows(score, batch, masks))
