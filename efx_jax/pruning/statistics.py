"""Calibration statistics: energies (and on request Grams) of the inputs of every linear, from real tokens only."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from efx_jax.config import MaskForward, Remat
from efx_jax.einsum import gram_matrix, weight_gradient
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.attention import Implementation
from efx_jax.model.decoder import LinearOptions, attend_within, run_blocks
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import stack_layers
from efx_jax.shapes import require_shape

Array = jax.Array

# Linears that read the same input share its statistics.
INPUT_OF = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "o_proj": "o_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "down_in",
}
INPUTS = ("attn_in", "o_in", "mlp_in", "down_in")


@struct.dataclass
class Statistics:
    """Sums over the real tokens of calibration, float32; for a whole model every array has a leading axis L.

    `energy`: sum of squares of each unit, by name: the inputs `attn_in`, `o_in`, `mlp_in`, `down_in` `[I]`, the
    projections before (`q_raw [N*H]`, `k_raw [K*H]`) and after their norm (`q`, `k`), silu(gate) as `gate_value [F]`
    and up * silu'(gate) as `gate_slope [F]`, none of them rounded. `gram`: X^T X `[I,I]` of the four inputs as the
    linears round them, or {}. `tokens`: their number. `cross`: X_d^T X `[I,I]`, X_d the same inputs behind unpruned
    blocks, or {}.
    """

    energy: dict[str, Array]
    gram: dict[str, Array]
    tokens: Array
    cross: dict[str, Array] = struct.field(default_factory=dict)

    def input_norm(self, name: str) -> Array:
        """Root of the input energy of linear `name`, `[..., I]`."""
        return jnp.sqrt(self.energy[INPUT_OF[name]])

    def input_gram(self, name: str) -> Array:
        """X^T X of linear `name`, `[..., I, I]`.

        Raises:
            InputError: the statistics were collected without Grams.
        """
        self.require_gram()
        return self.gram[INPUT_OF[name]]

    def require_gram(self) -> None:
        """Refuses statistics that were collected without Grams.

        Raises:
            InputError: there are none.
        """
        if not self.gram:
            raise InputError("statistics: expected Gram matrices, found none; collect with gram=True")

    def require_model(self, params: Mapping[str, Any]) -> None:
        """Refuses statistics of another model, such as one with fewer blocks.

        Args:
            params: parameter tree, linears `[L,O,I]`.

        Raises:
            InputError: an array of another shape than this model's inputs have.
        """
        for name, source in INPUT_OF.items():
            num_layers, _, in_dim = params["layers"][name].shape
            require_shape(f"statistics: energy of {source}", self.energy[source], (num_layers, in_dim))
            for kind, grams in (("gram", self.gram), ("cross", self.cross)):
                if source in grams:
                    require_shape(f"statistics: {kind} of {source}", grams[source], (num_layers, in_dim, in_dim))


def real_tokens(tokens: Array, lengths: Array) -> Array:
    """1 for the first `lengths [B]` tokens of each row of `tokens [B,T]`, 0 for padding; float32 `[B,T]`."""
    return (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)


def tokens_and_lengths(batch: Mapping[str, Any], vocab_size: int) -> tuple[Array, Array]:
    """`tokens [B,T]` and `lengths [B]` of a calibration batch; without `lengths` every token is real.

    Raises:
        InputError: no tokens; another key, such as `attention_mask`, which would be ignored; an array of another shape
            or dtype; an id outside the vocabulary or a length outside 0 to T (not looked for on several hosts).
    """
    unknown = sorted(batch.keys() - {"tokens", "lengths"})
    if unknown or "tokens" not in batch:
        raise InputError(
            f"calibration: expected batches of `tokens` [B,T] and `lengths` [B], found {', '.join(batch) or 'none'}; "
            "pad on the right, and give the number of real tokens of every row as `lengths` (attention_mask.sum(1))"
        )
    tokens = jnp.asarray(batch["tokens"])
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            f"calibration: expected integer tokens [B,T], found {tokens.dtype} {list(tokens.shape)}; pass token ids"
        )
    _require_range("tokens", tokens, vocab_size - 1)
    if "lengths" not in batch:
        return tokens, jnp.full(tokens.shape[0], tokens.shape[1])
    lengths = jnp.asarray(batch["lengths"])
    require_shape("calibration: lengths", lengths, tokens.shape[:1])
    _require_range("lengths", lengths, tokens.shape[1])
    return tokens, lengths


def _require_range(name: str, values: Array, most: int) -> None:
    """Refuses values outside 0 to `most`, where one process can read them all."""
    if values.is_fully_addressable and values.size:
        found = np.asarray(values)
        if found.min() < 0 or found.max() > most:
            raise InputError(
                f"calibration: expected {name} from 0 to {most}, found {found.min()} to {found.max()}; check the "
                "tokenizer, and pad on the right"
            )


def require_tokens(tokens: Array | int) -> None:
    """Refuses calibration without a single real token.

    Raises:
        InputError: `tokens`, their number, is 0.
    """
    if float(tokens) == 0:
        raise InputError("calibration: expected at least one real token, found none; check prune.calibration")


def block_statistics(
    taps: Mapping[str, Array],
    real: Array,
    gram: bool,
    dense_taps: Mapping[str, Array] | None = None,
    compute_dtype: Any = None,
) -> Statistics:
    """Reduces one block's activations (see `efx_jax.model.decoder.block`) to sums over real tokens `[B,T]`.

    Args:
        taps: activations of the block on the inputs that reach it.
        real: float32 `[B,T]`, 1 for real tokens.
        gram: sum Grams too.
        dense_taps: those behind the blocks as they were before the event, if `cross` is wanted.
        compute_dtype: dtype to which the linears, and so the Grams, round the inputs; None: the inputs as they are.
    """

    def energy(values: Array) -> Array:
        flat = values.astype(jnp.float32).reshape(*real.shape, -1)
        return jnp.sum(jnp.square(flat) * real[..., None], axis=(0, 1))

    gate, up = taps["gate"].astype(jnp.float32), taps["up"].astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    energies = {name: energy(taps[name]) for name in (*INPUTS, "q_raw", "k_raw", "q", "k")}
    energies |= {"gate_value": energy(gate * sigmoid), "gate_slope": energy(up * slope)}

    def read(values: Array) -> Array:
        # As the linears read them; products of 16-bit numbers are exact in float32.
        values = values if compute_dtype is None else values.astype(compute_dtype)
        return values * real[..., None].astype(values.dtype)

    return Statistics(
        energy=energies,
        gram={name: gram_matrix(read(taps[name])) for name in INPUTS} if gram else {},
        tokens=jnp.sum(real),
        cross={}
        if dense_taps is None
        else {name: weight_gradient(read(dense_taps[name]), read(taps[name])) for name in INPUTS},
    )


@functools.partial(jax.jit, static_argnames=("spec", "attention_path", "gram"))
def batch_statistics(
    params: Mapping[str, Any],
    tokens: Array,
    lengths: Array,
    spec: ModelSpec,
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    options: LinearOptions,
    attention_path: Implementation,
    gram: bool,
) -> Statistics:
    """Statistics of one right-padded batch `tokens [B,T]`, `lengths [B]`; arrays lead with L."""
    return states_and_statistics(params, tokens, lengths, spec, adapters, masks, options, attention_path, gram=gram)[1]


def states_and_statistics(
    params: Mapping[str, Any],
    tokens: Array,
    lengths: Array,
    spec: ModelSpec,
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    options: LinearOptions,
    attention_path: Implementation,
    *,
    gram: bool = False,
    remat: Remat = "none",
    probes: Mapping[str, Array] | None = None,
) -> tuple[Array, Statistics]:
    """The final-normed hidden states `[B,T,D]`, differentiable in the probes, and what `batch_statistics` finds.

    For `options`, `remat` and `probes` see `efx_jax.model.decoder.run_blocks`.
    """
    real = real_tokens(tokens, lengths)
    return run_blocks(
        params,
        tokens,
        stack_layers(params, adapters, masks),
        spec,
        options,
        attend_within(None, attention_path),
        remat=remat,
        frozen=True,
        probes=probes,
        observe=lambda taps: block_statistics(taps, real, gram, compute_dtype=options.compute_dtype),
    )


def layer_options(adapters: Adapters | None, mask_forward: MaskForward, compute_dtype: Any) -> LinearOptions:
    """The linears' options for a calibration pass."""
    scale = 1.0 if adapters is None else adapters.scale
    return LinearOptions(scale=scale, mask_forward=mask_forward, compute_dtype=compute_dtype)


def collect_statistics(
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    spec: ModelSpec,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    gram: bool = False,
    *,
    mask_forward: MaskForward = "exact",
    compute_dtype: Any = None,
    attention_path: Implementation = "xla",
) -> Statistics:
    """Runs the model over calibration batches and sums what scores and recovery need.

    Args:
        params: parameter tree.
        batches: dictionaries with `tokens` int `[B,T]` (right-padded) and `lengths` int `[B]`; without `lengths` every
            token is real.
        spec: the model.
        adapters: adapters, or None.
        masks: masks in force during calibration, or None.
        gram: also sum X^T X of the four kinds of input (L times I x I floats).
        mask_forward: how the masks act.
        compute_dtype: dtype of the matmul operands, including those of the Grams; the sums are always float32.
        attention_path: see `efx_jax.model.attention.choose_attention`.

    Returns:
        Statistics whose arrays lead with L.

    Raises:
        InputError: no batch, no real token, or a batch that `tokens_and_lengths` refuses.
    """
    options = layer_options(adapters, mask_forward, compute_dtype)
    total: Statistics | None = add_up(
        batch_statistics(
            params,
            *tokens_and_lengths(batch, spec.vocab_size),
            spec,
            adapters,
            masks,
            options,
            attention_path,
            gram,
        )
        for batch in batches
    )
    require_tokens(0 if total is None else jnp.max(total.tokens))
    assert total is not None
    return total


def add_up(trees: Iterable[Any]) -> Any:
    """The sum of trees, such as `Statistics`, that are made one by one and consumed; None if there are none."""
    total = None
    for tree in trees:
        total = tree if total is None else _add(total, tree)
    return total


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)
