"""One update: loss over micro-batches, gradients of the adapters alone, AdamW."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from efx_jax.config import Config, MaskForward, Remat
from efx_jax.lora import Adapters
from efx_jax.model.attention import Implementation
from efx_jax.model.decoder import head_weight, hidden_states
from efx_jax.model.loss import cross_entropy
from efx_jax.model.spec import ModelSpec
from efx_jax.training.distillation import divergence, positions_read, take_rows, taught_rows, taught_weights
from efx_jax.training.state import TrainState, trainable

Array = jax.Array
Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The static part of a step."""

    mask_forward: MaskForward = "exact"
    compute_dtype: str = "float32"
    dropout_rate: float = 0.0
    remat: Remat = "none"
    attention_path: Implementation = "xla"
    micro_batches: int = 1
    teacher_weight: float = 1.0
    teacher_row_share: float = 1.0
    teacher_prefix_share: float = 1.0
    teacher_share: float = 1.0


@struct.dataclass
class Teacher:
    """A dense model whose next-token distributions the pruned one learns, see `efx_jax.training.distillation`."""

    params: dict[str, Any]
    spec: ModelSpec = struct.field(pytree_node=False)


def has_teacher(config: Config) -> bool:
    """Whether a teacher takes part: not in a dense run, nor where every token is a label."""
    return bool(config.distill.teacher) and config.prune.sparsity > 0 and config.data.loss_on == "response"


def step_options(config: Config, rows: int, attention_path: Implementation) -> StepOptions:
    """The static part of a run's step, with `rows` sequences per forward pass."""
    return StepOptions(
        mask_forward=config.prune.mask_forward,
        compute_dtype=config.model.compute_dtype,
        dropout_rate=config.lora.dropout,
        remat=config.train.remat,
        attention_path=attention_path,
        micro_batches=config.train.batch_size // rows,
        teacher_weight=config.distill.weight,
        teacher_row_share=config.distill.row_share,
        teacher_prefix_share=config.distill.prefix_share,
        teacher_share=config.distill.share,
    )


def without_silent_tail(batch: Batch, options: StepOptions) -> tuple[Batch, StepOptions]:
    """The batch cut after the positions that a teacher reads, if no label follows them, and options to match.

    The cut changes no result, as no earlier position attends to it; with a batch of distillation text only and a
    teacher that reads half of each row, it saves half of the step. `lengths` still count all tokens of the data.

    Args:
        batch: as `train_step` takes it.
        options: those of its step; `teacher_prefix_share` says what a teacher reads.
    """
    read = positions_read(options.teacher_prefix_share, batch["tokens"].shape[1])
    if read == batch["tokens"].shape[1] or _has_labels_from(batch["weights"], read):
        return batch, options
    cut = {name: rows[:, :read] if rows.ndim > 1 else rows for name, rows in batch.items()}
    return cut, dataclasses.replace(options, teacher_prefix_share=1.0)


@functools.partial(jax.jit, static_argnums=1)
def _has_labels_from(weights: Array, position: int) -> Array:
    return jnp.any(weights[:, position:] > 0)


def summed_loss(
    arrays: Mapping[str, Any],
    adapters: Adapters,
    params: Mapping[str, Any],
    masks: Mapping[str, Array] | None,
    batch: Batch,
    key: Array,
    spec: ModelSpec,
    options: StepOptions,
    teacher: Teacher | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The summed loss of one micro-batch, differentiable in `arrays` (see `trainable`), and its parts.

    Args:
        batch: with dropout also `row` int `[B]`, a row's number in the whole batch; with a teacher also `taught` float
            `[B,T]`, see `taught_weights`.
        key: PRNG key of dropout, into which every row's number is folded.

    Returns:
        nll, plus the weighted divergence if there is a teacher; and the sums `nll`, `entropy` and, with a teacher,
        `divergence` (weighted).
    """
    adapters = dataclasses.replace(adapters, lora_a=arrays["lora_a"], lora_b=arrays["lora_b"])
    hidden = _hidden(params, adapters, masks, batch, key, spec, options, frozen=True)
    dtype = options.compute_dtype
    nll, entropy = cross_entropy(hidden, head_weight(params), batch["targets"], batch["weights"], dtype)
    sums = {"nll": nll, "entropy": entropy}
    if teacher is None:
        return nll, sums
    if options.teacher_prefix_share < 1:
        # No position after the prefix has a weight, and none within it attends to them.
        read = positions_read(options.teacher_prefix_share, hidden.shape[1])
        hidden, batch = jax.tree.map(lambda rows: rows[:, :read] if rows.ndim > 1 else rows, (hidden, dict(batch)))
    if options.teacher_row_share < 1:
        # Rows with a weight are no more than those taken, see `taught_rows`; all others are 0.
        most = jnp.sum(batch["taught"], axis=1)
        hidden, batch = take_rows(most, options.teacher_row_share, (hidden, dict(batch)))
    plain = dataclasses.replace(options, dropout_rate=0.0, remat="none")
    taught = _hidden(teacher.params, None, None, batch, key, teacher.spec, plain, frozen=True)
    heads = head_weight(params), head_weight(teacher.params)
    apart = divergence(hidden, heads[0], taught, heads[1], batch["taught"], dtype)
    return nll + apart, sums | {"divergence": apart}


def model_loss(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    batch: Batch,
    key: Array,
    spec: ModelSpec,
    options: StepOptions,
) -> tuple[Array, Array]:
    """Summed nll and entropy of one micro-batch, differentiable in the base weights too."""
    hidden = _hidden(params, adapters, masks, batch, key, spec, options, frozen=False)
    return cross_entropy(hidden, head_weight(params), batch["targets"], batch["weights"], options.compute_dtype)


def _hidden(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    batch: Batch,
    key: Array,
    spec: ModelSpec,
    options: StepOptions,
    frozen: bool,
) -> Array:
    row_keys = None
    if options.dropout_rate:
        row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["row"])
    return hidden_states(
        params,
        batch["tokens"],
        spec,
        adapters,
        masks,
        positions=batch.get("positions"),
        segments=batch.get("segments"),
        mask_forward=options.mask_forward,
        compute_dtype=options.compute_dtype,
        dropout_rate=options.dropout_rate,
        dropout_key=row_keys,
        remat=options.remat,
        attention_path=options.attention_path,
        frozen=frozen,
    )


def accumulate_gradient(
    loss: Callable[[Any, Batch], tuple[Array, Any]], arrays: Any, batch: Batch, micro_batches: int
) -> tuple[Any, Array, Any]:
    """The gradient of a summed loss, accumulated over `micro_batches` passes to save memory.

    Args:
        loss: (arrays, micro-batch) -> (loss, other sums over its tokens, any tree).
        arrays: what the gradient is taken with respect to.
        batch: arrays `[B,...]`.
        micro_batches: number of passes; must divide B.

    Returns:
        (gradient shaped like `arrays` in float32, loss, the other sums), over the whole batch.
    """
    micro = jax.tree.map(lambda x: _micro_batches(x, micro_batches), dict(batch))

    def accumulate(total: tuple[Any, Array, Any], part: Batch) -> tuple[Any, None]:
        (value, others), grads = jax.value_and_grad(loss, has_aux=True)(arrays, part)
        return jax.tree.map(jnp.add, total, (grads, value, others)), None

    sums = jax.eval_shape(loss, arrays, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (arrays, *sums))
    return jax.lax.scan(accumulate, zeros, micro)[0]


def _step(
    state: TrainState,
    params: Mapping[str, Any],
    masks: Mapping[str, Array] | None,
    batch: Batch,
    key: Array,
    spec: ModelSpec,
    tx: optax.GradientTransformation,
    options: StepOptions,
    teacher: Teacher | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the adapters.

    Losses and gradients are summed over the micro-batches in float32 and divided once by the number of tokens that
    carry loss, so accumulation equals one large batch, except that a teacher reads a share of each micro-batch's rows.

    Args:
        state: the state; its buffers are consumed.
        params: the frozen base.
        masks: masks in force, or None.
        batch: `tokens`, `targets` int and `weights` float `[B,T]`, `lengths` int `[B]`; for packed rows also
            `positions` and `segments` int `[B,T]`.
        key: the run's PRNG key; the step number is folded in.
        spec: the model.
        tx: the optimizer.
        options: see `StepOptions`; `micro_batches` must divide B.
        teacher: what to learn from where there are no labels, or None.

    Returns:
        The new state and float32 scalars: `loss` and `entropy` (nats per loss-carrying token), `labels` (the number of
        those), `grad_norm` before clipping, `adapter_norm` after the update, `tokens` (without padding), and with a
        teacher the `divergence` from it (nats per token that it taught).
    """
    arrays = trainable(state.adapters)
    dropout_key, row_key, token_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
    batch = {**batch, "row": jnp.arange(batch["lengths"].shape[0])}
    if teacher is not None:
        rows = taught_rows(batch, row_key, options.teacher_row_share, options.micro_batches)
        weight, share, prefix = options.teacher_weight, options.teacher_share, options.teacher_prefix_share
        batch["taught"] = taught_weights(batch, token_key, weight, share, rows, prefix)

    def loss(arrays: Any, part: Batch) -> tuple[Array, dict[str, Array]]:
        return summed_loss(arrays, state.adapters, params, masks, part, dropout_key, spec, options, teacher)

    grads, _, sums = accumulate_gradient(loss, arrays, batch, options.micro_batches)
    count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, arrays)
    arrays = optax.apply_updates(arrays, updates)
    metrics = {
        "loss": sums["nll"] / count,
        "entropy": sums["entropy"] / count,
        "labels": jnp.sum(batch["weights"]),
        "grad_norm": optax.tree.norm(grads),
        # Its square bounds the entries of B A, so it overflows no later than they do.
        "adapter_norm": optax.tree.norm(arrays),
        "tokens": jnp.sum(batch["lengths"]).astype(jnp.float32),
    }
    if teacher is not None:
        metrics["divergence"] = sums["divergence"] / jnp.maximum(jnp.sum(batch["taught"]), jnp.finfo(jnp.float32).tiny)
    adapters = dataclasses.replace(state.adapters, lora_a=arrays["lora_a"], lora_b=arrays["lora_b"])
    return TrainState(step=state.step + 1, adapters=adapters, opt_state=opt_state), metrics


def _micro_batches(rows: Array, count: int) -> Array:
    """`[B,...]` -> `[count,B/count,...]`, rows dealt in turn: each device then already holds its part of each."""
    return jnp.swapaxes(rows.reshape(-1, count, *rows.shape[1:]), 0, 1)


def jit_step(out_shardings: Any = None) -> Any:
    """`_step` compiled, with its state donated and, on a mesh, the shardings of its results fixed.

    Args:
        out_shardings: shardings of the new state and of the metrics (a tree prefix); None: one device.
    """
    return jax.jit(
        _step, static_argnames=("spec", "tx", "options"), donate_argnames="state", out_shardings=out_shardings
    )


train_step = jit_step()
