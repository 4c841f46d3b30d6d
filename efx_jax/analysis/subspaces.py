"""Subspaces of a linear's output space: the one an adapter reaches, how far apart two are, how much energy one holds.

All arithmetic is float64 NumPy. A subspace is an orthonormal basis `[O,R]`, the top-R left singular vectors of a matrix
`[O,I]`: for an adapter those of B A, whose column space is all that it can add to the output, for a base weight its R
leading output directions. The paper's equations 8 and 9 are `principal_angles` and `grassmann_distance`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.spec import LINEARS

Matrix = npt.NDArray[np.float64]
_DRAWS = 48


@dataclasses.dataclass(frozen=True)
class Reference:
    """How far apart two random subspaces of these dimensions are: mean and standard deviation of the distance."""

    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class Distance:
    """The adapter subspaces of one matrix in two runs, `first` and `second`.

    `rank`: number of principal angles. `distance`: Grassmann's, radians. `most`: that of orthogonal subspaces,
    sqrt(rank) pi/2. `random`, `random_std`: that of random ones.
    """

    first: str
    second: str
    layer: int
    matrix: str
    rank: int
    distance: float
    most: float
    random: float
    random_std: float

    @property
    def share(self) -> float:
        """Distance over that of random subspaces: 0 the same, 1 as far apart as chance."""
        return self.distance / self.random


@dataclasses.dataclass(frozen=True)
class BaseRelation:
    """The adapter of one matrix against the base weight that it is added to; both subspaces have `rank` dimensions.

    `distance`, `most`, `random`, `random_std` as in `Distance`. The energies are shares of a squared Frobenius norm:
    `adapter_energy` of B A within the base's leading subspace, `base_energy` of W within the adapter's subspace,
    `leading_energy` of W within its own leading subspace, the most that `rank` dimensions can hold; a random subspace
    holds `random_energy` = rank / O of any matrix on average.
    """

    layer: int
    matrix: str
    rank: int
    distance: float
    most: float
    random: float
    random_std: float
    adapter_energy: float
    base_energy: float
    leading_energy: float
    random_energy: float

    @property
    def share(self) -> float:
        """Distance over that of random subspaces."""
        return self.distance / self.random


def adapter_basis(lora_a: npt.ArrayLike, lora_b: npt.ArrayLike) -> Matrix:
    """Left singular vectors of B A, in descending order of singular value, without forming B A.

    Args:
        lora_a: A `[R,I]`.
        lora_b: B `[O,R]`.

    Returns:
        Orthonormal columns `[O,r]`; r is the numerical rank of B A, 0 if B A is zero.
    """
    outputs, core = np.linalg.qr(np.asarray(lora_b, np.float64))
    small = core @ _inner(lora_a)
    vectors, values, _ = np.linalg.svd(small)
    # Adapters are float32: directions at the level of rounding error do not count.
    rank = int(np.sum(values > len(values) * np.finfo(np.float32).eps * values[0]))
    return outputs @ vectors[:, :rank]


def leading_basis(weight: npt.ArrayLike, rank: int) -> Matrix:
    """The top left singular vectors of W `[O,I]`: orthonormal columns `[O,r]`, r at most `rank` and W's own rank.

    From the eigenvectors of the smaller of W W^T and W^T W. That squares the singular values, so the smallest ones lose
    precision and the leading ones keep it.
    """
    matrix = np.asarray(weight, np.float64)
    out_dim, in_dim = matrix.shape
    gram = matrix @ matrix.T if out_dim <= in_dim else matrix.T @ matrix
    squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    # Values up to the square root of the Gram matrix's rounding error cannot be distinguished from 0 here.
    known = int(np.sum(values > np.sqrt(len(values) * np.finfo(np.float64).eps) * values[0])) if values[0] > 0 else 0
    top = vectors[:, ::-1][:, : min(rank, known)]
    return top if out_dim <= in_dim else np.linalg.qr(matrix @ top)[0]


def principal_angles(first: Matrix, second: Matrix) -> npt.NDArray[np.float64]:
    """The principal angles between two subspaces of one space, radians in [0, pi/2], ascending (the paper's eq. 8).

    The cosines are the singular values of Q_a^T Q_b. Near 0 the cosine gives an angle to only half its digits, so there
    the sine is used, a singular value of Q_b - Q_a Q_a^T Q_b (Bjorck and Golub, 1973, doi 10.2307/2005662).

    Args:
        first: orthonormal columns `[O,R1]`.
        second: orthonormal columns `[O,R2]`.

    Returns:
        min(R1, R2) angles.

    Raises:
        InputError: spaces of different widths O.
    """
    if first.shape[0] != second.shape[0]:
        raise InputError(
            f"subspaces: expected two of one space, found widths {first.shape[0]} and {second.shape[0]}; compare runs "
            "of one model"
        )
    wide, narrow = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    if narrow.shape[1] == 0:
        return np.zeros(0)
    inner = wide.T @ narrow
    cosines = np.clip(np.linalg.svd(inner, compute_uv=False), 0.0, 1.0)
    sines = np.clip(np.linalg.svd(narrow - wide @ inner, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines))


def grassmann_distance(first: Matrix, second: Matrix) -> float:
    """The square root of the sum of squared principal angles (the paper's eq. 9); arguments as in `principal_angles`.

    It is 0 if one subspace lies within the other, and sqrt(R) pi/2 if all R directions are orthogonal.
    """
    return float(np.linalg.norm(principal_angles(first, second)))


def random_reference(width: int, first: int, second: int, draws: int = _DRAWS) -> Reference:
    """The distance of random subspaces of `first` and `second` dimensions in a space of `width`, by simulation.

    One may stay fixed because the other is uniform: its basis is that of a matrix of normal draws with a fixed seed.
    """
    rng = np.random.default_rng(0)
    fixed = np.eye(width)[:, :first]
    drawn = (np.linalg.qr(rng.standard_normal((width, second)))[0] for _ in range(draws))
    found = [grassmann_distance(fixed, basis) for basis in drawn]
    return Reference(float(np.mean(found)), float(np.std(found, ddof=1)))


def projection_energy(basis: Matrix, weight: npt.ArrayLike) -> float | None:
    """||Q^T W||_F^2 / ||W||_F^2 for a basis `[O,R]` and a matrix `[O,I]`, in [0, 1]; None for a matrix of zeros."""
    matrix = np.asarray(weight, np.float64)
    whole = np.sum(np.square(matrix))
    return float(np.sum(np.square(basis.T @ matrix)) / whole) if whole > 0 else None


def adapter_distances(first: Adapters, second: Adapters, names: tuple[str, str]) -> Iterator[Distance]:
    """The distance for every matrix that two runs of one model adapt, unless one of the adapters is zero.

    Args:
        first: adapters of a run, `[L,R,I]` and `[L,O,R]`.
        second: those of another; the ranks may differ.
        names: the runs' names.

    Raises:
        InputError: models of different shapes, or no matrix that both have adapted.
    """
    shared = _shared(first, second, names)
    references: dict[tuple[int, int, int], Reference] = {}
    is_empty = True
    for matrix in shared:
        for layer in range(first.lora_b[matrix].shape[0]):
            one, other = (
                adapter_basis(each.lora_a[matrix][layer], each.lora_b[matrix][layer]) for each in (first, second)
            )
            rank = min(one.shape[1], other.shape[1])
            if rank == 0:
                continue
            is_empty = False
            shape = (one.shape[0], one.shape[1], other.shape[1])
            if _is_whole(*shape):
                continue
            references[shape] = found = references.get(shape) or random_reference(*shape)
            yield Distance(
                *names, layer, matrix, rank, grassmann_distance(one, other), _most(rank), found.mean, found.std
            )
    if is_empty:
        raise InputError(
            f"{names[0]} and {names[1]}: expected adapters other than 0 in both, found none; B is 0 right after an "
            "event that refits the base: compare checkpoints of later steps"
        )


def base_relations(
    weights: Mapping[str, Any], adapters: Adapters, layers: Sequence[int] | None = None
) -> Iterator[BaseRelation]:
    """The relation of adapter and base for every adapted matrix whose adapter is not zero.

    Args:
        weights: name -> W `[L,O,I]`.
        adapters: the adapters.
        layers: numbers of the layers; None: all.
    """
    references: dict[tuple[int, int], Reference] = {}
    for matrix in (name for name in LINEARS if name in adapters.lora_b):
        for layer in range(weights[matrix].shape[0]) if layers is None else layers:
            lora_a, lora_b = adapters.lora_a[matrix][layer], adapters.lora_b[matrix][layer]
            basis = adapter_basis(lora_a, lora_b)
            weight = np.asarray(weights[matrix][layer], np.float64)
            leading = leading_basis(weight, basis.shape[1])
            rank, width = leading.shape[1], leading.shape[0]
            if rank == 0 or _is_whole(width, rank, rank):
                continue
            basis = basis[:, :rank]
            references[width, rank] = found = references.get((width, rank)) or random_reference(width, rank, rank)
            # B A and B L, where A = L V^T with orthonormal V, differ by a rotation of the inputs.
            update = np.asarray(lora_b, np.float64) @ _inner(lora_a)
            yield BaseRelation(
                layer=layer,
                matrix=matrix,
                rank=rank,
                distance=grassmann_distance(leading, basis),
                most=_most(rank),
                random=found.mean,
                random_std=found.std,
                adapter_energy=projection_energy(leading, update) or 0.0,
                base_energy=projection_energy(basis, weight) or 0.0,
                leading_energy=projection_energy(leading, weight) or 0.0,
                random_energy=rank / width,
            )


def _is_whole(width: int, *ranks: int) -> bool:
    """Whether a subspace is the whole space, so that it contains every other and there is nothing to compare."""
    return max(ranks) >= width


def _inner(lora_a: npt.ArrayLike) -> Matrix:
    """L `[R,R]` of A = L V^T, V `[I,R]` with orthonormal columns."""
    return np.linalg.qr(np.asarray(lora_a, np.float64).T, mode="r").T


def _most(rank: int) -> float:
    return float(np.sqrt(rank) * np.pi / 2)


def _shared(first: Adapters, second: Adapters, names: tuple[str, str]) -> list[str]:
    shared = [name for name in LINEARS if name in first.lora_b and name in second.lora_b]
    for name in shared:
        one, other = ((*each.lora_b[name].shape[:2], each.lora_a[name].shape[2]) for each in (first, second))
        if one != other:
            raise InputError(
                f"{names[0]} and {names[1]}: {name} is {list(one)} in one and {list(other)} in the other (layers, "
                "outputs, inputs); expected runs of one model"
            )
    if not shared:
        raise InputError(
            f"{names[0]} and {names[1]}: adapt no matrix in common; choose runs with the same lora.targets"
        )
    return shared
