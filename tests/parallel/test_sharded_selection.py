"""Given the same scores, the masks are the same on any mesh, bit for bit."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import linear_axes, tree_shardings
from efx_jax.pruning.selection import Counts, drop_by_counts, select_mask, selection_counts
from tests.tiers import few_of

SHAPE = (48, 64)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]
GROUPS = ("row", "matrix", "bounded", "2:4")
BOUND = 0.2
CASES = list(itertools.product(MESHES, ("q_proj", "down_proj"), GROUPS))
# Rows alone and columns alone of a matrix of each kind, and every group on a mesh that splits both.
QUICK = [
    ((1, 8, 1), "q_proj", "matrix"),
    ((1, 1, 8), "down_proj", "bounded"),
    ((1, 1, 8), "down_proj", "row"),
    ((2, 2, 2), "down_proj", "row"),
    ((2, 2, 2), "down_proj", "bounded"),
    ((1, 4, 2), "down_proj", "matrix"),
    ((1, 4, 2), "q_proj", "2:4"),
]


def tied() -> np.ndarray:
    """Few values, whole rows of one value among them: ties within rows, across rows and across devices."""
    scores = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.float32)
    scores[5], scores[17], scores[40] = 2.0, 0.0, 9.0
    return scores


def subnormal() -> np.ndarray:
    """Zeros of both signs and multiples of the smallest positive float32, many of them equal."""
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 20, SHAPE).astype(np.uint32).view(np.float32).copy()
    scores[rng.random(SHAPE) < 0.2] = -0.0
    return scores


def distinct() -> np.ndarray:
    return np.random.default_rng(2).lognormal(0, 20, SHAPE).astype(np.float32)


SCORES = {"tied": tied(), "subnormal": subnormal(), "distinct": distinct(), "all equal": np.ones(SHAPE, np.float32)}


def ordered(score: np.ndarray, group: str, sparsity: float) -> np.ndarray:
    """The mask by a stable sort of bit patterns; "bounded" has no such short form."""
    bits = np.abs(score).view(np.uint32)
    if group == "2:4":
        bits, count = bits.reshape(-1, 4), 2
    elif group == "row":
        count = int(sparsity * SHAPE[1])
    else:
        bits, count = bits.reshape(1, -1), int(sparsity * score.size)
    keep = np.ones(bits.shape, bool)
    np.put_along_axis(keep, np.argsort(bits, axis=1, kind="stable")[:, :count], False, axis=1)
    return keep.reshape(SHAPE)


@functools.cache
def on_one_device(scores: str, group: str, sparsity: float) -> np.ndarray:
    mask = np.asarray(select_mask(jnp.asarray(SCORES[scores]), sparsity, group, BOUND))
    if group != "bounded":
        np.testing.assert_array_equal(mask, ordered(SCORES[scores], group, sparsity))
    return mask


def assert_counts(mask: np.ndarray, group: str, sparsity: float) -> None:
    dropped = ~mask
    if group == "row":
        assert (dropped.sum(axis=1) == int(sparsity * SHAPE[1])).all()
    elif group == "2:4":
        assert (dropped.reshape(-1, 4).sum(axis=1) == 2).all()
    else:
        assert dropped.sum() == int(sparsity * mask.size)
    if group == "bounded":
        low, high = np.floor((sparsity - BOUND) * SHAPE[1]), np.ceil((sparsity + BOUND) * SHAPE[1])
        assert (dropped.sum(axis=1) >= low).all() and (dropped.sum(axis=1) <= high).all()


@functools.cache
def compiled(name: str, group: str) -> Any:
    """One program per layout and group: counts are traced, as in the event."""
    return jax.jit(lambda score, counts: ~drop_by_counts(score, group, counts, linear_axes(name)))


@pytest.mark.parametrize(("shape", "name", "group"), few_of(CASES, *QUICK))
def test_masks_on_a_mesh_are_those_of_one_device(shape: tuple[int, int, int], name: str, group: str) -> None:
    """Matrices split by rows and, along `tensor`, by columns."""
    mesh = make_mesh(MeshConfig(*shape))
    for sparsity in (0.5,) if group == "2:4" else (0.3, 0.5, 0.0):
        counts = jax.tree.map(jnp.int32, selection_counts(SHAPE, sparsity, group, BOUND))
        for scores, values in SCORES.items():
            with jax.set_mesh(mesh):
                placed = jax.device_put(values, tree_shardings(mesh, {name: values})[name])
                found = compiled(name, group)(placed, Counts(*counts))
            assert not found.is_fully_replicated
            found = np.asarray(found)
            np.testing.assert_array_equal(found, on_one_device(scores, group, sparsity), err_msg=f"{scores} {sparsity}")
            assert_counts(found, group, sparsity)


def test_slabs_on_a_mesh_are_those_of_one_device() -> None:
    """Split by rows; by columns only where every device has whole slabs."""
    scores = np.random.default_rng(3).integers(0, 9, (48, 300)).astype(np.float32)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    counts = Counts(*jax.tree.map(jnp.int32, selection_counts(scores.shape, 0.3, "slab")))
    with jax.set_mesh(mesh):
        for name, values in (("q_proj", scores), ("down_proj", scores[:, :256])):
            placed = jax.device_put(values, tree_shardings(mesh, {name: values})[name])
            found = compiled(name, "slab")(placed, counts)
            np.testing.assert_array_equal(found, select_mask(jnp.asarray(values), 0.3, "slab"), err_msg=name)
        with pytest.raises(InputError, match="expected whole slabs of 128 inputs on every device, found 150"):
            compiled("down_proj", "slab")(jax.device_put(scores), counts)
    with jax.set_mesh(make_mesh(MeshConfig(4, 2, 1))):
        found = compiled("down_proj", "slab")(jax.device_put(scores), counts)
    np.testing.assert_array_equal(found, select_mask(jnp.asarray(scores), 0.3, "slab"))


@pytest.mark.parametrize(
    ("shape", "name", "group"), few_of([case for case in CASES if 1 not in case[0][1:]], *QUICK[-4:])
)
def test_a_plain_call_on_a_sharded_array_gives_the_same(shape: tuple[int, int, int], name: str, group: str) -> None:
    """Without a word about the mesh: the partitioner makes the collectives."""
    mesh = make_mesh(MeshConfig(*shape))
    for scores in ("tied", "subnormal"):
        placed = jax.device_put(SCORES[scores], tree_shardings(mesh, {name: SCORES[scores]})[name])
        select = jax.jit(select_mask, static_argnums=(1, 2, 3))
        for call in (select, select_mask):
            np.testing.assert_array_equal(call(placed, 0.5, group, BOUND), on_one_device(scores, group, 0.5))
