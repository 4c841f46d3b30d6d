"""Where the zeros are, what two masks share, and how far the kept weights have moved, matrix by matrix."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from efx_jax.errors import InputError
from efx_jax.model.spec import LINEARS

FAR = 0.1
"""A kept weight counts as moved if it has changed by more than this share of its original value."""


@dataclasses.dataclass(frozen=True)
class MatrixSparsity:
    """The zeros of one matrix with `entries` entries.

    `sparsity`: share of zeros. `row_least`, `row_most`: that of its fullest and emptiest output row. `empty_rows`,
    `empty_columns`: output rows and input columns that are all zeros.
    """

    layer: int
    matrix: str
    entries: int
    sparsity: float
    row_least: float
    row_most: float
    empty_rows: int
    empty_columns: int


@dataclasses.dataclass(frozen=True)
class MaskChange:
    """Two masks of one matrix, `first` and `second`; `first_kept` is the share of all entries that the first keeps.

    `kept`, `pruned`: the share of what the first keeps (prunes) that the second keeps (prunes) too, None if that is
    nothing. `random_kept`, `random_pruned`: what a random mask of the second's size would share on average.
    """

    first: str
    second: str
    layer: int
    matrix: str
    entries: int
    first_kept: float
    kept: float | None
    pruned: float | None
    random_kept: float
    random_pruned: float

    @property
    def beyond_chance(self) -> float | None:
        """0 if the kept entries agree only as much as random masks do, 1 if one mask's lie within the other's.

        If both keep equally many this is Cohen's kappa; None if a mask keeps nothing or everything.
        """
        kept = None if self.kept is None else self.kept * self.first_kept
        least, most = sorted((self.first_kept, self.random_kept))
        if kept is None or least == 0 or most == 1:
            return None
        return (kept / least - most) / (1 - most)


@dataclasses.dataclass(frozen=True)
class Move:
    """How far the kept entries of one matrix are from the base's.

    `kept`: their number. `moved`: the share of them that changed by more than a tenth of their value. `norm`: norm of
    the change over that of the kept entries in the base; `event_norm` likewise for what events wrote into the base
    (None if nothing), and `training_norm` for what the adapters have added since (the two may cancel, so need not add
    up).
    """

    layer: int
    matrix: str
    kept: int
    moved: float
    norm: float
    event_norm: float | None
    training_norm: float


def matrix_sparsities(weights: Mapping[str, Any]) -> Iterator[MatrixSparsity]:
    """Counts the zeros of every linear, name -> `[L,O,I]`, in the model's order."""
    for matrix in (name for name in LINEARS if name in weights):
        for layer, weight in enumerate(weights[matrix]):
            zero = np.asarray(weight) == 0
            rows = zero.mean(axis=1)
            yield MatrixSparsity(
                layer=layer,
                matrix=matrix,
                entries=zero.size,
                sparsity=float(zero.mean()),
                row_least=float(rows.min()),
                row_most=float(rows.max()),
                empty_rows=int(zero.all(axis=1).sum()),
                empty_columns=int(zero.all(axis=0).sum()),
            )


def mask_changes(
    first: Mapping[str, npt.NDArray[np.uint8]],
    second: Mapping[str, npt.NDArray[np.uint8]],
    widths: Mapping[str, int],
    names: tuple[str, str],
) -> Iterator[MaskChange]:
    """What two sets of masks share, for each matrix that both have.

    Args:
        first: name -> packed mask, uint8 `[L,O,ceil(I/8)]` (see `efx_jax.masks`).
        second: likewise.
        widths: I of every matrix.
        names: the names of the two.

    Raises:
        InputError: masks of different shapes, or no matrix in common.
    """
    shared = [name for name in LINEARS if name in first and name in second]
    if not shared:
        raise InputError(
            f"{names[0]} and {names[1]}: prune no matrix in common; choose runs with the same prune.targets"
        )
    for matrix in shared:
        if first[matrix].shape != second[matrix].shape:
            raise InputError(
                f"{names[0]} and {names[1]}: masks of {matrix} are {list(first[matrix].shape)} and "
                f"{list(second[matrix].shape)}; expected runs of one model"
            )
        for layer, (one, other) in enumerate(zip(first[matrix], second[matrix], strict=True)):
            size = one.shape[0] * widths[matrix]
            kept_one, kept_other, both = (int(np.bitwise_count(bits).sum()) for bits in (one, other, one & other))
            neither = size - kept_one - kept_other + both
            yield MaskChange(
                first=names[0],
                second=names[1],
                layer=layer,
                matrix=matrix,
                entries=size,
                first_kept=kept_one / size,
                kept=both / kept_one if kept_one else None,
                pruned=neither / (size - kept_one) if size > kept_one else None,
                random_kept=kept_other / size,
                random_pruned=1 - kept_other / size,
            )


def weight_moves(base: Mapping[str, Any], final: Mapping[str, Any], rewritten: Mapping[str, Any]) -> Iterator[Move]:
    """How far the kept weights of every linear have moved from the base.

    Args:
        base: name -> W `[L,O,I]` before the run.
        final: the exported weights; an entry is kept where it is not 0.
        rewritten: the base linears as rewritten by the run's events; {} if they are unchanged.

    Raises:
        InputError: an export with other shapes, which has lost whole units.
    """
    for matrix in (name for name in LINEARS if name in final):
        if final[matrix].shape != base[matrix].shape:
            raise InputError(
                f"moved: {matrix} of the export is {list(final[matrix].shape)}, of the base "
                f"{list(base[matrix].shape)}; expected a run that zeroes entries and cuts none out"
            )
        for layer in range(len(final[matrix])):
            after = np.asarray(final[matrix][layer], np.float64)
            mask = after != 0
            before = np.asarray(base[matrix][layer], np.float64)[mask]
            after, whole = after[mask], float(np.linalg.norm(before)) or 1.0
            event = np.asarray(rewritten[matrix][layer], np.float64)[mask] if matrix in rewritten else None
            yield Move(
                layer=layer,
                matrix=matrix,
                kept=before.size,
                moved=float((np.abs(after - before) > FAR * np.abs(before)).mean()) if before.size else 0.0,
                norm=float(np.linalg.norm(after - before)) / whole,
                event_norm=None if event is None else float(np.linalg.norm(event - before)) / whole,
                training_norm=float(np.linalg.norm(after - (before if event is None else event))) / whole,
            )


def weighted_mean(values: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """The mean of the values that are not None, each weighted by the number of entries of its matrix."""
    found = [(value, size) for value, size in zip(values, sizes, strict=True) if value is not None]
    total = sum(size for _, size in found)
    return sum(value * size for value, size in found) / total if total else None
