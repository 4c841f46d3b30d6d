"""What the backward pass computes again, counted as matmul FLOPs in the jaxpr: a compiler may hide a recompute."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from efx_jax.config import Remat
from efx_jax.lora import init_lora
from efx_jax.masks import pack_mask
from efx_jax.model.decoder import hidden_states
from efx_jax.model.spec import LINEARS, init_params, linear_shapes
from tests.quick import quick_compilation
from tests.tiny import EVEN

SPEC = dataclasses.replace(EVEN, hidden_size=64, intermediate_size=160, head_dim=8)
RANK, TOKENS = 2, 48
PARAMS = init_params(jax.random.key(0), SPEC)
ADAPTERS = init_lora(jax.random.key(1), PARAMS, SPEC, RANK, 4)
MASKS = {
    name: pack_mask(jax.random.bernoulli(jax.random.key(2), 0.5, PARAMS["layers"][name].shape)) for name in LINEARS
}
IDS = np.random.default_rng(0).integers(0, 32, (1, TOKENS))


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a jaxpr but attention's, loops counted by their length."""
    total = 0
    for equation in jaxpr.eqns:
        inner = sum(matmul_flops(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            if not batch:  # attention's products have batch dimensions
                width = np.prod([left[axis] for axis in contracted], dtype=int)
                total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(width)
    return total


def loss(arrays: Any, masks: Any, remat: Remat) -> jax.Array:
    adapters = dataclasses.replace(ADAPTERS, lora_a=arrays.lora_a, lora_b=arrays.lora_b)
    return jnp.sum(jnp.sin(hidden_states(PARAMS, IDS, SPEC, adapters, masks, remat=remat)))


def units(masks: Any, remat: Remat) -> float:
    """FLOPs of a training pass in units of one forward product with every weight, dead code left out."""
    gradient = functools.partial(jax.grad(loss), masks=masks, remat=remat)
    jaxpr = jax.make_jaxpr(gradient)(ADAPTERS).jaxpr
    alive, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    weights = SPEC.num_layers * sum(out_dim * in_dim for out_dim, in_dim in linear_shapes(SPEC).values())
    return matmul_flops(alive) / (2 * TOKENS * weights)


def low_rank(times: int) -> float:
    """`times` products with one factor of every adapter, in the same units."""
    shapes = linear_shapes(SPEC).values()
    return times * RANK * sum(o + i for o, i in shapes) / sum(o * i for o, i in shapes)


def share(name: str) -> float:
    shapes = {n: o * i for n, (o, i) in linear_shapes(SPEC).items()}
    return shapes[name] / sum(shapes.values())


@pytest.mark.parametrize(("masks", "products"), [(None, 2), (MASKS, 3)], ids=["plain", "exact"])
def test_keeping_the_linears_outputs_computes_no_weight_product_again(masks: Any, products: int) -> None:
    none, linears, block = (units(masks, remat) for remat in ("none", "linears", "block"))
    # Products with A and B (and of B with A) are small; nothing of the size of a weight is hidden in them.
    assert products <= none <= products + low_rank(6) + RANK / TOKENS * 6
    assert linears == pytest.approx(none, abs=low_rank(2))
    # Of a block, all but its last product is formed again.
    assert block - none == pytest.approx(1 - share("down_proj"), abs=low_rank(2) + 2 * RANK / TOKENS)


@pytest.mark.parametrize("masks", [pytest.param(None, marks=pytest.mark.exhaustive), MASKS], ids=["plain", "exact"])
def test_what_is_computed_again_is_the_same(masks: Any) -> None:
    found = [
        jax.jit(jax.grad(loss), static_argnums=2)(ADAPTERS, masks, remat) for remat in ("none", "linears", "block")
    ]
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found[0]))
    for other in found[1:]:
        chex.assert_trees_all_close(found[0], other, rtol=0, atol=1e-6 * largest)
