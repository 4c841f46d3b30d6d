"""The decoder: LLaMA, Qwen2 and Qwen3 as one pure function over stacked weights under `lax.scan`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from efx_jax.config import MaskForward, Remat
from efx_jax.einsum import contract
from efx_jax.linear import fold_in, linear
from efx_jax.lora import Adapters
from efx_jax.model.attention import Implementation, attention
from efx_jax.model.layers import apply_rope, probe_gradient, rms_norm, rope_tables, swiglu
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer, freeze, stack_layers, thaw
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import VOCABULARY, batch_axes, constrain, linear_axes

Array = jax.Array
Params = Mapping[str, Any]
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
# Kept by remat "linears": attention's outputs and those of all linears but down, which the backward pass never reads.
_SAVED = ("q_proj", "k_proj", "v_proj", "attention_log_sums", "context", "o_proj", "gate_proj", "up_proj")


@struct.dataclass
class LinearOptions:
    """How every linear of a block is computed; see `efx_jax.linear.linear`."""

    scale: float = struct.field(pytree_node=False, default=1.0)
    mask_forward: MaskForward = struct.field(pytree_node=False, default="exact")
    compute_dtype: Any = struct.field(pytree_node=False, default=None)
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)


def block(
    x: Array,
    layer: Layer,
    spec: ModelSpec,
    options: LinearOptions,
    rope: tuple[Array, Array],
    attend: Attend,
    dropout_key: Array | None = None,
    probes: Mapping[str, Array] | None = None,
) -> tuple[Array, dict[str, Array], Any]:
    """One pre-norm decoder block.

    Args:
        x: residual stream `[B,T,D]`.
        layer: the block's arrays.
        spec: the model.
        options: scale, mask mode and dtypes of the linears.
        rope: cos and sin `[B,T,1,H/2]`.
        attend: (q, k, v) -> (context `[B,T,N*H]`, anything the caller wants to keep, such as a KV cache).
        dropout_key: PRNG key of the adapters' dropout, or one key per row `[B]`, or None.
        probes: zeros `[O]` of some linears, see `probe_gradient`.

    Returns:
        The new residual stream `[B,T,D]`; the activations that calibration reads, by name (dead code elsewhere): the
        linears' inputs `attn_in`, `o_in`, `mlp_in`, `down_in` `[B,T,I]`, the projections `q_raw`, `k_raw` before
        and `q`, `k` after their norm `[B,T,heads,H]`, `gate` and `up` `[B,T,F]`; and what `attend` kept.
    """
    weights = layer.weights
    mesh = active_mesh()
    batch = () if mesh is None else batch_axes(x.shape[0], mesh.shape)

    def project(inputs: Array, name: str, index: int) -> Array:
        key = None if dropout_key is None else fold_in(dropout_key, index)
        output = linear(
            inputs,
            weights[name],
            weights.get(f"{name}_bias"),
            layer.lora_a.get(name),
            layer.lora_b.get(name),
            layer.masks.get(name),
            scale=options.scale,
            mask_forward=options.mask_forward,
            compute_dtype=options.compute_dtype,
            dropout_rate=options.dropout_rate,
            dropout_key=key,
            axes=None if mesh is None else linear_axes(name, batch),
        )
        if probes and name in probes:
            output = probe_gradient(output, probes[name])
        return checkpoint_name(output, name)

    def heads(projected: Array, count: int) -> Array:
        return projected.reshape(*projected.shape[:2], count, spec.head_dim)

    with jax.named_scope("attention"):
        attn_in = rms_norm(x, weights["input_layernorm"], spec.rms_norm_eps)
        q_raw = heads(project(attn_in, "q_proj", 0), spec.num_heads)
        k_raw = heads(project(attn_in, "k_proj", 1), spec.num_kv_heads)
        v = heads(project(attn_in, "v_proj", 2), spec.num_kv_heads)
        q, k = q_raw, k_raw
        if spec.qk_norm:
            q = rms_norm(q_raw, weights["q_norm"], spec.rms_norm_eps)
            k = rms_norm(k_raw, weights["k_norm"], spec.rms_norm_eps)
        dtype = weights["q_proj"].dtype if options.compute_dtype is None else jnp.dtype(options.compute_dtype)
        rotated_q, rotated_k = (apply_rope(y, *rope).astype(dtype) for y in (q, k))
        context, kept = attend(rotated_q, rotated_k, v.astype(dtype))
        o_in = checkpoint_name(context.astype(x.dtype), "context")
        x = constrain(x + project(o_in, "o_proj", 3), batch or None, None, None)
    with jax.named_scope("mlp"):
        mlp_in = rms_norm(x, weights["post_attention_layernorm"], spec.rms_norm_eps)
        gate, up = project(mlp_in, "gate_proj", 4), project(mlp_in, "up_proj", 5)
        down_in = swiglu(gate, up)
        x = constrain(x + project(down_in, "down_proj", 6), batch or None, None, None)
    taps = {"attn_in": attn_in, "o_in": o_in, "mlp_in": mlp_in, "down_in": down_in}
    return x, taps | {"q_raw": q_raw, "k_raw": k_raw, "q": q, "k": k, "gate": gate, "up": up}, kept


def attend_within(
    segments: Array | None = None, implementation: Implementation = "xla", ends: Array | None = None
) -> Attend:
    """Causal attention inside the batch, see `efx_jax.model.attention.attention`."""
    return lambda q, k, v: (attention(q, k, v, segments, implementation, ends), None)


def embed(params: Params, tokens: Array) -> Array:
    """Token embeddings `[B,T,D]` of `tokens [B,T]`; the residual stream keeps the embedding's dtype."""
    mesh = active_mesh()
    if mesh is None:
        return params["embed_tokens"][tokens]
    batch = batch_axes(tokens.shape[0], mesh.shape) or None

    def local(table: Array, tokens: Array) -> Array:
        table = jax.lax.all_gather(table, "fsdp", axis=0, tiled=True)
        places = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        mine = (places >= 0) & (places < table.shape[0])
        found = jnp.where(mine[..., None], table[jnp.where(mine, places, 0)], 0)
        return jax.lax.psum(found, "tensor")

    specs = (P(VOCABULARY, None), P(batch, None))
    return jax.shard_map(local, in_specs=specs, out_specs=P(batch, None, None), check_vma=False)(
        params["embed_tokens"], jnp.asarray(tokens)
    )


embed_batch = jax.jit(embed)
"""`embed` compiled, for callers outside `jit`: on a mesh, plain `embed` would be recompiled for every batch."""


def head_weight(params: Params) -> Array:
    """The output embedding `[V,D]`: `lm_head`, or `embed_tokens` if they are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def hidden_states(
    params: Params,
    tokens: Array,
    spec: ModelSpec,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    ends: Array | None = None,
    mask_forward: MaskForward = "exact",
    compute_dtype: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    remat: Remat = "none",
    attention_path: Implementation = "xla",
    frozen: bool = False,
) -> Array:
    """The hidden states after the final norm `[B,T,D]`, in the dtype of the embedding.

    Args:
        params: parameter tree (`efx_jax.model.spec.param_shapes`).
        tokens: int `[B,T]`, right-padded; padding may have any value.
        spec: the model, static under jit.
        adapters: LoRA adapters, or None.
        masks: name -> mask `[L,O,I]` (True = kept; bool or packed, see `efx_jax.masks`), or None.
        positions: int `[B,T]`; 0, 1, ... by default.
        segments: int `[B,T]`: a query sees only earlier keys of its own segment; None: all earlier keys.
        ends: int `[B,T]`: the position from which a key is no longer seen; None: it stays visible.
        mask_forward: how masks act, see `efx_jax.linear.linear`.
        compute_dtype: dtype of the matmul operands; None takes the weights'.
        dropout_rate: dropout on the adapters' inputs; acts only with a key.
        dropout_key: PRNG key, or one per row `[B]`, so that a row's draws do not depend on its batch; or None.
        frozen: the base weights get no gradient (adapters still do), which makes the pass faster on a CPU.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        remat: what the backward pass recomputes: nothing, everything but the linears' outputs, or whole blocks.
    """
    options = LinearOptions(
        scale=1.0 if adapters is None else adapters.scale,
        mask_forward=mask_forward,
        compute_dtype=compute_dtype,
        dropout_rate=dropout_rate,
    )
    layers = stack_layers(params, adapters, masks)
    attend = attend_within(segments, attention_path, ends)
    return run_blocks(
        params, tokens, layers, spec, options, attend, positions, dropout_key, remat=remat, frozen=frozen
    )[0]


def run_blocks(
    params: Params,
    tokens: Array,
    layers: Layer,
    spec: ModelSpec,
    options: LinearOptions,
    attend: Attend,
    positions: Array | None = None,
    dropout_key: Array | None = None,
    *,
    remat: Remat = "none",
    frozen: bool = False,
    probes: Mapping[str, Array] | None = None,
    observe: Callable[[dict[str, Array]], Any] | None = None,
) -> tuple[Array, Any]:
    """Embedding, all blocks in one scan and the final norm; unlike `hidden_states`, it can observe or probe blocks.

    Args:
        layers: all blocks, see `stack_layers`.
        options: scale, mask mode and dtypes of the linears.
        attend: see `block`.
        probes: zeros `[L,O]` of some linears, see `efx_jax.model.layers.probe_gradient`.
        observe: function of a block's activations (those that `block` returns), which get no gradient; or None.

    The other arguments are those of `hidden_states`.

    Returns:
        The hidden states `[B,T,D]`, and the results of `observe` with a leading axis L, or None.
    """
    batch, length = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    rope = rope_tables(spec.rope, spec.head_dim, positions)

    def body(x: Array, scanned: tuple[Layer, Array, dict[str, Array]]) -> tuple[Array, Any]:
        layer, index, probes = scanned
        layer = thaw(layer, aside, index)
        key = None if dropout_key is None else fold_in(dropout_key, index)
        x, taps, _ = block(x, layer, spec, options, rope, attend, key, probes)
        return x, None if observe is None else observe(jax.lax.stop_gradient(taps))

    if remat != "none":
        keep = jax.checkpoint_policies.save_only_these_names(*_SAVED) if remat == "linears" else None
        body = jax.checkpoint(body, policy=keep, prevent_cse=False)
    layers, aside = freeze(layers) if frozen else (layers, {})
    scanned = (layers, jnp.arange(spec.num_layers), dict(probes or {}))
    x, observed = jax.lax.scan(body, embed(params, tokens), scanned)
    return rms_norm(x, params["norm"], spec.rms_norm_eps), observed


def forward(
    params: Params,
    tokens: Array,
    spec: ModelSpec,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    mask_forward: MaskForward = "exact",
    compute_dtype: Any = None,
) -> Array:
    """Logits at every position.

    Args:
        params: parameter tree.
        tokens: int `[B,T]`, right-padded.
        spec: the model, static under jit.
        adapters: LoRA adapters, or None.
        masks: name -> mask `[L,O,I]` (True = kept; bool or packed, see `efx_jax.masks`), or None.
        mask_forward: how masks act, see `efx_jax.linear.linear`.
        compute_dtype: dtype of the matmul operands; None takes the weights'.

    Returns:
        float32 `[B,T,V]`.
    """
    hidden = hidden_states(
        params, tokens, spec, adapters, masks, mask_forward=mask_forward, compute_dtype=compute_dtype
    )
    head = head_weight(params)
    dtype = head.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    return contract("btd,vd->btv", hidden.astype(dtype), head.astype(dtype))
