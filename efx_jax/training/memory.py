"""What training holds on one device, in bytes by category, counted from shapes alone.

An upper estimate: every array that the program's text names is counted, though a compiler fuses some of them away.
`e` is the width of a stored weight and of the residual stream, `c` that of a matmul operand, in bytes.
"""

import dataclasses
import math
from collections.abc import Mapping

from efx_jax.config import Config
from efx_jax.config_prune import n_of_m
from efx_jax.model.attention import query_block
from efx_jax.model.spec import LINEARS, ModelSpec, linear_shapes, param_shapes
from efx_jax.parallel.mesh import mesh_sizes
from efx_jax.parallel.partition import BATCH, axes_size, linear_axes, partition
from efx_jax.pruning.average import keeps_scores, moves_base
from efx_jax.pruning.event import goes_by_block, needs_gram
from efx_jax.pruning.statistics import INPUT_OF, INPUTS
from efx_jax.training.accounting import (
    calibration_length,
    generator_parameters,
    input_widths,
    rows_of_teacher,
    softened_weights,
)
from efx_jax.training.gradients import importance_bytes
from efx_jax.training.step import has_teacher

Bytes = dict[str, int]
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4
_PERMUTED = ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj")
# What `efx_jax.model.loss` works on at a time.
_LOSS_TOKENS = 512
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device: what stays, and what a step and an event need on top, by category."""

    resident: Bytes
    step: Bytes
    event: Bytes

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(sum(self.step.values()), sum(self.event.values()))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the bytes depend on besides the settings.

    Attributes:
        dtype: dtype of the stored weights.
        rows: sequences per forward pass, over all devices.
        length: tokens per sequence.
        events: number of prune events; 0 means no masks.
        fused_attention: whether attention keeps its scores on the chip (cuDNN); else it goes through query blocks.
    """

    dtype: str
    rows: int
    length: int
    events: int
    fused_attention: bool


def memory(spec: ModelSpec, config: Config, layout: Layout) -> Memory:
    """The bytes of one device of the mesh.

    Args:
        spec: the model.
        config: adapters, pruning, rematerialisation, mesh and dtypes.
        layout: batch, weights and attention.
    """
    event = event_bytes(spec, config, layout) if layout.events else {}
    return Memory(resident_bytes(spec, config, layout), step_bytes(spec, config, layout), event)


def resident_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What lies on the device from the first step to the last."""
    along = mesh_sizes(config.mesh)
    adapters = _FLOAT32 * _adapter_parameters(spec, config, along)
    return {
        "weights": _WIDTH[layout.dtype] * _weights(spec, along),
        "masks": mask_bytes(spec, config, along) if layout.events else 0,
        "adapters": adapters,
        "optimizer": 2 * adapters,
        "generator": 3 * _FLOAT32 * generator_parameters(spec, config),
        # The run keeps it where an event moves the base: what the teacher "base" reads, and what a restart begins with.
        "linears of the first base": _WIDTH[layout.dtype] * sum(_linear_entries(spec, along).values())
        if layout.events and moves_base(config.prune)
        else 0,
        "teacher": _WIDTH[layout.dtype] * _teacher_weights(spec, config, along) if layout.events else 0,
        "moving average": _FLOAT32 * _average_entries(spec, config, along, layout.events),
    }


def step_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What one training step needs on top of `resident_bytes`, at its widest place."""
    along = mesh_sizes(config.mesh)
    e, c = _WIDTH[layout.dtype], _WIDTH[config.model.compute_dtype]
    gradients = 2 * _FLOAT32 * _adapter_parameters(spec, config, along)  # the sum, and one micro-batch's
    rows = -(-layout.rows // axes_size(BATCH, along))
    tokens = rows * layout.length
    return {
        "gradients": gradients,
        "saved activations": saved_activations(spec, config, layout, rows),
        "backward of a block": block_working_set(spec, config, layout, rows),
        "soft masks": _search_bytes(spec, config, e),
        "U and dU": _matrix_buffers(spec, config, along, e, c, masked=layout.events > 0),
        "copies of weights": _weight_copies(spec, along, e, c),
        "teacher's pass": _teacher_bytes(spec, config, layout, along) if has_teacher(config) else 0,
        "loss": (4 if has_teacher(config) else 2) * _LOSS_TOKENS * -(-spec.vocab_size // along["tensor"]) * _FLOAT32
        + tokens * spec.hidden_size * (e + 2 * c),
    }


def _teacher_bytes(spec: ModelSpec, config: Config, layout: Layout, along: Mapping[str, int]) -> int:
    """A block's pass over what the teacher reads; its states, and the model's and their gradient at the same rows."""
    rows = -(-rows_of_teacher(config, layout.rows) // axes_size(BATCH, along))
    states = 3 * rows * layout.length * spec.hidden_size * _WIDTH[layout.dtype]
    return block_forward_set(spec, config, layout, rows) + states


def event_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What a prune event needs on top of `resident_bytes`: statistics, scores and repair of one block at a time."""
    prune, along = config.prune, mesh_sizes(config.mesh)
    if prune.score == "atp":
        return {"new masks": mask_bytes(spec, config, along)}
    e = _WIDTH[layout.dtype]
    length = calibration_length(spec, config)
    shards = axes_size(BATCH, along)
    rows = -(-max(1, min(prune.calibration_rows, prune.calibration_tokens // length)) // shards)
    grams = needs_gram(prune) or prune.score == "dpruner"
    # D-Pruner's pass for its general importance goes by block as well.
    by_block = goes_by_block(prune) or prune.score == "dpruner"
    kept = prune.calibration_rows * length * spec.hidden_size * e // shards if by_block else 0
    paths = 2 if prune.dense_path else 1
    entries = _linear_entries(spec, along)
    linears = sum(entries.values())
    block = linears // spec.num_layers
    return {
        "calibration rows": paths * kept,
        "calibration batch": block_forward_set(spec, config, dataclasses.replace(layout, length=length), rows),
        "Grams": paths * 2 * _FLOAT32 * sum(width**2 for width in input_widths(spec).values()) if grams else 0,
        # U and scores in float32, the bits that selection compares, and the mask.
        "scores": block * (3 * _FLOAT32 + 1),
        "importance": importance_bytes(config, entries, e),
        "recovery": _recovery_bytes(spec, config, along),
        "new masks": mask_bytes(spec, config, along),
        # That of the first event takes the place of `linears of the first base`.
        "new base": e * linears if moves_base(prune) and layout.events > 1 else 0,
        # Beside the base as it was and as it will be.
        "units in another order": e * sum(entries[name] for name in _PERMUTED) if prune.permute else 0,
    }


def saved_activations(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What the forward pass keeps for the backward pass, for `rows` sequences on this device."""
    e, tokens = _WIDTH[layout.dtype], rows * layout.length
    stream = (spec.num_layers + 1) * tokens * spec.hidden_size * e
    if config.train.remat == "block":
        return stream
    if config.train.remat == "linears":
        q, kv, f = (width // config.mesh.tensor for width in _widths(spec))
        # q, k, v, the attention's output, o, gate and up.
        return stream + spec.num_layers * tokens * e * (2 * q + 2 * kv + spec.hidden_size + 2 * f)
    return spec.num_layers * block_residuals(spec, config, layout, rows) + tokens * spec.hidden_size * e


def block_residuals(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What the backward pass of one block reads of its forward pass, as traced; `rows` sequences on this device."""
    e, c = _WIDTH[layout.dtype], _WIDTH[config.model.compute_dtype]
    q, kv, f = (width // config.mesh.tensor for width in _widths(spec))
    # Where the stream is wider than the operands, each of the five linears that read it casts its own copy.
    casts = 2 if c == e else 5
    stream = (2 * _FLOAT32 + casts * c) * spec.hidden_size
    per_token = stream + c * (2 * q + 2 * kv) + (5 * _FLOAT32 + c) * f
    return rows * layout.length * per_token


def block_working_set(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What one block's backward pass needs beside what is saved: its residuals, and the widest gradients at once."""
    residuals = block_residuals(spec, config, layout, rows) if config.train.remat != "none" else 0
    e, tokens = _WIDTH[layout.dtype], rows * layout.length
    # The gradients of gate, up and the inputs of down, and, where the adapter has a product of its own (always before
    # the first event), both outputs in float32 before they are added.
    mlp = tokens * (3 * _FLOAT32 + 2 * e) * spec.intermediate_size // config.mesh.tensor
    stream = 2 * tokens * _FLOAT32 * spec.hidden_size
    return residuals + stream + max(mlp, _attention_bytes(spec, config, layout, rows, buffers=4))


def block_forward_set(spec: ModelSpec, config: Config, layout: Layout, rows: int) -> int:
    """What one block's forward pass needs when nothing is kept: the stream, and the MLP's or the attention's arrays."""
    e, tokens = _WIDTH[layout.dtype], rows * layout.length
    q, kv, f = (width // config.mesh.tensor for width in _widths(spec))
    heads = tokens * (_FLOAT32 + e) * (2 * q + 2 * kv) + _attention_bytes(spec, config, layout, rows, buffers=2)
    mlp = tokens * (_FLOAT32 + 3 * e) * f
    return 3 * tokens * spec.hidden_size * e + max(heads, mlp)


def _attention_bytes(spec: ModelSpec, config: Config, layout: Layout, rows: int, buffers: int) -> int:
    """`buffers` arrays of scores of the query blocks that exist at once; of fused kernels one number per query."""
    heads = spec.num_heads // config.mesh.tensor
    if layout.fused_attention:
        return rows * heads * layout.length * _FLOAT32
    return rows * heads * query_block(layout.length) * layout.length * buffers * _FLOAT32


def _matrix_buffers(spec: ModelSpec, config: Config, along: Mapping[str, int], e: int, c: int, masked: bool) -> int:
    """U of the largest matrix, whole over fsdp, and with exact masks its gradient in float32."""
    largest = max(math.prod(shape) for shape in linear_shapes(spec).values()) // along["tensor"]
    mode = config.prune.mask_forward if masked else "dense"
    if mode == "exact":
        return largest * (c + _FLOAT32)
    return largest * c if mode in ("ste", "frozen") or c != e else 0


def _weight_copies(spec: ModelSpec, along: Mapping[str, int], e: int, c: int) -> int:
    """One block and the head gathered over fsdp, and the head in the operands' dtype."""
    head = spec.vocab_size * spec.hidden_size // along["tensor"]
    cast = head * c if c != e else 0
    if along["fsdp"] == 1:
        return cast
    block = sum(math.prod(shape) for shape in linear_shapes(spec).values()) // along["tensor"]
    return e * (block + head) + cast


def _recovery_bytes(spec: ModelSpec, config: Config, along: Mapping[str, int]) -> int:
    """The largest intermediate arrays of a surgeon, or of what chooses the mask on a Gram."""
    prune, shapes = config.prune, linear_shapes(spec)
    sweep = _sweep_bytes(spec, config, along) if prune.score == "sparsegpt" or prune.recovery == "obs" else 0
    largest = max(_shard(name, shapes[name], along) for name in prune.targets)
    # U, what is lost times the Gram, either move alone, two rows of the Gram for every row; the pairs of all groups.
    pattern = n_of_m(prune.group)
    swaps = largest * (8 + (4 * pattern[1] if pattern else 0)) * _FLOAT32 if prune.swaps else 0
    chosen = max(sweep, swaps)
    if prune.recovery == "gram_pbs":
        # With A, what is lost, its product with the Gram and the residual.
        return max(chosen, prune.chunk_mib * _MIB + (5 * largest * _FLOAT32 if prune.pbs_rounds else 0))
    if prune.recovery == "pbs":
        return max(chosen, 2 * _FLOAT32 * config.lora.rank * max(input_widths(spec).values()))
    if prune.recovery != "admm":
        return chosen

    def admm(source: str) -> int:
        names = [name for name in prune.targets if INPUT_OF[name] == source]
        entries = sum(_shard(name, shapes[name], along) for name in names)
        # Target, its product with the Gram, X, Y, Z and the mask; and of the input's width the Gram, what it is
        # factored from, its factor and the inverse.
        return entries * (5 * _FLOAT32 + 1) + 4 * _FLOAT32 * input_widths(spec)[source] ** 2 * bool(names)

    return max(chosen, *(admm(source) for source in INPUTS))


def _sweep_bytes(spec: ModelSpec, config: Config, along: Mapping[str, int]) -> int:
    """A block's masks and new weights, the largest matrix's change and importance, and the factors of the Grams."""
    shapes, names = linear_shapes(spec), config.prune.targets
    entries = [_shard(name, shapes[name], along) for name in names]
    widest = max(shapes[name][1] for name in names)
    return sum(entries) * (_FLOAT32 + 1) + max(entries) * 3 * _FLOAT32 + 4 * _FLOAT32 * widest**2


def _search_bytes(spec: ModelSpec, config: Config, e: int) -> int:
    """While ATP searches: softly masked weights and their gradient, and the generator's gradient, sum and part."""
    parameters = generator_parameters(spec, config)
    return 2 * e * softened_weights(spec, config) + 2 * _FLOAT32 * parameters if parameters else 0


def mask_bytes(spec: ModelSpec, config: Config, along: Mapping[str, int]) -> int:
    """The masks of the pruned matrices, eight inputs to a byte."""
    shapes = linear_shapes(spec)
    return spec.num_layers * sum(
        _shard(name, (shapes[name][0], -(-shapes[name][1] // 8)), along) for name in config.prune.targets
    )


def _weights(spec: ModelSpec, along: Mapping[str, int]) -> int:
    shapes = param_shapes(spec)
    layers = sum(_entries(("layers", name), shape, along) for name, shape in shapes["layers"].items())
    return layers + sum(_entries((name,), shape, along) for name, shape in shapes.items() if name != "layers")


def _teacher_weights(spec: ModelSpec, config: Config, along: Mapping[str, int]) -> int:
    """Weights of a teacher of the model's size; the base is there anyway."""
    return _weights(spec, along) if has_teacher(config) and config.distill.teacher != "base" else 0


def _linear_entries(spec: ModelSpec, along: Mapping[str, int]) -> dict[str, int]:
    """Entries of one device's part of every linear, all blocks together."""
    return {name: spec.num_layers * _shard(name, shape, along) for name, shape in linear_shapes(spec).items()}


def _adapter_parameters(spec: ModelSpec, config: Config, along: Mapping[str, int]) -> int:
    shapes, rank = linear_shapes(spec), config.lora.rank
    return spec.num_layers * sum(
        _entries(("lora_a", name), (rank, shapes[name][1]), along)
        + _entries(("lora_b", name), (shapes[name][0], rank), along)
        for name in config.lora.targets
    )


def _average_entries(spec: ModelSpec, config: Config, along: Mapping[str, int], events: int) -> int:
    """Numbers that the moving average keeps; see `efx_jax.pruning.average.PruneState`."""
    shapes, prune = linear_shapes(spec), config.prune
    names = [name for name in LINEARS if name in prune.targets]
    # An average that is kept as it is stays with the host.
    if not events or prune.ema == 1 or keeps_scores(prune):
        return 0
    reach = sum(_entries(("reach", name), (shapes[name][0],), along) for name in names)
    norms = sum(input_widths(spec)[source] for source in {INPUT_OF[name] for name in names})
    return events * (spec.num_layers * (reach + norms) + _adapter_parameters(spec, config, along))


def _shard(name: str, shape: tuple[int, int], along: Mapping[str, int]) -> int:
    """Entries of one device's part of a matrix that lies as linear `name` does."""
    axes = linear_axes(name)
    return -(-shape[0] // axes_size(axes.rows, along)) * -(-shape[1] // axes_size(axes.columns, along))


def _entries(path: tuple[str, ...], shape: tuple[int, ...], along: Mapping[str, int]) -> int:
    """Entries of one device's part of the array at `path`, by the same rule that places it."""
    parts = partition(path, len(shape))
    axes = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in parts]
    axes += [()] * (len(shape) - len(axes))
    return math.prod(-(-size // axes_size(names, along)) for size, names in zip(shape, axes, strict=True))


def _widths(spec: ModelSpec) -> tuple[int, int, int]:
    """Outputs of q, of k or v, and of gate or up."""
    return spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
