"""Bytes of the activations of a pass on one device, counted from shapes alone; see `efx_jax.training.memory`.

`e` is the width of a stored weight and of the residual stream, `c` that of a matmul operand, in bytes.
"""

import dataclasses

from efx_jax.config import Config
from efx_jax.model.attention import query_block
from efx_jax.model.spec import ModelSpec, linear_shapes

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the byte counts depend on besides the settings.

    Attributes:
        dtype: dtype of the stored weights.
        rows: sequences per forward pass, over all devices.
        length: tokens per sequence.
        events: number of prune events; 0 means no masks.
        fused_attention: whether attention keeps its scores on the chip (cuDNN); else it works in query blocks.
        answer_tokens: the longest answer that an evaluation generates; 0 means that it only scores given ones.
    """

    dtype: str
    rows: int
    length: int
    events: int
    fused_attention: bool
    answer_tokens: int = 0


def saved_activations(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What the forward pass keeps for the backward pass, for `rows` sequences on this device."""
    e, tokens = WIDTH[layout.dtype], rows * layout.length
    stream = (spec.num_layers + 1) * tokens * spec.hidden_size * e
    if config.train.remat == "block":
        return stream
    if config.train.remat == "linears":
        q, kv, f = (width // config.mesh.tensor for width in _widths(spec))
        # q, k, v, the attention's output, o, gate and up.
        return stream + spec.num_layers * tokens * e * (2 * q + 2 * kv + spec.hidden_size + 2 * f)
    return spec.num_layers * block_residuals(spec, config, layout, rows) + tokens * spec.hidden_size * e


def block_residuals(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What one block's backward pass reads from its forward pass, as traced; `rows` sequences on this device."""
    e, c = WIDTH[layout.dtype], WIDTH[config.model.compute_dtype]
    q, kv, f = (width // config.mesh.tensor for width in _widths(spec))
    # If the stream and the operands differ in width, each of the five linears that read it casts its own copy.
    casts = 2 if c == e else 5
    stream = (2 * FLOAT32 + casts * c) * spec.hidden_size
    per_token = stream + c * (2 * q + 2 * kv) + (5 * FLOAT32 + c) * f + _dropped_inputs(spec, config)
    return rows * layout.length * per_token


def _dropped_inputs(spec: ModelSpec, config: Config) -> int:
    """Bytes per token that dropout adds: the input of every adapter, and which of its entries are kept."""
    if not config.lora.dropout:
        return 0
    inputs = {name: in_dim for name, (_, in_dim) in linear_shapes(spec).items()}
    # The outputs of attention and of the MLP's first half are split over the devices.
    parts = {"o_proj": config.mesh.tensor, "down_proj": config.mesh.tensor}
    width = sum(inputs[name] // parts.get(name, 1) for name in config.lora.targets)
    return (WIDTH[config.model.compute_dtype] + 1) * width


def block_working_set(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What one block's backward pass needs on top of what is saved: its residuals, and the largest live gradients."""
    residuals = block_residuals(spec, config, layout, rows) if config.train.remat != "none" else 0
    e, tokens = WIDTH[layout.dtype], rows * layout.length
    # The gradients of gate, up and the inputs of down, and, if the adapter has a separate product (always before the
    # first event), both outputs in float32 before they are added.
    mlp = tokens * (3 * FLOAT32 + 2 * e) * spec.intermediate_size // config.mesh.tensor
    stream = 2 * tokens * FLOAT32 * spec.hidden_size
    return residuals + stream + max(mlp, _attention_bytes(spec, config, layout, rows, buffers=4))


def block_forward_set(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What one block's forward pass needs when nothing is kept: the stream, and the MLP's or the attention's arrays."""
    e, tokens = WIDTH[layout.dtype], rows * layout.length
    q, kv, f = (width // config.mesh.tensor for width in _widths(spec))
    heads = tokens * (FLOAT32 + e) * (2 * q + 2 * kv) + _attention_bytes(spec, config, layout, rows, buffers=2)
    mlp = tokens * (FLOAT32 + 3 * e) * f
    return 3 * tokens * spec.hidden_size * e + max(heads, mlp)


def _attention_bytes(spec: ModelSpec, config: Config, layout: Layout, rows: int, buffers: int) -> int:
    """`buffers` arrays of attention scores for one query block at a time; with fused kernels one number per query."""
    heads = spec.num_heads // config.mesh.tensor
    if layout.fused_attention:
        return rows * heads * layout.length * FLOAT32
    return rows * heads * query_block(layout.length) * layout.length * buffers * FLOAT32


def _widths(spec: ModelSpec) -> tuple[int, int, int]:
    """Output widths of q, of k or v, and of gate or up."""
    return spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
