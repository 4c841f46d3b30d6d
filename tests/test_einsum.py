"""At what precision the products of a step are asked for: GPUs would keep 10 bits of float32 operands by default."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.lora import init_lora
from efx_jax.model.decoder import head_weight, hidden_states
from efx_jax.model.loss import cross_entropy
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.training.distillation import divergence
from efx_jax.training.state import trainable
from tests.tiny import EVEN


def products(compute_dtype: str, mask_forward: str) -> list[str]:
    """Every product of a masked, taught step's loss and its gradient, as they are handed to the compiler."""
    params = init_params(jax.random.key(0), EVEN)
    adapters = init_lora(jax.random.key(1), params, EVEN, rank=3)
    masks = {name: jnp.ones(params["layers"][name].shape, bool) for name in LINEARS}
    tokens = np.ones((2, 16), np.int32)
    weights = np.ones((2, 16), np.float32)

    def loss(arrays: dict[str, dict[str, jax.Array]]) -> jax.Array:
        moved = dataclasses.replace(adapters, lora_a=arrays["lora_a"], lora_b=arrays["lora_b"])
        hidden = hidden_states(
            params, tokens, EVEN, moved, masks, mask_forward=mask_forward, compute_dtype=compute_dtype, frozen=True
        )
        head = head_weight(params)
        nll, _ = cross_entropy(hidden, head, tokens, weights, compute_dtype)
        return nll + divergence(hidden, head, jax.lax.stop_gradient(hidden), head, weights, compute_dtype)

    text = jax.jit(jax.grad(loss)).lower(trainable(adapters)).as_text()
    return re.findall(r"stablehlo\.dot_general.*", text)


@pytest.mark.parametrize("mask_forward", ["exact", "ste"])
def test_float32_is_multiplied_as_float32(mask_forward: str) -> None:
    found = products("float32", mask_forward)
    assert len(found) > 20
    assert [line for line in found if "precision = [HIGHEST, HIGHEST]" not in line] == []


def test_bfloat16_is_multiplied_as_the_hardware_does_it() -> None:
    found = [line for line in products("bfloat16", "ste") if re.search(r"\(tensor<\S*xbf16>, tensor<\S*xbf16>\)", line)]
    assert len(found) > 20
    assert [line for line in found if "HIGHEST" in line] == []
