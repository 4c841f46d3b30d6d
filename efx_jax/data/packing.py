"""Several short sequences in one row: exact, since attention stays inside a segment and positions restart at 0."""

import functools
from collections.abc import Sequence

import numpy as np

from efx_jax.data.batches import ALL_ROWS, Batch, group_by_length, up_to_multiple
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.model.cudnn_attention import MAX_RUNS

_OPEN = 64  # rows open for filling at once; more would pack a little tighter but lengthen the search per sequence
_MOST = MAX_RUNS - 1  # maximum sequences per row: what cuDNN takes besides the padding


def pack_epoch(sizes: Sequence[int], seed: int, epoch: int, length: int) -> list[list[int]]:
    """Best-fit packing of one epoch's permutation, with the rows in the order in which they were begun.

    Ordered by when rows fill, long sequences would come first and a one-epoch run would see its short ones late: text
    that fills whole rows, say, before the rows of a task.

    Args:
        sizes: inputs of every sequence, in tokens.
        seed: the run's seed.
        epoch: number of the epoch; its permutation is `default_rng([seed, epoch])`'s.
        length: tokens per row.

    Returns:
        The rows, each a list of fewer than `MAX_RUNS` sequence numbers; every sequence is in exactly one.

    Raises:
        InputError: a sequence longer than `length`.
    """
    longest = max(sizes, default=0)
    if longest > length:
        raise InputError(f"packing: expected sequences of at most {length} inputs, found {longest}")
    rows: list[list[int]] = []
    spaces: dict[int, int] = {}  # of the rows that may still be filled
    for sequence in np.random.default_rng([seed, epoch]).permutation(len(sizes)):
        size = sizes[sequence]
        fitting = [row for row, space in spaces.items() if space >= size and len(rows[row]) < _MOST]
        if not fitting:
            if len(spaces) == _OPEN:
                del spaces[min(spaces, key=lambda row: spaces[row])]
            fitting = [len(rows)]
            rows.append([])
            spaces[len(rows) - 1] = length
        best = min(fitting, key=lambda row: spaces[row])
        rows[best].append(int(sequence))
        spaces[best] -= size
    return rows


@functools.lru_cache(maxsize=2)
def _epoch_rows(sizes: tuple[int, ...], seed: int, epoch: int, length: int) -> list[list[int]]:
    return pack_epoch(sizes, seed, epoch, length)


@functools.cache  # every batch counts from epoch 0, so no count may be evicted
def _row_count(sizes: tuple[int, ...], seed: int, epoch: int, length: int) -> int:
    """Rows of an epoch (epochs differ). Cached apart from the rows, so that no batch packs a past epoch again."""
    return len(_epoch_rows(sizes, seed, epoch, length))


def packed_rows(examples: Sequence[Tokenized], seed: int, length: int) -> int:
    """Rows of the first epoch, which define an epoch for the setting `epochs`."""
    return len(pack_epoch(_sizes(examples), seed, 0, length))


def packed_batch(
    examples: Sequence[Tokenized],
    seed: int,
    n: int,
    batch_size: int,
    length: int,
    multiple: int | None = None,
    rows: slice = ALL_ROWS,
) -> Batch:
    """Batch n of packed training, a pure function of its arguments.

    The batches walk through the rows of epoch 0, then of epoch 1, and so on; a batch may cross from one to the next.

    Args:
        examples: all training sequences.
        seed: the run's seed.
        n: number of the batch, from 0.
        batch_size: B rows.
        length: maximum tokens packed into a row.
        multiple: None: T is `length`. A number: rows filled to a similar length share a batch (`group_by_length`), and
            T is its fullest row rounded up to this multiple; this pays if few sequences are short enough to fill gaps.
        rows: which rows of the batch to lay out, for a host that needs only its own; T is the whole batch's.

    Returns:
        `tokens`, `targets`, `positions`, `segments` int32 `[B,T]`, `weights` float32 `[B,T]`, `lengths` int32 `[B]`.
        Segments count from 1 in every row, padding is -1 (see `efx_jax.model.attention.attention`).

    Raises:
        InputError: no examples, or one longer than `length`.
    """
    if not examples:
        raise InputError("training data: expected at least one example, found none")
    sizes = _sizes(examples)
    chosen: list[list[int]] = []
    epoch, first = 0, 0
    while first + (count := _row_count(sizes, seed, epoch, length)) <= n * batch_size:
        epoch, first = epoch + 1, first + count
    while len(chosen) < batch_size:
        packed = _epoch_rows(sizes, seed, epoch, length)
        order = np.arange(len(packed))
        if multiple is not None:
            fill = np.asarray([_fill(sizes, row) for row in packed])
            order = group_by_length(order, fill, batch_size, -first % batch_size, seed, epoch)
        start = max(n * batch_size - first, 0)
        chosen += [packed[row] for row in order[start : start + batch_size - len(chosen)]]
        epoch, first = epoch + 1, first + len(packed)
    if multiple is not None:
        length = up_to_multiple(max(_fill(sizes, row) for row in chosen), multiple)
    return _lay_out(examples, chosen[rows], length)


def _fill(sizes: Sequence[int], row: Sequence[int]) -> int:
    return sum(sizes[sequence] for sequence in row)


def _sizes(examples: Sequence[Tokenized]) -> tuple[int, ...]:
    return tuple(len(example.tokens) - 1 for example in examples)


def _lay_out(examples: Sequence[Tokenized], rows: Sequence[Sequence[int]], length: int) -> Batch:
    shape = (len(rows), length)
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions")}
    batch["segments"] = np.full(shape, -1, np.int32)
    batch["weights"] = np.zeros(shape, np.float32)
    batch["lengths"] = np.zeros(len(rows), np.int32)
    for row, sequences in enumerate(rows):
        start = 0
        for segment, number in enumerate(sequences, start=1):
            example = examples[number]
            place = slice(start, start + len(example.tokens) - 1)
            batch["tokens"][row, place] = example.tokens[:-1]
            batch["targets"][row, place] = example.tokens[1:]
            batch["weights"][row, place] = example.loss[1:]
            batch["positions"][row, place] = np.arange(len(example.tokens) - 1)
            batch["segments"][row, place] = segment
            start = place.stop
        batch["lengths"][row] = start
    return batch
