"""The compared scores of one block, and the constants that turn their squares into predictions.

`wanda` considers only the matrix's own output; `foresight` also the weights that the output meets, as if nothing were
in between; `foresight_gated` also the factor that lets it through, averaged over tokens separately from the input;
`foresight_joint`, for gate and up, multiplies factor and input token by token before summing:
U_oi^2 * ||down_o||^2 * sum_t factor_to^2 x_ti^2. For a single entry of up that is exactly what its removal costs; for
one of gate it is so to first order.
"""

import functools

import jax
import jax.numpy as jnp

from efx_jax.analysis.blocks import BlockView
from efx_jax.config import PruneConfig, Score
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.model.stack import Layer
from efx_jax.pruning.block import block_scores
from efx_jax.pruning.scores import column_norms

Array = jax.Array
_PRUNING: tuple[Score, ...] = ("wanda", "foresight", "foresight_gated")
JOINT = "foresight_joint"
CRITERIA: tuple[str, ...] = (*_PRUNING, JOINT)


@functools.partial(jax.jit, static_argnames="spec")
def criteria_scores(view: BlockView, spec: ModelSpec) -> dict[str, dict[str, Array]]:
    """score -> matrix -> `[O,I]`, float32, from the functions that a prune event calls; only the joint one is new."""
    layer = Layer(weights=view.weights, lora_a={}, lora_b={}, masks={})
    scores = {
        name: block_scores(layer, view.weights, view.stats, {}, spec, PruneConfig(score=name))[0] for name in _PRUNING
    }
    return scores | {JOINT: scores["foresight_gated"] | _joint_scores(view)}


def _joint_scores(view: BlockView) -> dict[str, Array]:
    gate, up = view.taps["gate"], view.taps["up"]
    sigmoid = jax.nn.sigmoid(gate)
    factors = {"gate_proj": up * sigmoid * (1 + gate * (1 - sigmoid)), "up_proj": gate * sigmoid}
    inputs = jnp.square(view.taps["mlp_in"]) * view.real[..., None]
    reach = column_norms(view.weights["down_proj"])[:, None]

    def score(name: str) -> Array:
        energy = jnp.einsum("bto,bti->oi", jnp.square(factors[name]), inputs, precision="highest")
        return jnp.abs(view.weights[name]) * reach * jnp.sqrt(energy)

    return {name: score(name) for name in factors}


@functools.partial(jax.jit, static_argnames="spec")
def prediction_units(view: BlockView, spec: ModelSpec) -> dict[str, dict[str, Array]]:
    """score -> matrix -> the constant c for which c * score^2 is a squared change of the score's target quantity.

    For Wanda that is the matrix's own output, for the others see `efx_jax.analysis.targets`. Masks do not depend on c:
    scores take a root mean square over the G heads that share a key or value, where the costs add up, and ignore the
    softmax's scale and the gain of the norm after o. For q and k `foresight` uses only the partner's weights: the
    partner's inputs are taken as white, at their measured mean square.

    Args:
        view: the block.
        spec: the model.

    Returns:
        float32 scalars.
    """
    one = jnp.float32(1)
    group = one * spec.num_heads / spec.num_kv_heads
    tokens = view.stats.tokens
    cos, sin = view.rope
    stretch = jnp.square(jnp.square(cos[0, 0, 0, 0]) + jnp.square(sin[0, 0, 0, 0]))
    pair = stretch * _pairs(view.real) / (tokens * spec.head_dim)
    whitened = pair * jnp.mean(view.stats.energy["attn_in"]) / tokens
    blind = dict.fromkeys(LINEARS, one) | {"v_proj": group, "o_proj": _norm_slope(view, spec)}
    gated = blind | {"q_proj": pair, "k_proj": pair * group}
    return {
        "wanda": dict.fromkeys(LINEARS, one),
        "foresight": blind | {"q_proj": whitened, "k_proj": whitened * group},
        "foresight_gated": gated,
        JOINT: gated,
    }


def _norm_slope(view: BlockView, spec: ModelSpec) -> Array:
    """Mean square of gain / rms, over real tokens and units, of the norm between o and the MLP."""
    inverse = 1 / (jnp.mean(jnp.square(view.mid), axis=-1) + spec.rms_norm_eps)
    mean_inverse = jnp.sum(inverse * view.real) / view.stats.tokens
    return mean_inverse * jnp.mean(jnp.square(view.weights["post_attention_layernorm"]))


def _pairs(real: Array) -> Array:
    """Number of pairs of a real token and itself or an earlier one of its row."""
    lengths = jnp.sum(real, axis=1)
    return jnp.sum(lengths * (lengths + 1) / 2)
