"""Batches as pure functions of (seed, n): resuming at step n needs no saved reader state."""

from collections.abc import Iterator, Sequence

import numpy as np

from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError

Batch = dict[str, np.ndarray]

_MULTIPLE = 32
ATTENTION_MULTIPLE = 128  # tokens; GPU attention kernels work best on multiples of this
_CHUNK = 64  # batches whose sequences are sorted together; a larger chunk pads a little less and mixes a little less
ALL_ROWS = slice(None)


def bucket_length(lengths: Sequence[int] | np.ndarray, max_length: int, multiple: int = _MULTIPLE) -> int:
    """The padded length of a batch, chosen from a small set of values so that few shapes compile.

    Values are `multiple` times 1, 2, 3, 4, 6, 8, 12, 16, ... (powers of two and the midpoints between them), capped at
    `max_length` rounded up to a multiple.

    Args:
        lengths: tokens of each sequence of the batch.
        max_length: the longest sequence that any batch may hold, in tokens.
        multiple: granularity in tokens; 128 suits GPU attention kernels.
    """
    units = max(1, -(-int(max(lengths)) // multiple))
    power = 1 << (units - 1).bit_length()
    rounded = power * 3 // 4 if units <= power * 3 // 4 else power
    return multiple * max(units, min(rounded, -(-max_length // multiple)))


def up_to_multiple(length: int, multiple: int) -> int:
    """The smallest positive multiple of `multiple` that holds `length` tokens."""
    return multiple * max(1, -(-length // multiple))


def rows_within_budget(batch_size: int, length: int, token_budget: int, shards: int = 1) -> int:
    """Rows per forward pass: the largest divisor of the batch size within the token budget.

    Args:
        batch_size: B, rows of the batch over all devices.
        length: T, tokens per row.
        token_budget: maximum rows x T of a pass over all devices, padding included; this bounds the memory.
        shards: parts into which the devices split the rows of a pass; the row count must be a multiple of it.

    Returns:
        A divisor of B and a multiple of `shards`; `shards` itself if even that exceeds the budget.

    Raises:
        InputError: `shards` does not divide the batch size.
    """
    if batch_size % shards:
        raise InputError(f"batch: expected a size that {shards} shards divide, found {batch_size}")
    fitting = [rows for rows in range(shards, batch_size + 1, shards) if rows * length <= token_budget]
    return max((rows for rows in fitting if batch_size % rows == 0), default=shards)


def batch_rows(count: int, seed: int, n: int, batch_size: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Row numbers int64 [B] of batch n: positions n B ... n B + B - 1 of the endless concatenation of epochs.

    Epoch e is the permutation that `default_rng([seed, e])` draws; if `lengths` [count] is given, `group_by_length`
    rearranges it. A batch that crosses the end of an epoch continues with the next epoch's permutation: within an
    epoch every row occurs exactly once.
    """
    positions = np.arange(n * batch_size, (n + 1) * batch_size)
    epochs, offsets = positions // count, positions % count
    orders = {int(epoch): np.random.default_rng([seed, epoch]).permutation(count) for epoch in np.unique(epochs)}
    if lengths is not None:
        for epoch, order in orders.items():
            orders[epoch] = group_by_length(order, lengths, batch_size, -epoch * count % batch_size, seed, epoch)
    return np.asarray([orders[int(epoch)][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, skip: int, seed: int, epoch: int
) -> np.ndarray:
    """An epoch's order rearranged so that the rows of a batch have similar lengths and the batches stay shuffled.

    Args:
        order: row numbers [count], shuffled.
        lengths: tokens of every row, by row number.
        batch_size: B.
        skip: rows at the start of the epoch that complete a batch begun in the previous epoch; these, and the tail
            that begins a batch completed in the next epoch, keep their places.
        seed: the run's seed.
        epoch: number of the epoch.

    Returns:
        The same row numbers: each chunk of 64 batches is sorted by length and cut into batches, which are shuffled.
    """
    end = skip + max(0, len(order) - skip) // batch_size * batch_size
    pieces = [order[:skip]]
    for number, start in enumerate(range(skip, end, _CHUNK * batch_size), start=1):
        chunk = order[start : min(start + _CHUNK * batch_size, end)]
        batches = chunk[np.argsort(lengths[chunk], kind="stable")].reshape(-1, batch_size)
        # `number` starts at 1: numpy draws the same from [seed, epoch, 0] as from [seed, epoch].
        pieces.append(np.random.default_rng([seed, epoch, number]).permutation(batches).ravel())
    return np.concatenate([*pieces, order[end:]])


def make_batch(
    examples: Sequence[Tokenized],
    seed: int,
    n: int,
    batch_size: int,
    length: int | None = None,
    rows: slice = ALL_ROWS,
) -> Batch:
    """Batch n of training, a pure function of its arguments.

    Args:
        examples: all training sequences.
        seed: the run's seed.
        n: number of the batch, from 0.
        batch_size: B.
        length: T; None takes `bucket_length` of this batch.
        rows: which rows of the batch to lay out, for a host that needs only its own; T is the whole batch's.

    Returns:
        `tokens` int32 [B,T] (inputs), `targets` int32 [B,T] (the next token, already shifted), `weights` float32
        [B,T] (1 where the target carries loss, 0 elsewhere and on padding), `lengths` int32 [B] (inputs per row).

    Raises:
        InputError: there are no examples, or a row is longer than `length`.
    """
    _refuse_nothing(examples)
    chosen = batch_rows(len(examples), seed, n, batch_size)
    if length is None:
        longest = max(len(example.tokens) for example in examples) - 1
        length = bucket_length([len(examples[row].tokens) - 1 for row in chosen], longest)
    return _lay_out(examples, chosen[rows], length)


def bucketed_batch(
    examples: Sequence[Tokenized],
    seed: int,
    n: int,
    batch_size: int,
    multiple: int = ATTENTION_MULTIPLE,
    rows: slice = ALL_ROWS,
) -> Batch:
    """Batch n of training on sequences of similar length, a pure function of its arguments.

    Like `make_batch`, except that an epoch is rearranged by `group_by_length` and T is the longest row of the batch
    rounded up to a multiple, so that there is little padding and few shapes compile.

    Args:
        examples: all training sequences.
        seed: the run's seed.
        n: number of the batch, from 0.
        batch_size: B.
        multiple: granularity of T in tokens.
        rows: which rows of the batch to lay out; T is the whole batch's.

    Raises:
        InputError: no examples.
    """
    _refuse_nothing(examples)
    lengths = np.asarray([len(example.tokens) - 1 for example in examples])
    chosen = batch_rows(len(examples), seed, n, batch_size, lengths)
    return _lay_out(examples, chosen[rows], up_to_multiple(int(lengths[chosen].max()), multiple))


def _refuse_nothing(examples: Sequence[Tokenized]) -> None:
    if not examples:
        raise InputError("training data: expected at least one example, found none")


def _lay_out(examples: Sequence[Tokenized], chosen: np.ndarray, length: int) -> Batch:
    return pad_batch([examples[row] for row in chosen], len(chosen), length)


def pad_batch(examples: Sequence[Tokenized], batch_size: int, length: int) -> Batch:
    """The arrays of `make_batch` for given sequences, right-padded; rows beyond the sequences are all padding."""
    batch = {
        "tokens": np.zeros((batch_size, length), np.int32),
        "targets": np.zeros((batch_size, length), np.int32),
        "weights": np.zeros((batch_size, length), np.float32),
        "lengths": np.zeros(batch_size, np.int32),
    }
    for row, example in enumerate(examples):
        count = len(example.tokens) - 1
        if count > length:
            raise InputError(f"batch: a sequence has {count} inputs; expected at most the batch length {length}")
        batch["tokens"][row, :count] = example.tokens[:-1]
        batch["targets"][row, :count] = example.tokens[1:]
        batch["weights"][row, :count] = example.loss[1:]
        batch["lengths"][row] = count
    return batch


def calibration_batches(
    examples: Sequence[Tokenized], seed: int, rows: int, length: int, batch_tokens: int, shards: int = 1
) -> Iterator[Batch]:
    """The sequences whose activations are measured, drawn without replacement.

    Each sequence is one row, cut to `length` inputs and right-padded; statistics use `lengths` to exclude the padding.
    Rows are grouped by length to reduce padding, which is safe because sums over tokens do not depend on the order. As
    in training, the last token of a sequence is never an input.

    Args:
        examples: the pool of sequences.
        seed: the run's seed.
        rows: sequences drawn; the whole pool if it is smaller.
        length: maximum inputs per sequence.
        batch_tokens: maximum B x T, padding included, unless a single row is longer; this bounds the memory.
        shards: parts into which the devices split a batch; B is a multiple of it.

    Yields:
        `tokens` int32 [B,T] and `lengths` int32 [B], longest rows first; each T has a single B, so that few shapes
        compile, and an incomplete batch is filled up with rows of length 0.

    Raises:
        InputError: an empty pool.
    """
    if not examples:
        raise InputError("calibration data: expected at least one row, found none")
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:rows]
    inputs = sorted((examples[row].tokens[:-1][:length] for row in order), key=len, reverse=True)
    start = 0
    while start < len(inputs):
        width = bucket_length([len(inputs[start])], length)
        batch_size = max(shards, batch_tokens // width // shards * shards)
        chosen = inputs[start : start + batch_size]
        tokens = np.zeros((batch_size, width), np.int32)
        lengths = np.zeros(batch_size, np.int32)
        for row, ids in enumerate(chosen):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        yield {"tokens": tokens, "lengths": lengths}
        start += batch_size
