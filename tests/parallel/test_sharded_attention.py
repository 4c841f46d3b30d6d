"""Ragged flash attention on a mesh: every device hands over its own rows and heads, and where their segments lie."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig
from efx_jax.model.attention import attention
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import batch_axes

Array = jax.Array
# Segments of eight rows of 16 tokens.
SIZES = [[16, 0, 0], [4, 12, 0], [5, 5, 6], [1, 2, 13], [8, 8, 0], [3, 3, 3], [15, 1, 0], [7, 0, 0]]


def by_offsets(
    seen: set[tuple[int, ...]],
    q: Array,
    k: Array,
    v: Array,
    q_seqlen: Array,
    kv_seqlen: Array,
    q_offsets: Array,
    kv_offsets: Array,
    scale: float,
    mask_type: Any,
) -> Array:
    """What cuDNN is asked for, from the same arguments: runs of `q_seqlen [B,M]` tokens from `q_offsets [B,M+1]`."""
    assert len(q) == len(k) == len(q_seqlen) == len(q_offsets)
    seen.add(q.shape)
    assert mask_type == fused_attention_stablehlo.MaskType.PADDING_CAUSAL
    np.testing.assert_allclose(scale, q.shape[-1] ** -0.5)
    places = jnp.arange(q.shape[1])
    starts = jnp.where(q_offsets[:, :-1] < 0, q.shape[1], q_offsets[:, :-1])
    segments = jnp.sum(places[None, :, None] >= starts[:, None, :], axis=-1)
    return attention(q, k, v, segments).reshape(q.shape).astype(q.dtype)


@pytest.mark.parametrize(
    ("shape", "local"),
    [((2, 2, 2), (2, 16, 2, 8)), ((1, 2, 4), (4, 16, 1, 8)), ((4, 2, 1), (1, 16, 4, 8)), ((1, 1, 8), (8, 16, 4, 8))],
)
def test_devices_hand_over_their_own_rows_and_heads(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], local: tuple[int, ...]
) -> None:
    """The last mesh has more devices than heads."""
    seen: set[tuple[int, ...]] = set()
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", functools.partial(by_offsets, seen))
    rng = np.random.default_rng(0)
    q, d_out = (rng.standard_normal((8, 16, 4, 8), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((8, 16, 2, 8), np.float32) for _ in range(2))
    ids = [np.repeat([1, 2, 3, -1], [*sizes, 16 - sum(sizes)]) for sizes in SIZES]
    segments = np.stack(ids).astype(np.int32)

    def run(implementation: Any, *case: Any) -> Any:
        def output(q: Array, k: Array, v: Array) -> Array:
            return attention(q, k, v, case[3], implementation)

        out, pull = jax.vjp(output, *case[:3])
        return out, *pull(d_out.reshape(out.shape))

    expected = run("xla", q, k, v, segments)
    mesh = make_mesh(MeshConfig(*shape))
    place = NamedSharding(mesh, PartitionSpec(batch_axes(8, mesh.shape)))
    with jax.set_mesh(mesh):
        found = jax.jit(run, static_argnums=0)("cudnn", *(jax.device_put(x, place) for x in (q, k, v, segments)))
    assert seen == {local}
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
