"""What training holds on one device, in bytes by category, counted from shapes alone.

An upper estimate: every array that the source code names is counted, though the compiler fuses some of them away.
`e` is the width of a stored weight and of the residual stream, `c` that of a matmul operand, in bytes.
"""

import dataclasses
import math
from collections.abc import Mapping

from efx_jax.config import Config
from efx_jax.config_event import goes_by_block, keeps_scores, moves_base, n_of_m, needs_gram, reads_importance
from efx_jax.evaluation.likelihood import LOGITS_BYTES
from efx_jax.model.loss import CHUNK_TOKENS
from efx_jax.model.spec import LINEARS, ModelSpec, linear_shapes, param_shapes
from efx_jax.parallel.mesh import mesh_sizes
from efx_jax.parallel.partition import BATCH, axes_size, linear_axes, partition
from efx_jax.pruning.statistics import INPUT_OF, INPUTS
from efx_jax.training.accounting import (
    calibration_length,
    generator_parameters,
    input_widths,
    rows_of_teacher,
    softened_weights,
)
from efx_jax.training.activations import (
    FLOAT32,
    WIDTH,
    Layout,
    block_forward_set,
    block_working_set,
    saved_activations,
)
from efx_jax.training.distillation import exchanges, positions_read
from efx_jax.training.gradients import importance_bytes
from efx_jax.training.step import has_teacher

Bytes = dict[str, int]
_PERMUTED = ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj")
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device: what stays, and what a step, the gradients of a score, the event after them, and an
    evaluation during training each need on top."""

    resident: Bytes
    step: Bytes
    score: Bytes
    event: Bytes
    evaluation: Bytes

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(
            sum(part.values()) for part in (self.step, self.score, self.event, self.evaluation)
        )


def memory(spec: ModelSpec, config: Config, layout: Layout) -> Memory:
    """The bytes on one device of the mesh.

    Args:
        spec: the model.
        config: adapters, pruning, rematerialisation, mesh and dtypes.
        layout: batch, weights and attention.
    """
    score, event = (count(spec, config, layout) if layout.events else {} for count in (score_bytes, event_bytes))
    resident, step = resident_bytes(spec, config, layout), step_bytes(spec, config, layout)
    return Memory(resident, step, score, event, evaluation_bytes(spec, config, layout))


def resident_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What stays on the device from the first step to the last."""
    along = mesh_sizes(config.mesh)
    adapters = FLOAT32 * _adapter_parameters(spec, config, along)
    return {
        "weights": WIDTH[layout.dtype] * _weights(spec, along),
        "masks": mask_bytes(spec, config, along) if layout.events else 0,
        "adapters": adapters,
        "optimizer": 2 * adapters,
        "generator": 3 * FLOAT32 * generator_parameters(spec, config),
        # Kept if an event rewrites the base: the teacher "base" reads it, and a restart begins with it.
        "linears of the first base": WIDTH[layout.dtype] * sum(_linear_entries(spec, along).values())
        if layout.events and moves_base(config.prune)
        else 0,
        "teacher": WIDTH[layout.dtype] * _teacher_weights(spec, config, along) if layout.events else 0,
        "moving average": FLOAT32 * _average_entries(spec, config, along, layout.events),
    }


def step_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What one training step needs on top of `resident_bytes`, at its peak."""
    along = mesh_sizes(config.mesh)
    gradients = 2 * FLOAT32 * _adapter_parameters(spec, config, along)  # the sum and one micro-batch's
    return {
        "gradients": gradients,
        **_pass_bytes(spec, config, layout, masked=layout.events > 0, logits=4 if has_teacher(config) else 2),
        "soft masks": _search_bytes(spec, config, WIDTH[layout.dtype]),
        "teacher's pass": _teacher_bytes(spec, config, layout, along) if has_teacher(config) else 0,
    }


def _pass_bytes(spec: ModelSpec, config: Config, layout: Layout, masked: bool, logits: int) -> Bytes:
    """A forward and a backward pass, without the gradients that they compute."""
    along = mesh_sizes(config.mesh)
    e, c = WIDTH[layout.dtype], WIDTH[config.model.compute_dtype]
    rows = -(-layout.rows // axes_size(BATCH, along))
    return {
        "saved activations": saved_activations(spec, config, layout, rows),
        "backward of a block": block_working_set(spec, config, layout, rows),
        "U and dU": _matrix_buffers(spec, config, along, e, c, masked),
        "copies of weights": _weight_copies(spec, along, e, c),
        "loss": _loss_bytes(spec, config, layout, rows, logits),
    }


def _loss_bytes(spec: ModelSpec, config: Config, layout: Layout, rows: int, logits: int) -> int:
    """`logits` arrays of a chunk's logits at a time, the hidden states before the head, and their gradient."""
    e, c = WIDTH[layout.dtype], WIDTH[config.model.compute_dtype]
    states = rows * layout.length * spec.hidden_size * (e + 2 * c)
    return logits * CHUNK_TOKENS * -(-spec.vocab_size // config.mesh.tensor) * FLOAT32 + states


def _teacher_bytes(spec: ModelSpec, config: Config, layout: Layout, along: Mapping[str, int]) -> int:
    """A block's pass over what the teacher reads; its states, and the model's states and gradient at the same rows.

    If rows come from other devices, also a part of all rows' states and of their gradient, see `take_rows`.
    """
    shards = axes_size(BATCH, along)
    rows = -(-rows_of_teacher(config, layout.rows) // shards)
    layout = dataclasses.replace(layout, length=positions_read(config.distill.prefix_share, layout.length))
    is_shared_out = shards > 1 and config.distill.row_share < 1
    handed_over = 2 * layout.rows // exchanges(layout.length, shards) if is_shared_out else 0
    states = (3 * rows + handed_over) * layout.length * spec.hidden_size * WIDTH[layout.dtype]
    return block_forward_set(spec, config, layout, rows) + states


def score_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What the gradients that a score reads need on top of `resident_bytes`, before the event itself."""
    if not reads_importance(config.prune):
        return {}
    # The other scores read training batches.
    reads = _calibrating(spec, config, layout) if config.prune.score == "foresight_loss" else layout
    entries = _linear_entries(spec, mesh_sizes(config.mesh))
    return {
        **_pass_bytes(spec, config, reads, masked=layout.events > 1, logits=2),
        "importance": importance_bytes(config, entries, WIDTH[layout.dtype]),
    }


def _calibrating(spec: ModelSpec, config: Config, layout: Layout) -> Layout:
    """The layout of a calibration batch."""
    length = calibration_length(spec, config)
    rows = max(1, min(config.prune.calibration_rows, config.prune.calibration_tokens // length))
    return dataclasses.replace(layout, rows=rows, length=length)


def event_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What a prune event needs on top of `resident_bytes`: statistics, scores and repair of one block at a time."""
    prune, along = config.prune, mesh_sizes(config.mesh)
    if prune.score == "atp":
        return {"new masks": mask_bytes(spec, config, along)}
    e = WIDTH[layout.dtype]
    length, shards = calibration_length(spec, config), axes_size(BATCH, along)
    calibrating = _calibrating(spec, config, layout)
    rows = -(-calibrating.rows // shards)
    grams = needs_gram(prune) or prune.score == "dpruner"
    # D-Pruner's pass for its general importance goes block by block as well.
    by_block = goes_by_block(prune) or prune.score == "dpruner"
    kept = prune.calibration_rows * length * spec.hidden_size * e // shards if by_block else 0
    paths = 2 if prune.dense_path else 1
    entries = _linear_entries(spec, along)
    linears = sum(entries.values())
    block = linears // spec.num_layers
    return {
        "calibration rows": paths * kept,
        "calibration batch": block_forward_set(spec, config, calibrating, rows),
        "Grams": _gram_bytes(spec, paths) if grams else 0,
        # U and scores in float32, the bits that selection compares, and the mask.
        "scores": block * (3 * FLOAT32 + 1),
        "importance": importance_bytes(config, entries, e),
        "recovery": _recovery_bytes(spec, config, along),
        "new masks": mask_bytes(spec, config, along),
        # The first event's new base is already counted as `linears of the first base`.
        "new base": e * linears if moves_base(prune) and layout.events > 1 else 0,
        # In addition to the base before and after the event.
        "units in another order": e * sum(entries[name] for name in _PERMUTED) if prune.permute else 0,
    }


def _matrix_buffers(spec: ModelSpec, config: Config, along: Mapping[str, int], e: int, c: int, masked: bool) -> int:
    """U of the largest matrix, gathered over fsdp, and with exact masks its gradient in float32."""
    largest = max(math.prod(shape) for shape in linear_shapes(spec).values()) // along["tensor"]
    mode = config.prune.mask_forward if masked else "dense"
    if mode == "exact":
        return largest * (c + FLOAT32)
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
    """The largest intermediate arrays of a surgeon, or of mask selection with a Gram."""
    prune, shapes = config.prune, linear_shapes(spec)
    sweep = _sweep_bytes(spec, config, along) if prune.score == "sparsegpt" or prune.recovery == "obs" else 0
    largest = max(_shard(name, shapes[name], along) for name in prune.targets)
    # U, the loss times the Gram, either move by itself, two rows of the Gram per row; the pairs of all groups.
    pattern = n_of_m(prune.group)
    swaps = largest * (8 + (4 * pattern[1] if pattern else 0)) * FLOAT32 if prune.swaps else 0
    chosen = max(sweep, swaps)
    if prune.recovery == "gram_pbs":
        # If A is refitted, also the loss, its product with the Gram and the residual.
        return max(chosen, prune.chunk_mib * _MIB + (5 * largest * FLOAT32 if prune.pbs_rounds else 0))
    if prune.recovery == "pbs":
        return max(chosen, 2 * FLOAT32 * config.lora.rank * max(input_widths(spec).values()))
    if prune.recovery != "admm":
        return chosen

    def admm(source: str) -> int:
        names = [name for name in prune.targets if INPUT_OF[name] == source]
        entries = sum(_shard(name, shapes[name], along) for name in names)
        # Target, its product with the Gram, X, Y, Z and the mask; and, of the input's width squared, the Gram, the
        # matrix to factor, its factor and the inverse.
        return entries * (5 * FLOAT32 + 1) + 4 * FLOAT32 * input_widths(spec)[source] ** 2 * bool(names)

    return max(chosen, *(admm(source) for source in INPUTS))


def _gram_bytes(spec: ModelSpec, paths: int) -> int:
    """A block's sums and those of a batch, and the parts that the widest is assembled from."""
    widths = input_widths(spec).values()
    return FLOAT32 * (paths * 2 * sum(width**2 for width in widths) + max(widths) ** 2)


def _sweep_bytes(spec: ModelSpec, config: Config, along: Mapping[str, int]) -> int:
    """A block's masks and new weights, the largest matrix's change and importance, and the factors of the Grams."""
    shapes, names = linear_shapes(spec), config.prune.targets
    entries = [_shard(name, shapes[name], along) for name in names]
    widest = max(shapes[name][1] for name in names)
    return sum(entries) * (FLOAT32 + 1) + max(entries) * 3 * FLOAT32 + 4 * FLOAT32 * widest**2


def _search_bytes(spec: ModelSpec, config: Config, e: int) -> int:
    """During ATP's search: softly masked weights and their gradient, and the generator's gradient, sum and part."""
    parameters = generator_parameters(spec, config)
    return 2 * e * softened_weights(spec, config) + 2 * FLOAT32 * parameters if parameters else 0


def evaluation_bytes(spec: ModelSpec, config: Config, layout: Layout) -> Bytes:
    """What measuring the model takes: a forward pass over windows or rows; to generate answers also their cache.

    Generating with adapters takes merged linears, in addition to those that training keeps. The base and the export
    have none; scoring given answers merges block by block.
    """
    along, evaluation = mesh_sizes(config.mesh), config.eval
    e, c = WIDTH[layout.dtype], WIDTH[config.model.compute_dtype]
    length = config.data.max_length
    sizes = ((max(1, evaluation.batch_size // 4), evaluation.window), (evaluation.batch_size, length))

    shards = axes_size(BATCH, along)
    own_tokens = [-(-rows // shards) * length for rows, length in sizes]

    def forward(rows: int, length: int) -> int:
        # Attention in evaluation takes the XLA path. Behind the last block: the states before and after the norm.
        taken, own = dataclasses.replace(layout, length=length, fused_attention=False), -(-rows // shards)
        return block_forward_set(spec, config, taken, own) + own * length * spec.hidden_size * (e + c)

    meets_adapters = evaluation.every or evaluation.every_epochs or config.lora.adapter or layout.events == 1
    merged = bool(layout.answer_tokens and meets_adapters)
    rows = -(-evaluation.batch_size // shards)
    states = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim // config.mesh.tensor
    return {
        "forward pass": max(forward(*size) for size in sizes),
        "U of a matrix": _matrix_buffers(spec, config, along, e, c, masked=layout.events > 0),
        "copies of weights": _weight_copies(spec, along, e, c),
        "logits": 2 * min(LOGITS_BYTES, max(own_tokens) * -(-spec.vocab_size // along["tensor"]) * FLOAT32),
        "merged linears": merged * e * sum(_linear_entries(spec, along).values()),
        "keys and values": rows * (length + layout.answer_tokens) * states * c if layout.answer_tokens else 0,
    }


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
    """Weights of a teacher of the model's size; 0 for the teacher "base", which is in memory anyway."""
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
    """How many numbers the moving average keeps; see `efx_jax.pruning.average.PruneState`."""
    shapes, prune = linear_shapes(spec), config.prune
    names = [name for name in LINEARS if name in prune.targets]
    # An average that is stored as scores stays in the hosts' memory, see `host_bytes`.
    if events < 2 or prune.ema == 1 or keeps_scores(prune):
        return 0
    reach = sum(_entries(("reach", name), (shapes[name][0],), along) for name in names)
    norms = sum(input_widths(spec)[source] for source in {INPUT_OF[name] for name in names})
    return events * (spec.num_layers * (reach + norms) + _adapter_parameters(spec, config, along))


def host_bytes(spec: ModelSpec, config: Config, events: int) -> int:
    """The moving average that is stored as scores, in the memory of all hosts together."""
    shapes, prune = linear_shapes(spec), config.prune
    if events < 2 or prune.ema == 1 or not keeps_scores(prune):
        return 0
    return FLOAT32 * spec.num_layers * sum(math.prod(shapes[name]) for name in prune.targets)


def _shard(name: str, shape: tuple[int, int], along: Mapping[str, int]) -> int:
    """Entries of one device's part of a matrix sharded like linear `name`."""
    axes = linear_axes(name)
    return -(-shape[0] // axes_size(axes.rows, along)) * -(-shape[1] // axes_size(axes.columns, along))


def _entries(path: tuple[str, ...], shape: tuple[int, ...], along: Mapping[str, int]) -> int:
    """Entries of one device's part of the array at `path`, by the rule that shards it."""
    parts = partition(path, len(shape))
    axes = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in parts]
    axes += [()] * (len(shape) - len(axes))
    return math.prod(-(-size // axes_size(names, along)) for size, names in zip(shape, axes, strict=True))
