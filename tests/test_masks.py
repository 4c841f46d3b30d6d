"""Packed masks: the same bits as numpy's, no larger than promised, the same to every function that takes a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.linear import linear
from efx_jax.lora import masked_weight
from efx_jax.masks import count_kept, pack_mask, packed_shape, unpack_mask


@pytest.mark.parametrize("in_dim", [1, 7, 8, 9, 24, 61])
def test_packing_is_numpys_little_endian_packbits_and_is_undone(in_dim: int) -> None:
    mask = np.random.default_rng(in_dim).random((3, 5, in_dim)) < 0.4
    packed = pack_mask(jnp.asarray(mask))
    assert packed.shape == packed_shape(mask.shape) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(unpack_mask(packed, in_dim), mask)
    np.testing.assert_array_equal(count_kept(packed), mask.sum(axis=(1, 2)))
    np.testing.assert_array_equal(count_kept(jnp.asarray(mask)), mask.sum(axis=(1, 2)))


def test_a_bool_mask_is_not_unpacked() -> None:
    mask = jnp.asarray([[True, False, True]])
    assert unpack_mask(mask, 3) is mask


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "bool"])
def test_what_is_neither_bool_nor_bits_of_that_width_is_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=f"expected bool .*pack_mask, uint8 \\[...,2\\]; found {dtype} \\[...,12\\]"):
        unpack_mask(jnp.ones((3, 12), dtype), 13)


@pytest.mark.parametrize("mask_forward", ["exact", "ste", "frozen", "dense"])
def test_a_packed_mask_acts_as_the_bool_one(mask_forward) -> None:
    rng = np.random.default_rng(0)
    x, weight, lora_a, lora_b = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in [(4, 13), (6, 13), (2, 13), (6, 2)]
    )
    mask = jnp.asarray(rng.random((6, 13)) < 0.5)

    def loss(arrays, mask):
        return jnp.sum(jnp.sin(linear(*arrays, mask=mask, scale=2.0, mask_forward=mask_forward)))

    def run(mask):
        return jax.value_and_grad(loss)((x, weight, None, lora_a, lora_b), mask)

    jax.tree.map(np.testing.assert_array_equal, run(mask), run(pack_mask(mask)))
    np.testing.assert_array_equal(
        masked_weight(weight, lora_a, lora_b, mask, 2.0), masked_weight(weight, lora_a, lora_b, pack_mask(mask), 2.0)
    )
