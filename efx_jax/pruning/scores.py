"""How much an entry matters: |U| * input norm * nu, where nu is how strongly an output unit affects what comes next.

This is the square root of twice the paper's eq. 2, and exact for one weight of a linear two-layer net. Appendix B gives
nu for each matrix (`weight_reach`); `activation_reach` follows the signal through the products q k^T and SwiGLU.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efx_jax.config import PruneConfig
from efx_jax.model.spec import ModelSpec
from efx_jax.pruning.statistics import Statistics
from efx_jax.shapes import require_shape

Array = jax.Array


def wanda_score(weight: Array, input_norm: Array) -> Array:
    """|W_oi| * input_norm_i (Wanda, arXiv 2306.11695, eq. 1).

    Args:
        weight: `[O,I]`, the effective weight U.
        input_norm: `[I]`, root of the summed squared inputs.

    Returns:
        float32 `[O,I]`.

    Raises:
        InputError: the norm has another shape.
    """
    require_shape("input_norm", input_norm, weight.shape[-1:])
    return jnp.abs(weight.astype(jnp.float32)) * input_norm


def foresight_score(weight: Array, input_norm: Array, downstream_norm: Array) -> Array:
    """|U_oi| * input_norm_i * nu_o (paper eq. 2, square root, without its factor 1/2).

    Args:
        weight: U `[O,I]`.
        input_norm: `[I]`.
        downstream_norm: nu `[O]`.

    Returns:
        float32 `[O,I]`.

    Raises:
        InputError: a norm has another shape.
    """
    require_shape("downstream_norm", downstream_norm, weight.shape[:1])
    return wanda_score(weight, input_norm) * downstream_norm[:, None]


def ria_score(weight: Array, input_norm: Array, power: float = 0.5) -> Array:
    """(|W_oi| / sum_o |W_oi| + |W_oi| / sum_i |W_oi|) * input_norm_i^power (RIA, Zhang et al., ICLR 2024).

    An entry counts by its share of its input unit's and of its output unit's total weight, so that in a whole-matrix
    group neither a weak input nor a weak output loses all its entries.

    Args:
        weight: `[O,I]`, the effective weight U.
        input_norm: `[I]`.
        power: exponent of the norm.

    Returns:
        float32 `[O,I]`; the share of a row or column of zeros is 0.

    Raises:
        InputError: the norm has another shape.
    """
    require_shape("input_norm", input_norm, weight.shape[-1:])
    magnitude = jnp.abs(weight.astype(jnp.float32))
    by_input, by_output = jnp.sum(magnitude, axis=0, keepdims=True), jnp.sum(magnitude, axis=1, keepdims=True)
    shares = [magnitude / jnp.where(total > 0, total, 1.0) for total in (by_input, by_output)]
    return (shares[0] + shares[1]) * jnp.power(input_norm, power)


def matrix_score(effective: Array, input_norm: Array, reach: Array, config: PruneConfig) -> Array:
    """`config.score` of one matrix from U `[O,I]`, `input_norm [I]` and `reach` nu `[O]`: `[O,I]`, float32."""
    if config.score == "magnitude":
        return jnp.abs(effective)
    if config.score == "wanda":
        return wanda_score(effective, input_norm)
    if config.score == "ria":
        return ria_score(effective, input_norm, config.ria_power)
    return foresight_score(effective, input_norm, reach)


def column_norms(weight: Array) -> Array:
    """Euclidean norm of every column of `[O,I]`: float32 `[I]`."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0))


def row_norms(weight: Array) -> Array:
    """Euclidean norm of every row of `[O,I]`: float32 `[O]`."""
    return column_norms(weight.T)


def root_mean_square(values: Array, axis: int) -> Array:
    """Root of the mean square along an axis."""
    return jnp.sqrt(jnp.mean(jnp.square(values), axis=axis))


def share_rope_pairs(norms: Array) -> Array:
    """Root mean square over the dimensions (j, j + H/2) that RoPE rotates into each other; `[..., H]`."""
    first, second = jnp.split(norms, 2, axis=-1)
    shared = jnp.sqrt((jnp.square(first) + jnp.square(second)) / 2)
    return jnp.concatenate([shared, shared], axis=-1)


def weight_reach(effective: Mapping[str, Array], spec: ModelSpec) -> dict[str, Array]:
    """nu of every matrix of one block from the weights it feeds (paper, appendix B).

    q: norm of its key head's weights per head dimension; k: root mean square of this norm over its G query heads; both
    shared by RoPE pairs. v: root mean square over the G heads of o_proj's column norms (as in the authors' code; the
    paper does not say). o: mean of the column norms of gate and up. gate and up: column norms of down. down: 1.

    Args:
        effective: U `[O,I]` of the seven linears.
        spec: the model.

    Returns:
        nu float32 `[O]` for each of the seven.
    """
    k_heads, width = spec.num_kv_heads, spec.head_dim
    group = spec.num_heads // k_heads
    q_norms = row_norms(effective["q_proj"]).reshape(k_heads, group, width)
    k_norms = row_norms(effective["k_proj"]).reshape(k_heads, width)
    o_columns = column_norms(effective["o_proj"]).reshape(k_heads, group, width)
    down_columns = column_norms(effective["down_proj"])
    return {
        "q_proj": _spread_over_queries(share_rope_pairs(k_norms), group),
        "k_proj": share_rope_pairs(root_mean_square(q_norms, axis=1)).reshape(-1),
        "v_proj": root_mean_square(o_columns, axis=1).reshape(-1),
        "o_proj": (column_norms(effective["gate_proj"]) + column_norms(effective["up_proj"])) / 2,
        "gate_proj": down_columns,
        "up_proj": down_columns,
        "down_proj": jnp.ones(effective["down_proj"].shape[0], jnp.float32),
    }


def activation_reach(
    effective: Mapping[str, Array], weights: Mapping[str, Array], stats: Statistics, spec: ModelSpec
) -> dict[str, Array]:
    """nu through the nonlinearities, from the activations seen in calibration (ours; docs/method.md).

    q and k: rms of the partner's activations per head dimension, shared by RoPE pairs; with Qwen3's q/k norms those
    after the partner's norm, times the unit's own gain over its norm's divisor. up: column norms of down *
    rms(silu(gate)); gate: column norms of down * rms(up * silu'(gate)). v, o and down as in `weight_reach`.

    Args:
        effective: U `[O,I]` of the seven linears.
        weights: the block's arrays, for the q/k norm gains.
        stats: statistics of this block.
        spec: the model.

    Returns:
        nu `[O]` for each of the seven.
    """
    k_heads, width = spec.num_kv_heads, spec.head_dim
    group = spec.num_heads // k_heads
    mean = {name: energy / stats.tokens for name, energy in stats.energy.items()}
    q_rms = jnp.sqrt(mean["q"]).reshape(k_heads, group, width)
    k_rms = jnp.sqrt(mean["k"]).reshape(k_heads, width)
    q_reach = share_rope_pairs(k_rms)[:, None, :] * jnp.ones((1, group, 1))
    k_reach = share_rope_pairs(root_mean_square(q_rms, axis=1))
    if spec.qk_norm:
        q_raw, k_raw = mean["q_raw"].reshape(k_heads, group, width), mean["k_raw"].reshape(k_heads, width)
        q_reach = q_reach * _norm_slope(weights["q_norm"], q_raw, spec.rms_norm_eps)
        k_reach = k_reach * _norm_slope(weights["k_norm"], k_raw, spec.rms_norm_eps)
    reach = weight_reach(effective, spec)
    return reach | {
        "q_proj": q_reach.reshape(-1),
        "k_proj": k_reach.reshape(-1),
        "up_proj": reach["up_proj"] * jnp.sqrt(mean["gate_value"]),
        "gate_proj": reach["gate_proj"] * jnp.sqrt(mean["gate_slope"]),
    }


def loss_reach(energy: Array, shrink: float) -> Array:
    """nu `[O]` of one matrix from the energy of the gradients by its outputs, `output_gradient_energy` `[O]`.

    nu_o^2 = (1 - shrink) energy_o + shrink mean_o energy. With a small calibration set, some outputs get their energy
    from a few tokens; and if training follows, an output that matters less now will matter again.
    """
    return jnp.sqrt((1 - shrink) * energy + shrink * jnp.mean(energy))


def _spread_over_queries(per_kv_head: Array, group: int) -> Array:
    """`[K,H]` -> `[N*H]`: each key/value head serves G query heads."""
    return jnp.repeat(per_kv_head, group, axis=0).reshape(-1)


def _norm_slope(gain: Array, mean_square: Array, eps: float) -> Array:
    """|gain| over the divisor of a head's RMS norm, from the mean squares `[...,H]` of the norm's input."""
    return jnp.abs(gain.astype(jnp.float32)) / jnp.sqrt(jnp.mean(mean_square, axis=-1, keepdims=True) + eps)
