"""What a change of one matrix does to the target quantity of its score, by the model's own arithmetic.

The targets: for gate and up the MLP's output; for v the attention's output after o_proj; for q and k the attention
logits of all real pairs (query, earlier key); for o the outputs of gate and up (the mean of the two squared changes,
with the RMS norm in between included); for down its own output.
"""

import jax
import jax.numpy as jnp

from efx_jax.analysis.blocks import BlockView
from efx_jax.model.attention import attention
from efx_jax.model.layers import apply_rope, rms_norm
from efx_jax.model.spec import ModelSpec
from efx_jax.pruning.statistics import INPUT_OF

Array = jax.Array


def output_change(view: BlockView, name: str, removed: Array) -> Array:
    """The change `[B,T,O]` of a matrix's own output when `removed [O,I]` is subtracted from its weight."""
    return -_linear(view.taps[INPUT_OF[name]], removed)


def own_change(view: BlockView, delta: Array) -> Array:
    """Squared change of a matrix's own output, summed over real tokens: `delta [B,T,...]` -> scalar."""
    flat = delta.reshape(*view.real.shape, -1)
    return jnp.sum(jnp.square(flat) * view.real[..., None])


def target_change(view: BlockView, name: str, delta: Array, spec: ModelSpec) -> Array:
    """Squared change of the target of matrix `name`, summed over real tokens (q, k: pairs), when its output changes.

    Args:
        view: the block.
        name: the matrix.
        delta: `[B,T,O]`, the change of its output.
        spec: the model.
    """
    weights, taps = view.weights, view.taps
    if name in ("gate_proj", "up_proj"):
        return own_change(view, _linear(_hidden_change(taps["gate"], taps["up"], name, delta), weights["down_proj"]))
    if name == "v_proj":
        q, k = _rotated(view)
        context = attention(q, k, delta.reshape(*k.shape))
        return own_change(view, _linear(context, weights["o_proj"]))
    if name == "o_proj":
        moved = rms_norm(view.mid + delta, weights["post_attention_layernorm"], spec.rms_norm_eps) - taps["mlp_in"]
        gate, up = (own_change(view, _linear(moved, weights[after])) for after in ("gate_proj", "up_proj"))
        return (gate + up) / 2
    if name == "down_proj":
        return own_change(view, delta)
    q, k = _rotated(view)
    raw = taps["q_raw" if name == "q_proj" else "k_raw"]
    moved = _rotate(_normed_change(view, name, raw, delta.reshape(raw.shape), spec), view)
    return _logit_change(view, *((moved, k) if name == "q_proj" else (q, moved)))


def entry_changes(view: BlockView, name: str, rows: Array, columns: Array, spec: ModelSpec) -> Array:
    """Squared change `[n]` of the target on removing a single entry, for each of n (`rows`, `columns` int `[n]`).

    Equal to `target_change` for a change in one output unit, without computing the units that do not change.
    """
    inputs = view.taps[INPUT_OF[name]]

    def one(entry: tuple[Array, Array]) -> Array:
        row, column = entry
        delta = -view.weights[name][row, column] * inputs[..., column]
        return _unit_change(view, name, row, delta, spec)

    return jax.lax.map(one, (rows, columns))


def _unit_change(view: BlockView, name: str, unit: Array, delta: Array, spec: ModelSpec) -> Array:
    """`target_change` for a change `delta [B,T]` of one output unit."""
    if name in ("gate_proj", "up_proj"):
        gate, up = (view.taps[tap][..., unit] for tap in ("gate", "up"))
        hidden = _hidden_change(gate, up, name, delta)
        return own_change(view, hidden) * jnp.sum(jnp.square(view.weights["down_proj"][:, unit]))
    if name == "o_proj":
        return _unit_of_o(view, unit, delta, spec)
    if name == "down_proj":
        return own_change(view, delta)
    return _unit_of_head(view, name, unit, delta, spec)


def _unit_of_o(view: BlockView, unit: Array, delta: Array, spec: ModelSpec) -> Array:
    """One unit of the stream changes; its norm rescales all others, so gate changes by a * gate + b * column `unit`."""
    weights, mid = view.weights, view.mid
    mean_square = jnp.mean(jnp.square(mid), axis=-1) + spec.rms_norm_eps
    growth = (2 * mid[..., unit] + delta) * delta / (mid.shape[-1] * mean_square)
    rescaled = jnp.expm1(-0.5 * jnp.log1p(growth))
    own = delta * weights["post_attention_layernorm"][unit] * jax.lax.rsqrt(mean_square) * (1 + rescaled)

    def moved(name: str, tap: str) -> Array:
        return rescaled[..., None] * view.taps[tap] + own[..., None] * weights[name][:, unit]

    return (own_change(view, moved("gate_proj", "gate")) + own_change(view, moved("up_proj", "up"))) / 2


def _unit_of_head(view: BlockView, name: str, unit: Array, delta: Array, spec: ModelSpec) -> Array:
    """One unit of q, k or v changes: only the heads that it affects are computed."""
    k_heads, width = spec.num_kv_heads, spec.head_dim
    group = spec.num_heads // k_heads
    q, k = _rotated(view)
    head, place = unit // width, unit % width
    k_head = head // group if name == "q_proj" else head
    queries = q.reshape(*q.shape[:2], k_heads, group, width)[:, :, k_head]
    keys = k[:, :, k_head][:, :, None]
    if name == "v_proj":
        context = attention(queries, keys, delta[..., None, None])
        columns = view.weights["o_proj"].reshape(-1, k_heads, group, width)[:, k_head, :, place]
        return own_change(view, _linear(context, columns))
    raw = view.taps["q_raw" if name == "q_proj" else "k_raw"][:, :, head][:, :, None]
    alone = delta[..., None, None] * jax.nn.one_hot(place, width)
    moved = _rotate(_normed_change(view, name, raw, alone, spec), view)
    return _logit_change(view, *((moved, keys) if name == "q_proj" else (queries, moved)))


def _hidden_change(gate: Array, up: Array, name: str, delta: Array) -> Array:
    """The change of silu(gate) * up when one of the two changes by delta; all have the same shape."""
    if name == "up_proj":
        return jax.nn.silu(gate) * delta
    return (jax.nn.silu(gate + delta) - jax.nn.silu(gate)) * up


def _normed_change(view: BlockView, name: str, raw: Array, delta: Array, spec: ModelSpec) -> Array:
    """The change `[B,T,heads,H]` of q or k after its norm, if it has one, when it changes by delta before the norm."""
    if not spec.qk_norm:
        return delta
    gain = view.weights["q_norm" if name == "q_proj" else "k_norm"]
    return rms_norm(raw + delta, gain, spec.rms_norm_eps) - rms_norm(raw, gain, spec.rms_norm_eps)


def _rotated(view: BlockView) -> tuple[Array, Array]:
    return _rotate(view.taps["q"], view), _rotate(view.taps["k"], view)


def _rotate(heads: Array, view: BlockView) -> Array:
    return apply_rope(heads, *view.rope)


def _logit_change(view: BlockView, q: Array, k: Array) -> Array:
    """Sum of (q . k / sqrt(H))^2 over all real pairs; the logits are bilinear, so one side may be a change.

    One row of the batch at a time: all logits would be the largest array of the model.
    """
    group = q.shape[2] // k.shape[2]
    length = q.shape[1]
    visible = jnp.tril(jnp.ones((length, length), jnp.float32))

    def row(operands: tuple[Array, Array, Array]) -> Array:
        queries, keys, real = operands
        queries = queries.reshape(length, -1, group, queries.shape[-1])
        logits = jnp.einsum("tkgh,skh->kgts", queries, keys, precision="highest")
        return jnp.sum(jnp.square(logits) * (visible * real[:, None]))

    return jnp.sum(jax.lax.map(row, (q, k, view.real))) / q.shape[-1]


def _linear(x: Array, weight: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, weight, precision="highest")
