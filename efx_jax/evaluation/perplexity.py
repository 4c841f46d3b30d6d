"""Perplexity: exp(sum of negative log-likelihoods / number of predicted tokens), never a mean of batch means."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.data.batches import bucket_length, pad_batch
from efx_jax.data.tokens import Tokenized, checksum
from efx_jax.errors import InputError
from efx_jax.evaluation.likelihood import score_rows, target_log_probabilities
from efx_jax.evaluation.scores import RESAMPLES, Interval, interval, resample_counts
from efx_jax.lora import Adapters
from efx_jax.model.decoder import Params, head_weight, hidden_states
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import constrain, divisible_rows

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`value` = exp(nll_sum / tokens) with its 95 % bootstrap `interval` over windows (None for a single window), nats
    and number of predicted tokens.

    `window_nll` float64 [n] and `window_tokens` int64 [n] are in the order of the given windows; `text` is a checksum
    of their content, "" if unknown.
    """

    value: float
    interval: Interval | None
    nll_sum: float
    tokens: int
    window_nll: np.ndarray
    window_tokens: np.ndarray
    text: str = ""


def perplexity(
    params: Params,
    windows: Sequence[Tokenized],
    spec: ModelSpec,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    batch_size: int = 8,
    compute_dtype: Any = None,
) -> Perplexity:
    """Measures the function that is exported: with masks, y = x (mask * U)^T.

    Args:
        params: parameter tree.
        windows: token sequences; the tokens that carry loss are predicted. `text_windows` cuts text into windows;
            sequences from `tokenize` measure responses only.
        spec: the model.
        adapters: LoRA adapters, or None.
        masks: name -> bool `[L,O,I]`, True = kept, or None.
        batch_size: windows per forward pass; the last pass is filled with rows of weight 0.
        compute_dtype: dtype of the matmul operands; sums are float32, sums over windows float64.

    Raises:
        InputError: no window has a token to predict, or a loss is not finite.
    """
    window_tokens = np.asarray([int(window.loss[1:].sum()) for window in windows], np.int64)
    if window_tokens.sum() == 0:
        raise InputError("perplexity: expected at least one token to predict, found none; give more text")
    window_nll = np.zeros(len(windows))
    longest, batch_size = max(len(window.tokens) for window in windows), divisible_rows(batch_size)
    order = sorted(range(len(windows)), key=lambda row: len(windows[row].tokens))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        chosen = [windows[row] for row in rows]
        batch = pad_batch(chosen, batch_size, bucket_length([len(w.tokens) - 1 for w in chosen], longest))
        window_nll[rows] = np.asarray(_batch_nll(params, batch, spec, adapters, masks, compute_dtype))[: len(rows)]
    if not np.isfinite(window_nll).all():
        raise InputError("perplexity is not finite: the model overflows; check its weights or take another dtype")
    return dataclasses.replace(summarise(window_nll, window_tokens), text=checksum(windows))


def summarise(window_nll: np.ndarray, window_tokens: np.ndarray) -> Perplexity:
    """Perplexity and its interval (percentile bootstrap, 2,000 resamples of windows) from sums per window.

    Args:
        window_nll: nats float64 [n].
        window_tokens: predicted tokens int64 [n].
    """
    blocks = resample_counts(np.arange(len(window_nll)), RESAMPLES)
    nats, tokens = map(
        np.concatenate, zip(*((each @ window_nll, each @ window_tokens) for each in blocks), strict=True)
    )
    # A resample whose windows predict no tokens has no perplexity.
    resampled = np.exp(nats[tokens > 0] / tokens[tokens > 0])
    nll_sum, total = float(window_nll.sum()), int(window_tokens.sum())
    ends = interval(resampled) if np.count_nonzero(window_tokens) > 1 else None
    return Perplexity(float(np.exp(nll_sum / total)), ends, nll_sum, total, window_nll, window_tokens)


@functools.partial(jax.jit, static_argnames=("spec", "compute_dtype"))
def _batch_nll(
    params: Params,
    batch: dict[str, Array],
    spec: ModelSpec,
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    compute_dtype: Any,
) -> Array:
    """Sum of the negative log-likelihoods of each row, in nats, `[B]`."""

    def nll(batch: dict[str, Array]) -> Array:
        hidden = hidden_states(params, batch["tokens"], spec, adapters, masks, compute_dtype=compute_dtype, frozen=True)
        positions = hidden.reshape(-1, 1, spec.hidden_size)
        targets = batch["targets"].reshape(-1, 1)
        sources = jnp.zeros_like(targets)
        scores = target_log_probabilities(positions, head_weight(params), sources, targets, compute_dtype)
        scores = scores.reshape(batch["weights"].shape)
        return -jnp.sum(jnp.where(batch["weights"] > 0, scores * batch["weights"], 0.0), axis=1)

    return constrain(score_rows(nll, batch, masks))
