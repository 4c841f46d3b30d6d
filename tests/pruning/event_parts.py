"""What the tests of events share: some matrices, settings, U, other adapters and masks, and the count of zeros."""

import dataclasses
from math import ceil, floor
from typing import Any

import jax.numpy as jnp
import numpy as np

from efx_jax.config import PruneConfig
from efx_jax.lora import Adapters, effective_weight

Tree = dict[str, Any]
SOME = ("q_proj", "k_proj", "down_proj")
TWO = ("k_proj", "down_proj")
PLAIN = PruneConfig(score="wanda", group="row", targets=TWO)


def effective(params: Tree, adapters: Adapters, name: str) -> np.ndarray:
    """U `[L,O,I]`."""
    return np.asarray(
        effective_weight(params["layers"][name], adapters.lora_a[name], adapters.lora_b[name], adapters.scale)
    )


def with_b(adapters: Adapters, seed: int) -> Adapters:
    """The same A with another B, as if training had gone on."""
    rng = np.random.default_rng(seed)
    fresh = {n: jnp.asarray(0.2 * rng.standard_normal(b.shape), jnp.float32) for n, b in adapters.lora_b.items()}
    return dataclasses.replace(adapters, lora_b=fresh)


def random_masks(tiny: Any, names: tuple[str, ...]) -> Tree:
    rng = np.random.default_rng(8)
    return {name: jnp.asarray(rng.random(tiny.params["layers"][name].shape) < 0.5) for name in names}


def assert_sparsity(dropped: np.ndarray, group: str, sparsity: float, bound: float) -> None:
    """Exactly the target in every comparison group of one matrix `[O,I]`."""
    out_dim, in_dim = dropped.shape
    if group == "row":
        assert (dropped.sum(1) == floor(sparsity * in_dim)).all()
    elif group == "2:4":
        assert (dropped.reshape(out_dim, -1, 4).sum(-1) == 2).all()
    else:
        assert dropped.sum() == floor(sparsity * out_dim * in_dim)
    if group == "bounded":
        per_row = dropped.sum(1)
        assert per_row.min() >= floor((sparsity - bound) * in_dim)
        assert per_row.max() <= ceil((sparsity + bound) * in_dim)
