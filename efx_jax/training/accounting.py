"""What training costs in parameters and FLOPs, counted from shapes alone.

One multiply-add is 2 FLOPs. Attention is counted as causal: half of the full square, which is what fused kernels do.
"""

import dataclasses
import functools
import math

import jax

from efx_jax.config import Config, PruneConfig, Space
from efx_jax.config_event import goes_by_block, needs_gram, reads_importance, surveyed_rows
from efx_jax.einsum import gram_share
from efx_jax.model.spec import ModelSpec, linear_shapes, param_shapes
from efx_jax.parallel.mesh import mesh_sizes
from efx_jax.parallel.partition import axes_size, batch_axes
from efx_jax.pruning.adapter_refit import CG_STEPS
from efx_jax.pruning.statistics import INPUT_OF
from efx_jax.structural.generator import init_generator
from efx_jax.structural.units import units_of
from efx_jax.training.distillation import positions_read, rows_read
from efx_jax.training.step import has_teacher

# Operations per entry of a row for one swap: either move by itself, four searches, the update.
_SWAP_FLOPS = 20


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: in the whole model, in its linears, in the pruned linears, and trainable."""

    total: int
    linears: int
    pruned: int
    trainable: int


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one token in training, forward and backward.

    Attributes:
        linears: the matmuls with W or U, and with exact masks dU.
        lora: the low-rank products.
        attention: scores and mixing.
        head: logits and their gradient, as if every token carried loss.
        recompute: what rematerialisation recomputes, attention included.
        teacher: a teacher's forward pass, and the logits of both models where it teaches.
    """

    linears: float
    lora: float
    attention: float
    head: float
    recompute: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        return self.linears + self.lora + self.attention + self.head + self.recompute + self.teacher


@dataclasses.dataclass(frozen=True)
class EventFlops:
    """FLOPs of one prune event.

    Attributes:
        passes: forward passes of the calibration rows, and backward ones for a score that reads gradients.
        grams: X^T X of the inputs.
        surgeons: what is solved in float32 with Grams: SparseGPT's sweep, swaps, recovery.
    """

    passes: float
    grams: float
    surgeons: float


@dataclasses.dataclass(frozen=True)
class _Units:
    """Multiples of O*I (`dense`) and R*(O+I) (`low_rank`) per token: the whole step, and its forward pass alone."""

    dense: int
    low_rank: int
    forward_dense: int = 2
    forward_low_rank: int = 0


def count_parameters(spec: ModelSpec, config: Config) -> Parameters:
    """The parameters of a model and of its adapters."""
    shapes = linear_shapes(spec)
    leaves = jax.tree.leaves(param_shapes(spec), is_leaf=lambda node: isinstance(node, tuple))
    return Parameters(
        total=sum(math.prod(shape) for shape in leaves),
        linears=spec.num_layers * sum(math.prod(shape) for shape in shapes.values()),
        pruned=spec.num_layers * sum(math.prod(shapes[name]) for name in config.prune.targets),
        trainable=spec.num_layers * config.lora.rank * sum(sum(shapes[name]) for name in config.lora.targets),
    )


def flops_per_token(spec: ModelSpec, config: Config, length: int, masked: bool, rows: int = 0) -> Flops:
    """FLOPs of one token of a row of `length` tokens.

    Args:
        spec: the model.
        config: adapters, mask mode, dropout and rematerialisation.
        length: T.
        masked: whether masks are in force (before the first event none are).
        rows: sequences per forward pass, of which a teacher reads a whole number; 0: all of `batch_size`.
    """
    shapes = linear_shapes(spec)
    units = {name: _units(config, name, masked) for name in shapes}
    dense = {name: spec.num_layers * out_dim * in_dim for name, (out_dim, in_dim) in shapes.items()}
    low_rank = {name: spec.num_layers * config.lora.rank * sum(shape) for name, shape in shapes.items()}
    attention = _attention_flops(spec, length)
    recompute = 0
    if config.train.remat == "block":
        # The backward pass does not need a block's output, so its last matmul is not recomputed.
        again = sum(units[name].forward_dense * dense[name] for name in shapes if name != "down_proj")
        recompute = again + sum(units[name].forward_low_rank * low_rank[name] for name in shapes) + attention
    elif config.train.remat == "linears":
        recompute = attention
    return Flops(
        linears=sum(units[name].dense * dense[name] for name in shapes),
        lora=sum(units[name].low_rank * low_rank[name] for name in shapes),
        attention=3 * attention,
        head=4 * spec.vocab_size * spec.hidden_size,
        recompute=recompute,
        teacher=_teacher_flops(spec, config, length, rows or config.train.batch_size) if masked else 0.0,
    )


def _attention_flops(spec: ModelSpec, length: int) -> int:
    """Forward FLOPs of scores and mixing for one token of a row of `length`."""
    return 2 * length * spec.num_heads * spec.head_dim * spec.num_layers


def _forward_flops(spec: ModelSpec, length: int) -> int:
    """Forward FLOPs of one token through all blocks of a model without adapters."""
    linears = spec.num_layers * sum(math.prod(shape) for shape in linear_shapes(spec).values())
    return 2 * linears + _attention_flops(spec, length)


def _teacher_flops(spec: ModelSpec, config: Config, length: int, rows: int) -> float:
    """Teacher FLOPs per token, assuming a teacher of the model's size."""
    if not has_teacher(config):
        return 0.0
    head = config.distill.share * 6 * spec.vocab_size * spec.hidden_size
    read = positions_read(config.distill.prefix_share, length)
    return rows_of_teacher(config, rows) / rows * read / length * (_forward_flops(spec, read) + head)


def rows_of_teacher(config: Config, rows: int) -> int:
    """Sequences of a forward pass of `rows` that the teacher reads, over all devices."""
    along = mesh_sizes(config.mesh)
    return rows_read(config.distill.row_share, rows, axes_size(batch_axes(rows, along), along))


def flops_per_pass(spec: ModelSpec, config: Config, masked: bool) -> float:
    """FLOPs of one forward and backward pass that do not depend on its tokens: forming U, and dA and dB from dU."""
    if not masked or config.prune.mask_forward not in ("exact", "ste"):
        return 0.0
    shapes = linear_shapes(spec)
    names = set(config.lora.targets) & set(config.prune.targets)
    products = 3 if config.train.remat == "block" else 2
    products += 2 if config.prune.mask_forward == "exact" else 0
    return float(2 * products * config.lora.rank * spec.num_layers * sum(math.prod(shapes[name]) for name in names))


def flops_per_step(spec: ModelSpec, config: Config, length: int, passes: int, masked: bool) -> float:
    """FLOPs of one update of `batch_size` rows of `length` tokens in `passes` micro-batches.

    It counts all positions; batches that `efx_jax.training.step.without_silent_tail` cuts take fewer.
    """
    tokens = config.train.batch_size * length
    per_token = flops_per_token(spec, config, length, masked, config.train.batch_size // passes).total
    return tokens * per_token + passes * flops_per_pass(spec, config, masked)


def calibration_length(spec: ModelSpec, config: Config) -> int:
    """Maximum number of tokens in a calibration row."""
    prune = config.prune
    longest = config.data.max_length if prune.calibration == ("train",) else prune.calibration_length
    return min(prune.calibration_length, longest, spec.max_position_embeddings)


def input_widths(spec: ModelSpec) -> dict[str, int]:
    """Width I of the four inputs whose statistics an event collects."""
    return {INPUT_OF[name]: in_dim for name, (_, in_dim) in linear_shapes(spec).items()}


def event_flops(spec: ModelSpec, prune: PruneConfig, rank: int, tokens: int, length: int) -> EventFlops:
    """FLOPs of an event that calibrates on `tokens` tokens in rows of `length`; Grams as one device forms them.

    Not counted: gradients of training batches ("lora_gradient"), the domain pass ("dpruner"), comparisons, the adapters
    in the passes, and work that multiplies no weight by a Gram (`pbs`, the spectrum of `pbs_rounds`).

    Args:
        spec: the model.
        prune: score, budget, swaps, recovery.
        rank: R, for `gram_pbs`.
        tokens: real tokens of all calibration rows.
        length: T.
    """
    forward = _forward_flops(spec, length)
    per_token: float = forward * (1 + prune.sequential + bool(prune.dense_path))
    if prune.score == "foresight_loss" and reads_importance(prune):
        # Forward, each block recomputed, the activations' gradients; the logits and their gradients.
        surveyed = 3 * forward + 2 * 2 * spec.vocab_size * spec.hidden_size
    else:
        # Budgets need statistics of the whole model, which an event that goes block by block collects in an extra pass.
        surveyed = forward * (prune.budget != "uniform" and goes_by_block(prune))
    per_token += surveyed * surveyed_rows(prune) / prune.calibration_rows
    # The Gram of two different inputs (`dense_path`) is not symmetric: all of its products are formed.
    widths = input_widths(spec).values() if needs_gram(prune) else ()
    grams = sum(2 * width**2 * (gram_share(width) + bool(prune.dense_path)) for width in widths)
    return EventFlops(
        passes=float(tokens * per_token),
        grams=float(tokens * spec.num_layers * grams),
        surgeons=spec.num_layers * _surgeon_flops(spec, prune, rank),
    )


def _surgeon_flops(spec: ModelSpec, prune: PruneConfig, rank: int) -> float:
    """FLOPs of the surgeons in one block."""
    shapes = [linear_shapes(spec)[name] for name in prune.targets]
    product = sum(2 * out_dim * in_dim**2 for out_dim, in_dim in shapes)
    # Factor and inverse of each input's Gram, shared by the linears that read that input.
    widths = input_widths(spec)
    inverses = sum(7 / 3 * widths[source] ** 3 for source in {INPUT_OF[name] for name in prune.targets})
    flops = 0.0
    if prune.dense_path:
        flops += inverses + product
    if prune.score == "sparsegpt" or prune.recovery == "obs":
        # A slab's loss is compensated over whole rows; the columns to its left get zeros.
        flops += inverses + product
    if prune.swaps:
        flops += product + prune.swaps * _SWAP_FLOPS * sum(map(math.prod, shapes))
    if prune.recovery == "admm":
        flops += inverses + (prune.admm_steps + 1) * product
    if prune.recovery == "gram_pbs":
        turns = max(0, prune.pbs_rounds - 1)
        # Each solve for A: the right-hand side, the first residual, the CG steps.
        flops += (1 + turns) * rank * product + turns * (CG_STEPS + 2) * product
    return flops


def generator_parameters(spec: ModelSpec, config: Config) -> int:
    """Number of parameters that ATP's generator learns; 0 in a run that prunes entries or nothing."""
    if config.prune.score != "atp" or not config.prune.sparsity:
        return 0
    return _generator_size(spec, config.atp.space)


@functools.lru_cache(maxsize=4)
def _generator_size(spec: ModelSpec, space: Space) -> int:
    generator = jax.eval_shape(lambda: init_generator(jax.random.key(0), spec, space))
    return sum(leaf.size for leaf in jax.tree.leaves(generator.weights))


def softened_weights(spec: ModelSpec, config: Config) -> int:
    """Number of weights in the linears that ATP's soft masks multiply, and so copy."""
    shapes = linear_shapes(spec)
    names = {name for units in units_of(spec, config.atp.space).values() for name in units.scaled}
    return spec.num_layers * sum(math.prod(shapes[name]) for name in names)


def search_flops_per_token(spec: ModelSpec, config: Config, length: int) -> float:
    """FLOPs per token that ATP's generator learns from, nearly all of them the model's under soft masks.

    Forward and backward passes are those of training; a soft mask's gradient needs that of the weights it multiplies.
    """
    return flops_per_token(spec, config, length, masked=False).total + 2 * softened_weights(spec, config)


def _units(config: Config, name: str, masked: bool) -> _Units:
    """How often one linear's weights and adapters are multiplied; see `efx_jax.linear.linear` for the cases."""
    mode = config.prune.mask_forward
    if name not in config.lora.targets:
        return _Units(dense=4, low_rank=0)
    if not masked or name not in config.prune.targets or mode in ("dense", "frozen"):
        return _Units(dense=4, low_rank=6, forward_low_rank=2)
    exact = mode == "exact"
    if config.lora.dropout:
        # With dropout the adapter sees different inputs from the base, so each needs its own products.
        return _Units(dense=10 if exact else 8, low_rank=0 if exact else 4, forward_dense=4)
    return _Units(dense=6 if exact else 4, low_rank=0 if exact else 4)
