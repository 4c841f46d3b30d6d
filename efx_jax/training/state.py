"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from efx_jax.lora import Adapters
from efx_jax.pruning.average import PruneState

Array = jax.Array


@struct.dataclass
class TrainState:
    """Adapters and their optimizer state after `step` updates; the base model and the masks are not in here."""

    step: Array
    adapters: Adapters
    opt_state: optax.OptState


@struct.dataclass
class RunState:
    """Everything that a checkpoint holds: `masks` is {} before the first event, `params` changes if events move it."""

    train: TrainState
    params: dict[str, Any]
    masks: dict[str, Array]
    prune: PruneState


def init_train_state(adapters: Adapters, tx: optax.GradientTransformation) -> TrainState:
    """Step 0: fresh optimizer moments for the adapters alone."""
    return TrainState(step=jnp.int32(0), adapters=adapters, opt_state=tx.init(trainable(adapters)))


def trainable(adapters: Adapters) -> dict[str, dict[str, Array]]:
    """The arrays that the optimizer sees."""
    return {"lora_a": adapters.lora_a, "lora_b": adapters.lora_b}


def forget_moments(opt_state: optax.OptState, names: tuple[str, ...]) -> optax.OptState:
    """Sets Adam's moments of B of the named linears to zero: a refit has made their B zero, too."""

    def reset(path: tuple[Any, ...], leaf: Array) -> Array:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return jnp.zeros_like(leaf) if keys[:1] == ["lora_b"] and keys[1] in names else leaf

    return jax.tree_util.tree_map_with_path(reset, opt_state)
