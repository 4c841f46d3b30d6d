"""Which inputs compete in N:M: units that can be permuted are, so that no group holds too many large entries.

N:M keeps N of M consecutive inputs of every row, whatever they are. But hidden units of the MLP (rows of gate and up,
columns of down) and the dimensions of a value head (rows of v, columns of o in each query head that reads it) have no
order: the model computes the same wherever they are. The problem is that of J. Pool and C. Yu, Channel Permutations for
N:M Sparsity (NeurIPS 2021), who swap channels. Here one member of every group at a time leaves its place, and these
are reassigned together so that the loss is smallest: no step makes the loss larger.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy.optimize import linear_sum_assignment

from efx_jax.config import PruneConfig
from efx_jax.config_event import n_of_m
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, effective_weight
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.hosts import are_alike
from efx_jax.parallel.partition import constrain, constrain_tree
from efx_jax.pruning.statistics import Statistics

Array = jax.Array
_SWEEPS = 6
"""Passes over the members of the groups; further ones win back less than a hundredth of what is lost."""
_TOGETHER = 512
"""Groups per assignment problem, redrawn in every pass: the host's solver takes time cubic in their number."""


@struct.dataclass
class Order:
    """Where every line of a linear comes from: `rows[name]` int `[L,O]` and `columns[name]` int `[L,I]`."""

    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]


def find_order(
    params: Mapping[str, Any], adapters: Adapters | None, stats: Statistics, spec: ModelSpec, config: PruneConfig
) -> Order:
    """An order of hidden units and value dimensions in which N:M drops little of sum (U_oi^2 sum_t x_ti^2).

    Units whose rows have a bias stay where they are (an event rewrites only weights), and so do value dimensions if M
    does not divide the head dimension.

    Args:
        params: the parameter tree.
        adapters: adapters, or None.
        stats: of the model as it stands; Grams are not needed.
        spec: the model.
        config: gives the group "N:M" and the matrices to prune.

    Raises:
        InputError: as `movable_inputs`, or an M that does not divide the hidden units.
    """
    movable, pattern = movable_inputs(spec, config), n_of_m(config.group)
    assert pattern is not None
    kv_heads, width = spec.num_kv_heads, spec.head_dim
    order = Order({}, {})
    if "down_proj" in movable:
        hidden = np.stack(
            [
                group_inputs(_importance(params, adapters, stats, "down_proj", layer), *pattern)
                for layer in range(spec.num_layers)
            ]
        )
        order.rows.update(gate_proj=hidden, up_proj=hidden)
        order.columns.update(down_proj=hidden)
    if "o_proj" in movable:
        dims = np.empty((spec.num_layers, kv_heads, width), np.int64)
        for layer in range(spec.num_layers):
            # Query heads of one group share the order: to them a dimension is one line that is G times as long.
            lines = _importance(params, adapters, stats, "o_proj", layer)
            lines = lines.reshape(kv_heads, spec.num_heads // kv_heads, width, -1).swapaxes(1, 2)
            for head in range(kv_heads):
                dims[layer, head] = group_inputs(lines[head].reshape(width, -1), *pattern)
        order.rows["v_proj"] = _by_head(dims)
        order.columns["o_proj"] = _by_head(np.repeat(dims, spec.num_heads // kv_heads, axis=1))
    return order


def movable_inputs(spec: ModelSpec, config: PruneConfig) -> tuple[str, ...]:
    """The linears whose inputs `find_order` can move: o_proj, down_proj or both.

    Raises:
        InputError: a group other than N:M, or neither of them can be moved.
    """
    pattern = n_of_m(config.group)
    if pattern is None:
        raise InputError(f"prune.permute: expected prune.group N:M such as 2:4, found {config.group}")
    fixed = {
        "o_proj": "v_proj" in spec.biases or spec.head_dim % pattern[1] != 0,
        "down_proj": bool({"gate_proj", "up_proj"} & set(spec.biases)),
    }
    found = tuple(name for name, stays in fixed.items() if name in config.targets and not stays)
    if not found:
        pruned = ", ".join(name for name in fixed if name in config.targets)
        raise InputError(
            f"prune.permute: nothing can move of this model where {pruned or 'neither o_proj nor down_proj'} is pruned "
            f"(biases on {', '.join(spec.biases) or 'nothing'}, heads of {spec.head_dim}, M {pattern[1]}); set it to "
            "false"
        )
    return found


def _by_head(dims: np.ndarray) -> np.ndarray:
    """Places within heads `[L,heads,H]` -> places `[L,heads*H]`."""
    starts = np.arange(dims.shape[1])[None, :, None] * dims.shape[2]
    return (dims + starts).reshape(len(dims), -1)


def _importance(
    params: Mapping[str, Any], adapters: Adapters | None, stats: Statistics, name: str, layer: int
) -> Array:
    """Squares of U by the energy of its inputs, transposed: float32 `[I,O]`, whole on every device."""
    lora_a, lora_b = (None, None) if adapters is None else (adapters.lora_a.get(name), adapters.lora_b.get(name))
    scale = 1.0 if adapters is None else adapters.scale
    energy = jnp.square(stats.input_norm(name))
    return _layer_importance(params["layers"][name], lora_a, lora_b, energy, layer, scale)


@functools.partial(jax.jit, static_argnames="scale")
def _layer_importance(
    weight: Array, lora_a: Array | None, lora_b: Array | None, energy: Array, layer: Array | int, scale: float
) -> Array:
    weight, lora_a, lora_b, energy = jax.tree.map(lambda leaf: leaf[layer], (weight, lora_a, lora_b, energy))
    return constrain((jnp.square(effective_weight(weight, lora_a, lora_b, scale)) * energy).T)


def group_inputs(importance: Array, kept: int, block: int, sweeps: int = _SWEEPS) -> np.ndarray:
    """An order of the inputs in which keeping the `kept` largest of `block` consecutive ones drops little.

    Args:
        importance: of every entry, at least 0, float32 `[I,O]`; `block` divides I.
        kept: N.
        block: M.
        sweeps: how often every member of a group may move, on average.

    Returns:
        int64 `[I]`, a permutation: which input stands at each place. No worse than the current order.

    Raises:
        InputError: an I that M does not divide, importance that is not finite, or hosts that find different orders.
    """
    if len(importance) % block:
        raise InputError(f"prune.permute: expected a number of inputs that {block} divides, found {len(importance)}")
    groups = np.arange(len(importance)).reshape(-1, block)
    # Two members that always left together would never meet in a group.
    draw = np.random.default_rng(0)
    for _ in range(sweeps * block):
        groups = draw.permutation(draw.permuted(groups, axis=1), axis=0)
        for part in np.array_split(groups, -(-len(groups) // _TOGETHER)):
            losses = np.asarray(_losses(importance, part[:, 0], part[:, 1:], block - kept))
            if not np.isfinite(losses).all():
                raise InputError("prune.permute: the calibration's activations are not finite; check prune.calibration")
            leaver, group = linear_sum_assignment(losses)
            part[group, 0] = part[leaver, 0]
    _agree(groups)
    return groups.reshape(-1)


def _agree(groups: np.ndarray) -> None:
    """Refuses differing orders: every host moves its own part of the weights by the order that it found itself."""
    if not are_alike(zlib.crc32(groups.tobytes())):
        raise InputError("prune.permute: hosts found different orders; run them on the same processors and libraries")


@functools.partial(jax.jit, static_argnames="dropped")
def _losses(importance: Array, leaving: Array, staying: Array, dropped: int) -> Array:
    """The cost of each leaving input in each group; `[n]`, `[n,M-1]` -> `[n,n]`.

    Of the M entries of a row the `dropped` smallest are lost: the `dropped` - 1 smallest of those that stay, whichever
    input joins (not counted here), and the smaller of the newcomer and the next smallest that stays.
    """
    limit = jnp.sort(importance[staying], axis=1)[:, dropped - 1]
    return jax.lax.map(lambda one: jnp.sum(jnp.minimum(limit, one), axis=1), importance[leaving])


def permute(
    params: Mapping[str, Any], adapters: Adapters | None, order: Order
) -> tuple[dict[str, Any], Adapters | None]:
    """The same model with its units in another order; arrays without such units are unchanged.

    Args:
        params: the parameter tree.
        adapters: adapters, or None.
        order: what stands where; earlier masks, statistics, gradients and states no longer fit the model.
    """
    layers = _moved("layers", params["layers"], order.rows, 0)
    layers = _moved("layers", layers, order.columns, 1)
    if adapters is not None:
        lora_a = _moved("lora_a", adapters.lora_a, order.columns, 1)
        lora_b = _moved("lora_b", adapters.lora_b, order.rows, 0)
        adapters = dataclasses.replace(adapters, lora_a=lora_a, lora_b=lora_b)
    return {**params, "layers": layers}, adapters


def _moved(kind: str, arrays: Mapping[str, Array], places: Mapping[str, Any], axis: int) -> dict[str, Array]:
    """`arrays` of a kind (`efx_jax.parallel.partition`) with the lines of those named in `places` reordered."""
    found = (name for name in places if name in arrays)
    return {**arrays, **{name: _taken({kind: {name: arrays[name]}}, places[name], axis)[kind][name] for name in found}}


@functools.partial(jax.jit, static_argnums=2)
def _taken(stacked: Any, places: Array, axis: int) -> Any:
    """Lines of matrices `[L,...]` in another order, a layer at a time: no device holds more than one of them whole."""

    def take(layer: tuple[Any, Array]) -> Any:
        return jax.tree.map(lambda matrix: jnp.take(constrain(matrix), layer[1], axis=axis), layer[0])

    return constrain_tree(jax.lax.map(take, (stacked, places)))
