"""Which arrays the optimizer sees, and which of its moments an event forgets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import TrainConfig
from efx_jax.lora import Adapters
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import forget_moments, init_train_state, trainable


@pytest.fixture
def adapters() -> Adapters:
    shapes = {"q_proj": (2, 4, 3), "up_proj": (2, 6, 3)}
    return Adapters(
        lora_a={name: jnp.ones((layers, 2, inputs)) for name, (layers, _, inputs) in shapes.items()},
        lora_b={name: jnp.ones((layers, outputs, 2)) for name, (layers, outputs, _) in shapes.items()},
        scale=2.0,
    )


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_refit_forgets_the_moments_of_its_b_and_no_others(adapters: Adapters, clip: float) -> None:
    tx = optimizer(TrainConfig(clip=clip), 10)
    state = init_train_state(adapters, tx)
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, trainable(adapters)), state.opt_state, trainable(adapters))
    after = forget_moments(opt_state, ("up_proj", "down_proj"))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, opt_state)
    forgotten = []
    for (path, old), (_, new) in zip(
        jax.tree_util.tree_leaves_with_path(opt_state), jax.tree_util.tree_leaves_with_path(after), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.asarray(old).any()
        if np.asarray(new).any():
            np.testing.assert_array_equal(new, old)
        else:
            forgotten.append(name[name.index(".") :])
    assert sorted(forgotten) == [".mu['lora_b']['up_proj']", ".nu['lora_b']['up_proj']"]


def test_training_starts_at_step_0_with_moments_for_every_adapter(adapters: Adapters) -> None:
    state = init_train_state(adapters, optimizer(TrainConfig(), 10))
    assert int(state.step) == 0
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trainable(adapters)))
    assert not any(np.asarray(leaf).any() for leaf in moments)
