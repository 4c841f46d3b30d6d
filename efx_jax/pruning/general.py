"""D-Pruner's general importance: SparseGPT's importance of every entry on general text, block by block."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.model.attention import Implementation
from efx_jax.model.decoder import LinearOptions, embed_batch
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import stack_layers
from efx_jax.parallel.partition import constrain_tree
from efx_jax.pruning.blockwise import block_output, observe_block
from efx_jax.pruning.event import take_block
from efx_jax.pruning.selection import Counts
from efx_jax.pruning.sparsegpt import inverse_factor, slab_counts, sparsegpt_on_mesh
from efx_jax.pruning.statistics import (
    INPUT_OF,
    Statistics,
    add_up,
    real_tokens,
    require_tokens,
    tokens_and_lengths,
)

Array = jax.Array


def general_importance(
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    spec: ModelSpec,
    names: tuple[str, ...],
    *,
    compute_dtype: Any = None,
    attention_path: Implementation = "xla",
    sparsity: float = 0.52,
) -> dict[str, Array]:
    """w^2 / d^2 of every entry in a SparseGPT sweep of the whole model (arXiv 2405.06275).

    Every block is swept on the outputs of the swept blocks before it. w already compensates for the columns before it;
    d is the diagonal of the upper Cholesky factor of the inverse of 2 X^T X / sequences + damping.

    Args:
        params: the model as one parameter tree; not changed.
        batches: general text, as for `collect_statistics`.
        spec: the model.
        names: linears to sweep.
        compute_dtype: dtype of the matmul operands; None takes the weights'.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        sparsity: of the sweep.

    Returns:
        name -> float32 `[L,O,I]`, 0 for inputs that were never active.

    Raises:
        InputError: no real token.
    """
    cut = [tokens_and_lengths(batch, spec.vocab_size) for batch in batches]
    sequences = sum(jnp.sum(lengths > 0) for _, lengths in cut)
    hidden = [(embed_batch(params, tokens), real_tokens(tokens, lengths)) for tokens, lengths in cut]
    require_tokens(sum(jnp.sum(real) for _, real in hidden))
    stacked = stack_layers(params, None, None)
    counts = {name: slab_counts(stacked.weights[name].shape, sparsity, "matrix") for name in names}
    options = LinearOptions(compute_dtype=compute_dtype)
    found: list[dict[str, Array]] = []
    for index in range(spec.num_layers):
        layer = take_block(stacked, index)
        total: Statistics = add_up(
            observe_block(x, None, real, layer, spec, options, attention_path, gram=True, moves_on=False)[2]
            for x, real in hidden
        )
        weights = {name: layer.weights[name] for name in names}
        swept, importance = _sweep_block(weights, total.gram, counts, sequences)
        found.append(importance)
        layer = dataclasses.replace(layer, weights=layer.weights | swept)
        if index + 1 < spec.num_layers:
            for place, (x, real) in enumerate(hidden):
                hidden[place] = block_output(x, layer, spec, options, attention_path), real
    return {name: _stack([block[name] for block in found], name) for name in names}


@jax.jit
def _sweep_block(
    weights: dict[str, Array], grams: Mapping[str, Array], counts: dict[str, Counts], sequences: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """New weights, in their dtype, and importance of one block's linears `[O,I]`."""
    grams = constrain_tree({INPUT_OF[name]: grams[INPUT_OF[name]] for name in weights})
    inverses = {source: inverse_factor(gram * (2 / sequences)) for source, gram in grams.items()}
    swept = {
        name: sparsegpt_on_mesh(name, weight, inverses[INPUT_OF[name]], counts[name], "matrix")
        for name, weight in weights.items()
    }
    new = {name: sweep.weight.astype(weights[name].dtype) for name, sweep in swept.items()}
    return constrain_tree((new, {name: sweep.importance for name, sweep in swept.items()}))


@functools.partial(jax.jit, static_argnames="name")
def _stack(blocks: list[Array], name: str) -> Array:
    return constrain_tree({name: jnp.stack(blocks)})[name]
