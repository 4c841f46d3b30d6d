"""Subspaces, distances and energies against SciPy and against singular value decompositions of the whole matrices."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg

from efx_jax.analysis.subspaces import (
    adapter_basis,
    adapter_distances,
    base_relations,
    grassmann_distance,
    leading_basis,
    principal_angles,
    projection_energy,
    random_reference,
)
from efx_jax.errors import InputError
from efx_jax.lora import Adapters


def basis(rng: np.random.Generator, width: int, rank: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((width, rank)))[0]


def projector(columns: np.ndarray) -> np.ndarray:
    return columns @ columns.T


def test_a_subspace_is_at_no_distance_from_itself_whatever_its_basis() -> None:
    rng = np.random.default_rng(0)
    one = basis(rng, 40, 6)
    turned = one @ basis(rng, 6, 6)
    assert grassmann_distance(one, turned) < 1e-14


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_orthogonal_subspaces_are_sqrt_r_times_half_pi_apart(rank) -> None:
    whole = basis(np.random.default_rng(1), 12, 12)
    assert grassmann_distance(whole[:, :rank], whole[:, 5 : 5 + rank]) == pytest.approx(math.sqrt(rank) * math.pi / 2)


@pytest.mark.parametrize(("first", "second"), [(4, 4), (7, 3), (3, 7), (1, 1)])
@pytest.mark.parametrize("turn", [0.0, 1e-9, 1e-3, 1.0, 100.0])
def test_angles_are_scipys(first, second, turn) -> None:
    rng = np.random.default_rng(2)
    one = basis(rng, 30, first)
    other = np.linalg.qr(one[:, : min(first, second)] + turn * rng.standard_normal((30, min(first, second))))[0]
    if second > first:
        other = np.linalg.qr(np.hstack([other, rng.standard_normal((30, second - first))]))[0]
    expected = np.sort(scipy.linalg.subspace_angles(one, other))
    np.testing.assert_allclose(principal_angles(one, other), expected, rtol=1e-9, atol=1e-14)


def test_a_small_angle_keeps_its_digits() -> None:
    """Its cosine is 1 in float64: the arc cosine would say 0."""
    angle = 1e-9
    one, other = np.eye(5)[:, :1], np.asarray([[math.cos(angle)], [math.sin(angle)], [0], [0], [0]])
    assert grassmann_distance(one, other) == pytest.approx(angle, rel=1e-9)


def test_an_adapters_subspace_is_that_of_the_svd_of_b_a() -> None:
    rng = np.random.default_rng(3)
    lora_a, lora_b = rng.standard_normal((4, 50)).astype(np.float32), rng.standard_normal((20, 4)).astype(np.float32)
    vectors = np.linalg.svd(lora_b.astype(float) @ lora_a.astype(float))[0]
    found = adapter_basis(lora_a, lora_b)
    assert found.shape == (20, 4)
    for rank in (1, 3, 4):
        np.testing.assert_allclose(projector(found[:, :rank]), projector(vectors[:, :rank]), atol=1e-12)


def test_an_adapter_of_lower_rank_has_a_subspace_of_that_rank() -> None:
    rng = np.random.default_rng(4)
    lora_a = rng.standard_normal((4, 9))
    lora_b = rng.standard_normal((8, 2)) @ rng.standard_normal((2, 4))
    assert adapter_basis(lora_a, lora_b).shape == (8, 2)
    assert adapter_basis(lora_a, 0 * lora_b).shape == (8, 0)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
def test_leading_subspaces_are_those_of_the_svd(shape) -> None:
    weight = np.random.default_rng(5).standard_normal(shape)
    vectors, values, _ = np.linalg.svd(weight)
    found = leading_basis(weight, 3)
    np.testing.assert_allclose(projector(found), projector(vectors[:, :3]), atol=1e-10)
    assert projection_energy(found, weight) == pytest.approx(np.sum(values[:3] ** 2) / np.sum(values**2), rel=1e-12)


def test_energy_is_all_within_nothing_without_and_undefined_of_nothing() -> None:
    weight = np.zeros((6, 3))
    weight[:2] = 1.0
    assert projection_energy(np.eye(6)[:, :2], weight) == 1.0
    assert projection_energy(np.eye(6)[:, 2:], weight) == 0.0
    assert projection_energy(np.eye(6), np.zeros((6, 3))) is None


def test_a_random_subspace_is_as_far_as_scipy_finds_and_holds_rank_over_width() -> None:
    rng = np.random.default_rng(6)
    pairs = [(basis(rng, 40, 5), basis(rng, 40, 8)) for _ in range(200)]
    angles = [scipy.linalg.subspace_angles(*pair) for pair in pairs]
    distances = [float(np.sqrt(np.sum(np.square(each)))) for each in angles]
    reference = random_reference(40, 5, 8)
    assert reference.mean == pytest.approx(np.mean(distances), abs=3 * np.std(distances) / math.sqrt(40))
    assert reference.std == pytest.approx(np.std(distances), rel=0.5)
    weight = rng.standard_normal((40, 3)) @ np.diag([5, 1, 0.1])
    energies = [projection_energy(one, weight) for one, _ in pairs]
    assert np.mean(energies) == pytest.approx(5 / 40, rel=0.1)


def adapters(rng: np.random.Generator, out_dim: int = 10, rank: int = 3) -> Adapters:
    return Adapters(
        lora_a={"q_proj": rng.standard_normal((2, rank, 7)), "down_proj": rng.standard_normal((2, rank, 7))},
        lora_b={"q_proj": rng.standard_normal((2, out_dim, rank)), "down_proj": rng.standard_normal((2, 12, rank))},
        scale=1.0,
    )


def test_two_runs_are_as_far_apart_as_scipy_says_of_their_products() -> None:
    rng = np.random.default_rng(7)
    first, second = adapters(rng), adapters(rng, rank=2)
    found = list(adapter_distances(first, second, ("a", "b")))
    assert [(each.matrix, each.layer, each.rank) for each in found] == [
        (matrix, layer, 2) for matrix in ("q_proj", "down_proj") for layer in (0, 1)
    ]
    for each in found:
        products = [
            scipy.linalg.orth(run.lora_b[each.matrix][each.layer] @ run.lora_a[each.matrix][each.layer])
            for run in (first, second)
        ]
        angles = scipy.linalg.subspace_angles(*products)
        assert each.distance == pytest.approx(np.linalg.norm(angles))
        assert 0 < each.random < each.most == pytest.approx(math.sqrt(2) * math.pi / 2)
    same = list(adapter_distances(first, dataclasses.replace(first, scale=2.0), ("a", "b")))
    assert max(each.share for each in same) < 1e-13


def test_an_adapter_that_reaches_all_outputs_has_nothing_to_compare() -> None:
    rng = np.random.default_rng(7)
    whole, narrow = adapters(rng, 3), adapters(rng, 3)
    assert {each.matrix for each in adapter_distances(whole, narrow, ("a", "b"))} == {"down_proj"}
    weights = {"q_proj": rng.standard_normal((2, 3, 7)), "down_proj": rng.standard_normal((2, 12, 7))}
    assert {each.matrix for each in base_relations(weights, whole)} == {"down_proj"}


def test_runs_of_other_models_and_adapters_that_are_nothing_are_refused() -> None:
    rng = np.random.default_rng(8)
    first = adapters(rng)
    with pytest.raises(InputError, match=r"a and b: q_proj is \[2, 10, 7\] in one and \[2, 11, 7\] in the other"):
        list(adapter_distances(first, adapters(rng, 11), ("a", "b")))
    nothing = dataclasses.replace(first, lora_b={name: 0 * b for name, b in first.lora_b.items()})
    with pytest.raises(InputError, match="expected adapters other than 0 in both"):
        list(adapter_distances(first, nothing, ("a", "b")))
    with pytest.raises(InputError, match="adapt no matrix in common"):
        list(adapter_distances(first, Adapters({}, {}, 1.0), ("a", "b")))
    with pytest.raises(InputError, match="widths 3 and 4"):
        principal_angles(np.eye(3), np.eye(4))


def test_adapter_and_base_relate_as_their_singular_vectors_do() -> None:
    rng = np.random.default_rng(9)
    given = adapters(rng)
    weights = {"q_proj": rng.standard_normal((2, 10, 7)), "down_proj": rng.standard_normal((2, 12, 7))}
    found = list(base_relations(weights, given, [1]))
    assert [(each.matrix, each.layer) for each in found] == [("q_proj", 1), ("down_proj", 1)]
    for each in found:
        update = given.lora_b[each.matrix][1] @ given.lora_a[each.matrix][1]
        weight = weights[each.matrix][1]
        ours, theirs = (np.linalg.svd(matrix)[0][:, :3] for matrix in (update, weight))
        assert each.rank == 3 and each.random_energy == 3 / weight.shape[0]
        assert each.distance == pytest.approx(np.linalg.norm(scipy.linalg.subspace_angles(ours, theirs)))

        def share(columns: np.ndarray, matrix: np.ndarray) -> float:
            return np.linalg.norm(columns @ columns.T @ matrix) ** 2 / np.linalg.norm(matrix) ** 2

        assert each.adapter_energy == pytest.approx(share(theirs, update))
        assert each.base_energy == pytest.approx(share(ours, weight))
        assert each.leading_energy == pytest.approx(share(theirs, weight))
    nothing = dataclasses.replace(given, lora_b={name: 0 * b for name, b in given.lora_b.items()})
    assert list(base_relations(weights, nothing)) == []
