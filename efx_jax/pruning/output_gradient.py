"""How strongly the outputs of the linears affect the loss: what `foresight_loss` reads in place of the paper's nu."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.config import MaskForward, Remat
from efx_jax.lora import Adapters
from efx_jax.model.attention import Implementation
from efx_jax.model.decoder import LinearOptions, head_weight
from efx_jax.model.loss import cross_entropy, drawn_cross_entropy
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.parallel.partition import constrain_tree
from efx_jax.pruning.statistics import (
    Statistics,
    add_up,
    layer_options,
    real_tokens,
    require_tokens,
    states_and_statistics,
    tokens_and_lengths,
)

Array = jax.Array


def output_gradient_energy(
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    spec: ModelSpec,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    names: Iterable[str] = LINEARS,
    *,
    mask_forward: MaskForward = "exact",
    compute_dtype: Any = None,
    remat: Remat = "block",
    attention_path: Implementation = "xla",
    key: Array | None = None,
) -> tuple[dict[str, Array], Statistics]:
    """Sum over tokens of (d nll / d y_to)^2 for every output y_o of the linears, nll of the text's or of drawn tokens.

    The square root is the nu of `foresight_loss`: what the paper's nu approximates by the next matrix, taken through
    everything that follows. Times the input's second moment it is the diagonal of a weight's Fisher information,
    factored as in K-FAC (arXiv 1503.05671): the empirical one with the tokens of the text, and in expectation the true
    one with tokens drawn from the model (on the difference see arXiv 1905.12558).

    Args:
        params: the base.
        batches: `tokens` int `[B,T]`, right-padded, and `lengths` int `[B]`, as for `collect_statistics`.
        spec: the model.
        adapters: adapters, or None.
        masks: masks in force, or None.
        names: the linears.
        mask_forward: how the masks act.
        compute_dtype: dtype of the matmul operands; the sums are float32 in any case.
        remat: what the backward pass recomputes.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        key: PRNG key that draws the labels from the model's own predictions, one stream per row, whatever the batches;
            None: the tokens of the text.

    Returns:
        name -> float32 `[L,O]`; and what `collect_statistics` finds for these rows, without Grams, a by-product of the
        forward pass.

    Raises:
        InputError: no batch, or no real token.
    """
    batch_energy = functools.partial(
        _batch_energy,
        spec=spec,
        names=tuple(names),
        options=layer_options(adapters, mask_forward, compute_dtype),
        remat=remat,
        attention_path=attention_path,
    )

    def found() -> Iterator[tuple[dict[str, Array], Statistics]]:
        seen = jnp.int32(0)
        for batch in batches:
            tokens, lengths = tokens_and_lengths(batch, spec.vocab_size)
            row_keys = (
                None
                if key is None
                else jax.vmap(functools.partial(jax.random.fold_in, key))(seen + jnp.arange(tokens.shape[0]))
            )
            # Rows without tokens are only padding of the batch.
            seen = seen + jnp.sum(lengths > 0)
            yield batch_energy(params, adapters, masks, tokens, lengths, row_keys)

    total: tuple[dict[str, Array], Statistics] | None = add_up(found())
    require_tokens(0 if total is None else jnp.max(total[1].tokens))
    assert total is not None
    return total


@functools.partial(jax.jit, static_argnames=("spec", "names", "remat", "attention_path"))
def _batch_energy(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    tokens: Array,
    lengths: Array,
    row_keys: Array | None,
    *,
    spec: ModelSpec,
    names: tuple[str, ...],
    options: LinearOptions,
    remat: Remat,
    attention_path: Implementation,
) -> tuple[dict[str, Array], Statistics]:
    def loss(probes: dict[str, Array]) -> tuple[Array, Statistics]:
        hidden, stats = states_and_statistics(
            params,
            tokens,
            lengths,
            spec,
            adapters,
            masks,
            options,
            attention_path,
            remat=remat,
            probes=probes,
        )
        head, dtype = head_weight(params), options.compute_dtype
        # The last token of a row has nothing to predict.
        weights = real_tokens(tokens, lengths - 1)
        if row_keys is None:
            return cross_entropy(hidden, head, jnp.roll(tokens, -1, axis=1), weights, dtype)[0], stats
        fractions = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(row_keys)
        return drawn_cross_entropy(hidden, head, fractions, weights, dtype)[0], stats

    probes = {name: jnp.zeros(params["layers"][name].shape[:2], jnp.float32) for name in names}
    energy, stats = jax.grad(loss, has_aux=True)(probes)
    constrained: dict[str, Array] = constrain_tree({"reach": energy})["reach"]
    return constrained, stats
