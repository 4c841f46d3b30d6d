"""Which arrays the optimizer sees, and which of its moments an event forgets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import TrainConfig
from efx_jax.lora import Adapters
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import init_train_state, restart_adam, trainable


@pytest.fixture
def adapters() -> Adapters:
    shapes = {"q_proj": (2, 4, 3), "up_proj": (2, 6, 3)}
    return Adapters(
        lora_a={name: jnp.ones((layers, 2, inputs)) for name, (layers, _, inputs) in shapes.items()},
        lora_b={name: jnp.ones((layers, outputs, 2)) for name, (layers, outputs, _) in shapes.items()},
        scale=2.0,
    )


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_after_a_restart_adam_repeats_its_first_update_at_the_present_learning_rate(
    adapters: Adapters, clip: float
) -> None:
    """Zero moments under the old count would make the tenth update 3 times too large."""
    tx = optimizer(TrainConfig(clip=clip, weight_decay=0, schedule="linear", learning_rate=1.0), 400)
    arrays = trainable(adapters)
    gradient = jax.tree.map(jnp.ones_like, arrays)
    update = jax.jit(tx.update)
    opt_state = init_train_state(adapters, tx).opt_state
    for _ in range(300):
        _, opt_state = update(gradient, opt_state, arrays)
    opt_state = restart_adam(opt_state)
    for number in range(300, 320):
        found, opt_state = update(gradient, opt_state, arrays)
        # A constant gradient moves every weight by the learning rate, at the first update as at any other.
        rate = 1 - number / 400
        chex.assert_trees_all_close(found, jax.tree.map(lambda leaf, r=rate: -r * leaf, gradient), rtol=1e-3)


def test_training_starts_at_step_0_with_moments_for_every_adapter(adapters: Adapters) -> None:
    state = init_train_state(adapters, optimizer(TrainConfig(), 10))
    assert int(state.step) == 0
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trainable(adapters)))
    assert not any(np.asarray(leaf).any() for leaf in moments)
